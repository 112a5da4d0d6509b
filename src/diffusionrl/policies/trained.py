"""A model with what was trained on it: a LoRA, or what a run exported."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import PeftModel

from diffusionrl import devices
from diffusionrl.config import SamplingConfig, TrainConfig
from diffusionrl.data.prompts import Prompt, load_prompts
from diffusionrl.errors import UserError, require
from diffusionrl.foreign.names import is_code
from diffusionrl.paths import expand
from diffusionrl.policies.adapters import find_lora, load_lora
from diffusionrl.policies.base import Policy
from diffusionrl.policies.loading import check_model, load_pipeline, load_policy, make_policy
from diffusionrl.policies.soundness import asking, check_sound
from diffusionrl.runs import checkpoint
from diffusionrl.runs.checkpoint import Checkpoint
from diffusionrl.runs.folder import exported_step
from diffusionrl.runs.places import read_settings


@dataclass(frozen=True)
class Trained:
    """A model and what was trained on it, found but not loaded.

    Attributes:
        name: what it was asked for as.
        base: "emoji", a folder, a hub id, a single file, or a function that makes a policy.
        sample_shape: of what it makes; None where it is known when it is loaded.
        config: of a single file: see ``TrainConfig.model_config``.
        lora: a safetensors file.
        export: what a run exported.
    """

    name: str
    base: str
    sample_shape: tuple[int, ...] | None
    config: str | None = None
    lora: Path | None = None
    export: Path | None = None


def begin_from_run(config: TrainConfig) -> TrainConfig:
    """Where the model is a run's folder: that run's model, with the LoRA that it exported to go on from.

    Raises:
        UserError: it exported something else, or a LoRA is asked for besides.
    """
    run_dir = expand(config.model)
    if not (run_dir / "config.yaml").is_file() or (run_dir / "model_index.json").is_file():
        return config
    if config.policy.lora is not None or config.model_config is not None:
        raise UserError(f"{run_dir} is a run, which has a LoRA and settings of its own: leave out policy.lora and model_config")
    settings = read_settings(run_dir)
    base, file = str(settings.get("model")), settings.get("model_config")
    if is_code(base):
        raise UserError(f"{run_dir} trained {base}, code of your own: load what it exported there, and name that as the model")
    lora = run_dir / "export" / LORA_WEIGHT_NAME_SAFE
    if not lora.is_file():
        raise UserError(
            f"{run_dir} is a run without a LoRA in its export, and training goes on from no other: load it as its "
            "export/README.md says, and save_pretrained writes a folder for --model"
        )
    return replace(config, model=base, model_config=file, policy=replace(config.policy, lora=lora))


def find_trained(model: str, lora: Path | None = None, config: str | None = None) -> Trained:
    """A model as it is; with a LoRA (a safetensors file, or a folder that holds one as diffusers names it); or a run folder:
    the run's model with what the run exported.

    Raises:
        UserError: no such model, LoRA or run.
    """
    run_dir = expand(model)
    if (run_dir / "config.yaml").is_file():
        if lora is not None:
            raise UserError(f"{model} is a run, which has learned something itself: give the LoRA's base model, or no LoRA")
        if config is not None:
            raise UserError(f"{model} is a run, which knows the configuration of its model: leave out model_config")
        settings, export = read_settings(run_dir), run_dir / "export"
        base, config = str(settings.get("model")), settings.get("model_config")
        shape = check_model(base, config)
        if is_code(base) or list(export.rglob("*.safetensors")):
            return Trained(model, base, shape, config, export=export)
        raise UserError(f"{run_dir} is a run folder without an export: it has not trained yet")
    shape = check_model(model, config)
    require(lora is None or not is_code(model), f"model {model!r} is code of your own, which loads no LoRA file: let it do so")
    if lora is None:
        return Trained(model, model, shape, config)
    return Trained(f"{model} with {lora.name}", model, shape, config, lora=find_lora(lora))


def load_trained(
    model: str,
    lora: Path | None = None,
    config: str | None = None,
    sampling: SamplingConfig | None = None,
    example: Prompt | None = None,
) -> Policy:
    """What ``find_trained`` finds, as a policy; a LoRA is merged into the weights.

    Raises:
        UserError: it is not there, it could not be loaded, or the LoRA is of another model.
    """
    found, sampling = find_trained(model, lora, config), sampling or SamplingConfig()
    if is_code(found.base):
        return _load_own(found, sampling, example)
    pipeline = load_pipeline(found.base, config=found.config)
    if found.export is not None:
        put_export(pipeline, found.export, found.name)
    if found.lora is not None:
        _merge(pipeline, found.lora, found.name)
    with asking(found.base):
        policy = make_policy(pipeline, sampling, example, lora_rank=None, device=devices.choose(), source=found.name)
    check_sound(policy, pipeline, found.name, sampling.num_steps, example)
    return policy


def _load_own(found: Trained, sampling: SamplingConfig, example: Prompt | None) -> Policy:
    """Its function says what it is before training, and the checkpoint of the step that was exported what it learned."""
    if found.export is None:
        return load_policy(found.base, training="full", sampling=sampling, example=example)
    run_dir = found.export.parent
    said = read_settings(run_dir)
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in said["policy"].items()
    }
    policy = load_policy(found.base, **settings, seed=said["seed"], sampling=sampling, example=example)
    steps = checkpoint.complete_steps(run_dir)
    _put_checkpoint(policy, _find_checkpoint(run_dir, exported_step(run_dir, steps[-1]) if steps else None), run_dir)
    return policy


def _find_checkpoint(run_dir: Path, step: int | None) -> Checkpoint:
    """The newest one, or that of a step. Raises UserError where there is none, or it is corrupted."""
    steps = checkpoint.complete_steps(run_dir)
    chosen = steps[-1] if step is None and steps else step
    if chosen not in steps:
        raise UserError(f"{run_dir} has no checkpoint of step {step}: there are {', '.join(map(str, steps)) or 'none'}")
    try:
        return checkpoint.load(checkpoint.folder_of(run_dir, chosen))
    except checkpoint.Corrupted as error:
        raise UserError(f"corrupted checkpoint: {error}") from error


@torch.no_grad()
def _put_checkpoint(policy: Policy, found: Checkpoint, run_dir: Path) -> None:
    """Its weights, or their average where the run keeps one. Raises UserError where it is of another model."""
    began = found.state.get("began_from", {}).get("policy", {}).get("the base model")
    if began not in (None, policy.about.get("weights")):
        raise UserError(f"model {policy.source!r} has other weights than the run {run_dir} began with")
    weights, copies = found.tensors["policy"], found.tensors.get("copies", {})
    for name, parameter in policy.trainable().items():
        parameter.copy_(copies.get(f"average/{name}", weights[name]).to(parameter.device))


def export_checkpoint(run_dir: Path, config: TrainConfig, step: int | None, out: Path) -> int:
    """Write the weights of a run's checkpoint, the newest one or that of a step, as ``Policy.export`` does: their average,
    where the run keeps one. Returns the step.

    Raises:
        UserError: there is no such checkpoint, it is corrupted, or it is of another model.
    """
    found = _find_checkpoint(run_dir, step)
    known = not config.prompts.startswith("<")  # else they were handed over in Python
    example = load_prompts(config.prompts, config.max_broken_prompts)[0] if known else None
    settings = {field.name: getattr(config.policy, field.name) for field in fields(config.policy)}
    policy = load_policy(
        config.model, **settings, seed=config.seed, sampling=config.sampling, example=example, model_config=config.model_config
    )
    _put_checkpoint(policy, found, run_dir)
    policy.export(out)
    return found.step


def put_export(pipeline: Any, export: Path, name: str) -> None:
    """What a run exported into its model: a LoRA, merged; or a folder a network, with its weights or a LoRA for it.

    Raises:
        UserError: it could not be loaded.
    """
    if (export / LORA_WEIGHT_NAME_SAFE).is_file():
        _merge(pipeline, export / LORA_WEIGHT_NAME_SAFE, name)
        return
    folders = sorted({file.parent for file in export.glob("*/*.safetensors")})
    if not folders:
        raise UserError(f"the export of {name} holds no weights: {export}")
    for folder in folders:
        network = getattr(pipeline, folder.name)
        if (folder / "config.json").is_file():
            setattr(pipeline, folder.name, type(network).from_pretrained(folder).to(network.device))
            continue
        setattr(pipeline, folder.name, PeftModel.from_pretrained(network, folder).merge_and_unload())


def _merge(pipeline: Any, lora: Path, name: str) -> None:
    load_lora(pipeline, lora, name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
