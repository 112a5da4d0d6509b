"""A model with what was trained on it: a LoRA, or what a run exported."""

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE

from diffusionrl.errors import UserError
from diffusionrl.policies.loading import check_model, load_pipeline
from diffusionrl.policies.stable_diffusion import StableDiffusionPolicy


@dataclass(frozen=True)
class Trained:
    """A model and what was trained on it, found but not loaded.

    Attributes:
        name: what it was asked for as.
        base: "emoji", a folder or a hub id.
        image_size: in pixels.
        lora: a safetensors file.
        unet: a folder that takes the place of the base's.
    """

    name: str
    base: str
    image_size: int
    lora: Path | None = None
    unet: Path | None = None


def find_trained(model: str, lora: Path | None = None) -> Trained:
    """A model as it is; with a LoRA (a safetensors file, or a folder that holds one as diffusers names it); or a run folder:
    the run's model with what the run exported.

    Raises:
        UserError: no such model, LoRA or run.
    """
    run_dir = Path(model)
    if (run_dir / "config.yaml").is_file():
        if lora is not None:
            raise UserError(f"{model} is a run, which has learned something itself: give the LoRA's base model, or no LoRA")
        base, export = yaml.safe_load((run_dir / "config.yaml").read_text())["model"], run_dir / "export"
        image_size = check_model(base)
        if (export / "unet").is_dir():
            return Trained(model, base, image_size, unet=export / "unet")
        if (export / LORA_WEIGHT_NAME_SAFE).is_file():
            return Trained(model, base, image_size, lora=export / LORA_WEIGHT_NAME_SAFE)
        raise UserError(f"{run_dir} is a run folder without an export: it has not trained yet")
    image_size = check_model(model)
    if lora is None:
        return Trained(model, model, image_size)
    file = lora / LORA_WEIGHT_NAME_SAFE if lora.is_dir() else lora
    if not file.is_file() or file.suffix != ".safetensors":
        raise UserError(f"LoRA {lora} was not found: give a .safetensors file, or a folder with {LORA_WEIGHT_NAME_SAFE} in it")
    return Trained(f"{model} with {lora.name}", model, image_size, lora=file)


def load_trained(model: str, lora: Path | None = None) -> StableDiffusionPolicy:
    """What ``find_trained`` finds, as a policy; a LoRA is merged into the weights.

    Raises:
        UserError: it is not there, it could not be loaded, or the LoRA is of another model.
    """
    found = find_trained(model, lora)
    pipeline = load_pipeline(found.base)
    if found.unet is not None:
        pipeline.unet = type(pipeline.unet).from_pretrained(found.unet)
    if found.lora is not None:
        _merge(pipeline, found.lora, found.name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return StableDiffusionPolicy(pipeline, lora_rank=None, device=device, source=found.name)


def _merge(pipeline: StableDiffusionPipeline, lora: Path, name: str) -> None:
    try:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name, use_safetensors=True)
    except Exception as error:  # diffusers and peft raise whatever they come across in a file that is no LoRA of this model
        raise UserError(f"the LoRA of {name} could not be loaded: {type(error).__name__}: {error}") from error
    if not pipeline.get_active_adapters():
        raise UserError(f"{lora} holds nothing for the UNet of {name}: is it a LoRA of another model?")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
