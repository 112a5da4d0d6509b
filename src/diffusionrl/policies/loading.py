"""Models by name: the embedded one, a folder, or a hub id."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import hf_hub_download

from diffusionrl.errors import UserError
from diffusionrl.policies.stable_diffusion import StableDiffusionPolicy, check_pipeline_folder
from diffusionrl.runs.hub import cached_first, local_folder

EMBEDDED_MODEL = Path(__file__).parent.parent / "emoji" / "weights" / "pipeline"


def _folder(model: str) -> Path | None:
    """The local folder of a model, or None for a hub id."""
    return EMBEDDED_MODEL if model == "emoji" else local_folder(model)


def check_model(model: str) -> int:
    """Check a model without loading its weights; returns its image size in pixels.

    Raises:
        UserError: it is not there, or of an unsupported family; see ``check_pipeline_folder``.
    """
    folder = _folder(model)
    if folder is None:
        try:
            names = ("unet/config.json", "vae/config.json", "model_index.json")
            files = [cached_first(hf_hub_download, model, filename=name) for name in names]
        except (OSError, ValueError) as error:
            raise UserError(f"model {model!r} is no folder here, and the hub did not give it: {error}") from error
        folder = Path(files[-1]).parent
    return check_pipeline_folder(folder)


def load_pipeline(model: str) -> StableDiffusionPipeline:
    """The diffusers pipeline of "emoji", of a folder or of a hub id, in float32, safetensors only.

    Raises:
        UserError: see ``check_model``.
    """
    check_model(model)
    try:
        return cached_first(
            StableDiffusionPipeline.from_pretrained,
            str(_folder(model) or model),
            dtype=torch.float32,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model {model!r} could not be loaded: {error}") from error


def load_policy(
    model: str,
    training: str = "lora",
    lora_rank: int = 4,
    lora_targets: str = "attention",
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
) -> StableDiffusionPolicy:
    """A policy by name, folder or hub id; the arguments are those of ``PolicyConfig``.

    Raises:
        UserError: the model is not there or not of a supported family.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU here: use auto or cpu")
    return StableDiffusionPolicy(
        load_pipeline(model),
        lora_rank=lora_rank if training == "lora" else None,
        lora_targets=lora_targets,
        dtype=getattr(torch, dtype),
        device=device,
        seed=seed,
        source=model,
    )
