"""What was learned, in a few lines of plain diffusers, or of a model of one's own: for the report and for the model card."""

from collections.abc import Mapping
from typing import Any

_OUTPUTS = {"image": "images", "video": "frames", "sound": "audios"}
ABOUT_STABLE_DIFFUSION: dict[str, Any] = {
    "pipeline": "StableDiffusionPipeline",
    "scheduler": "DDIMScheduler",
    "networks": ["unet"],
    "format": "lora",
    "guidance": "guidance_scale",
    "makes": "image",
    "comfyui": True,
}


def is_own(about: Mapping[str, Any]) -> bool:
    """It is of a model of one's own, not of a diffusers pipeline."""
    return isinstance(about.get("network"), str)


def about_of(environment: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What env.json says of the model; where it says nothing, Stable Diffusion, trained as config.yaml says."""
    found = environment.get("model")
    if isinstance(found, dict) and is_own(found):
        return {"format": "", "makes": "sample"} | found
    full = (config.get("policy") or {}).get("training") == "full"
    if not (isinstance(found, dict) and isinstance(found.get("pipeline"), str) and isinstance(found.get("networks"), list)):
        found = {}
    return found if found.get("makes") in _OUTPUTS else ABOUT_STABLE_DIFFUSION | {"format": "full" if full else "lora"}


def loading_lines(
    config: Mapping[str, Any], about: Mapping[str, Any], base: str, here: str, prompt: str, base_config: str = ""
) -> list[str]:
    """Python that loads a model with what a run exported, and calls it.

    Args:
        config: what config.yaml holds.
        about: see ``about_of``; it is ``Policy.about``.
        base: the base model, as a Python expression.
        here: the export, as one.
        prompt: likewise.
        base_config: where the base model is a single file, that of its configuration.
    """
    if is_own(about):
        lines = about.get("loading") or ["# what its policy's export(folder) wrote is in EXPORT"]
        return ["# network: the model as it was before training", *(str(line).replace("EXPORT", here) for line in lines)]
    sampling, kind = config.get("sampling") or {}, about.get("pipeline")
    given = [f"num_inference_steps={sampling.get('num_steps')}"]
    if about.get("guidance") is not None:
        given.append(f"{about['guidance']}={_number(sampling.get('guidance'))}")
    if about.get("negative_prompt") is not None:
        given.append(f"negative_prompt={about['negative_prompt']!r}")
    if sampling.get("sampler") == "ddim" and kind == "StableDiffusionPipeline":
        given.append(f"eta={_number(sampling.get('eta'))}")
    given += [f"{name}={value!r}" for name, value in (about.get("arguments") or {}).items()]
    if config.get("model") in ("emoji", "emoji-flow"):
        lines = ["from diffusionrl.policies import load_pipeline", f'pipe = load_pipeline("{config["model"]}")']
    else:
        dtype = (config.get("policy") or {}).get("dtype") or "float32"
        lines = _base_lines(kind, about, base, base_config, f"torch.{dtype}")
        ours = about.get("scheduler") == "DDIMScheduler" and kind == "StableDiffusionPipeline"
        lines.insert(0, f"from diffusers import {'DDIMScheduler, ' if ours else ''}{kind}")
        if ours:
            lines.append("pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)")
    networks = about.get("networks") or []
    if about.get("format") == "full":
        lines += [f'pipe.{name} = type(pipe.{name}).from_pretrained({here}, subfolder="{name}")' for name in networks]
    elif about.get("format") == "peft":
        lines.insert(0, "from peft import PeftModel")
        lines += [f'pipe.{name} = PeftModel.from_pretrained(pipe.{name}, {here}, subfolder="{name}")' for name in networks]
    else:
        lines.append(f"pipe.load_lora_weights({here})")
    made = about["makes"]
    return [*lines, f"{made} = pipe({prompt}, {', '.join(given)}).{_OUTPUTS[made]}[0]"]


def _base_lines(kind: Any, about: Mapping[str, Any], base: str, base_config: str, dtype: str) -> list[str]:
    """The model before training: a folder, a hub id, or a single file with what it has not from its configuration; in the
    precision that the run had."""
    file, variants = about.get("single_file"), about.get("variants") or {}
    said = {name: f', variant="{variant}"' for name, variant in variants.items()}
    if not file and not said and dtype == "torch.float32":
        return [f"pipe = {kind}.from_pretrained({base})"]
    in_one_precision = f".to({dtype})"  # where transformers leaves weights in that of their file
    if not file:
        return ["import torch", f"pipe = {kind}.from_pretrained({base}{next(iter(said.values()), '')}){in_one_precision}"]
    lines, given = ["import torch"], [base, f"config={base_config}", *(f"{name}=None" for name in file["absent"])]
    for name, (library, part) in file["beside"].items():
        source = f'{base_config}, subfolder="{name}"{said.get(name, "")}'
        lines += [f"from {library} import {part}", f"{name} = {part}.from_pretrained({source})"]
        given.append(f"{name}={name}")
    lines.append(f"pipe = {kind}.from_single_file({', '.join(given)}){in_one_precision}")
    return lines + [f"pipe.{name}.eval().tie_weights()" for name in file["mended"]]


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
