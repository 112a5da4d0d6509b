"""Models by name: the embedded one, a folder, or a hub id."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import hf_hub_download

from diffusionrl.config import SamplingConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import UserError
from diffusionrl.policies.adapters import save_memory
from diffusionrl.policies.asking import check_class
from diffusionrl.policies.base import Policy
from diffusionrl.policies.pipeline import PipelinePolicy
from diffusionrl.policies.quantization import check_quantization, is_quantized, quantization_settings
from diffusionrl.policies.schedules import kind_of
from diffusionrl.policies.stable_diffusion import StableDiffusionPolicy, check_pipeline_folder
from diffusionrl.runs.hub import cached_first, local_folder

_WEIGHTS = Path(__file__).parent.parent / "emoji" / "weights"
EMBEDDED_MODEL = _WEIGHTS / "pipeline"
_EMBEDDED = {"emoji": EMBEDDED_MODEL, "emoji-flow": _WEIGHTS / "flow"}
_FAST = "StableDiffusionPipeline"  # which has a policy of its own


def _folder(model: str) -> Path | None:
    """The local folder of a model, or None for a hub id."""
    return _EMBEDDED.get(model) or local_folder(model)


def _file(model: str, name: str) -> Path:
    folder = _folder(model)
    if folder is not None:
        return folder / name
    try:
        return Path(cached_first(hf_hub_download, model, filename=name))
    except (OSError, ValueError) as error:
        raise UserError(f"model {model!r} is no folder here, and the hub did not give it: {error}") from error


def read_index(model: str) -> dict[str, Any]:
    """A model's ``model_index.json``. Raises UserError where there is none, or no pipeline in it."""
    index = _file(model, "model_index.json")
    if not index.is_file():
        raise UserError(f"{index.parent} is no diffusers pipeline: it has no model_index.json")
    try:
        found = json.loads(index.read_text())
        str(found["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} does not say what pipeline it is of: {type(error).__name__}: {error}") from error
    return dict(found)


def find_class(model: str) -> type:
    """The pipeline class of a model, one of diffusers' own.

    Raises:
        UserError: there is no such model, it is no pipeline, or its class is not in diffusers.
    """
    name = str(read_index(model)["_class_name"])
    found = getattr(diffusers, name, None)
    if not (inspect.isclass(found) and issubclass(found, diffusers.DiffusionPipeline)):
        raise UserError(
            f"model {model!r} is a {name}, and diffusers {diffusers.__version__} has no such pipeline: upgrade diffusers, or "
            "load it yourself and hand it over in Python"
        )
    return found


def check_model(model: str) -> tuple[int, ...] | None:
    """Check a model without loading its weights. Returns the shape of what it makes where its settings tell; None where it is
    known when it is loaded.

    Raises:
        UserError: it is not there, or cannot be asked what a policy is asked.
    """
    kind = find_class(model)
    if kind.__name__ == _FAST:
        for name in ("unet/config.json", "vae/config.json"):
            file = _file(model, name)
        return check_pipeline_folder(file.parent.parent)
    check_class(kind)
    file = _file(model, "scheduler/scheduler_config.json")
    try:
        settings = json.loads(file.read_text())
        kind_of(str(settings["_class_name"]), settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} does not say what scheduler it is of: {type(error).__name__}: {error}") from error
    return None


def load_pipeline(model: str, dtype: torch.dtype = torch.float32, quantization: str = "none") -> Any:
    """The diffusers pipeline of "emoji" or "emoji-flow", of a folder or of a hub id, safetensors only; autoencoders in float32.

    Args:
        quantization: of the denoising networks: see ``PolicyConfig``.

    Raises:
        UserError: see ``check_model``; or it could not be loaded.
    """
    check_model(model)
    kind = find_class(model)
    settings: dict[str, Any] = {"dtype": dtype if dtype == torch.float32 else {"default": dtype, "vae": torch.float32}}
    taken = inspect.signature(kind).parameters
    absent = [name for name, value in read_index(model).items() if value == [None, None] and name in taken]
    settings |= dict.fromkeys([*absent, *({"safety_checker"} & taken.keys())])
    if "requires_safety_checker" in taken:
        settings["requires_safety_checker"] = False
    settings |= quantization_settings(read_index(model), quantization, dtype)
    try:
        return cached_first(kind.from_pretrained, str(_folder(model) or model), use_safetensors=True, **settings)  # type: ignore[attr-defined]
    except Exception as error:  # diffusers and transformers raise whatever they come across in a folder
        raise UserError(f"model {model!r} could not be loaded: {type(error).__name__}: {error}") from error


def make_policy(
    pipeline: Any,
    sampling: SamplingConfig | None = None,
    example: Prompt | None = None,
    networks: tuple[str, ...] = (),
    **settings: Any,
) -> StableDiffusionPolicy | PipelinePolicy:
    """A pipeline as a policy: Stable Diffusion by its own road where nothing else is asked of it and it is not quantised, any
    other by calling it.

    Args:
        sampling: whose sizes and arguments its calls have.
        example: a prompt of the kind that will be asked.
        settings: of either policy.
    """
    sampling = sampling or SamplingConfig()
    plain = not (sampling.arguments or sampling.negative_prompt or networks or (example and example.media))
    if type(pipeline).__name__ == _FAST and plain and not is_quantized(pipeline.unet):
        return StableDiffusionPolicy(pipeline, **settings)
    return PipelinePolicy(
        pipeline,
        example,
        sampling.num_steps,
        sampling.guidance,
        sampling.arguments,
        sampling.negative_prompt,
        networks=networks,
        **settings,
    )


def load_policy(
    model: str,
    training: str = "lora",
    lora_rank: int = 4,
    lora_targets: tuple[str, ...] = ("attention",),
    networks: tuple[str, ...] = (),
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
    sampling: SamplingConfig | None = None,
    example: Prompt | None = None,
    gradient_checkpointing: bool = False,
    vae_slicing: bool = False,
    vae_tiling: bool = False,
    lora: Path | None = None,
    reference: str = "start",
    offload_text_encoders: bool = False,
    quantization: str = "none",
) -> Policy:
    """A policy by name, folder or hub id; the arguments are those of ``PolicyConfig`` and of ``make_policy``.

    Raises:
        UserError: the model is not there, or cannot be a policy.
    """
    precision: torch.dtype = getattr(torch, dtype)
    chosen = choose_device(device)
    check_quantization(quantization, chosen)
    pipeline = load_pipeline(model, precision, quantization)
    for wanted, switch in ((vae_slicing, "enable_slicing"), (vae_tiling, "enable_tiling")):
        if wanted:
            save_memory(getattr(pipeline, "vae", None), switch)
    return make_policy(
        pipeline,
        sampling,
        example,
        networks,
        lora_rank=lora_rank if training == "lora" else None,
        lora_targets=lora_targets,
        dtype=precision,
        device=chosen,
        seed=seed,
        source=model,
        gradient_checkpointing=gradient_checkpointing,
        lora=lora,
        reference=reference,
        offload_text_encoders=offload_text_encoders,
    )


def choose_device(device: str = "auto") -> str:
    """The one place that knows which devices there are. Raises UserError for one that is not here."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU here: use auto or cpu")
    return device
