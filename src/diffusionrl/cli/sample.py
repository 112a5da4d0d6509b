"""``diffusionrl sample``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from diffusionrl.cli.parsing import quiet_libraries, settings_of
from diffusionrl.config import SamplingConfig
from diffusionrl.errors import UserError


@dataclass(frozen=True)
class SampleConfig:
    """Make images."""

    model: str = "emoji"
    """"emoji", a folder in diffusers' format, a hub id, a single .safetensors file, or a run folder (its model with what it
    learned)."""
    model_config: str | None = None
    """Of a single file: as in train."""
    prompts: tuple[str, ...] = ("a cat", "a dog", "a butterfly", "a doctor")
    """One image a prompt and seed; or one file of prompts, whose .jsonl lines may name images."""
    seeds: tuple[int, ...] = (0, 1)
    """The same seed makes the same image whatever else is asked for."""
    out: Path = Path("samples")
    """Folder for the images and grid.png; it must not exist."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """By default that of the run, or of the preset "emoji"."""


def run(arguments: Sequence[str]) -> None:
    sampling = settings_of(arguments).sampling
    config = tyro.cli(SampleConfig, default=SampleConfig(sampling=sampling), args=arguments, prog="diffusionrl sample")
    if config.out.exists():
        raise UserError(f"{config.out} exists: choose another --out")
    quiet_libraries()
    from diffusionrl.sampling.samples import sample_images

    asked = (config.prompts, config.seeds, config.sampling, config.out)
    print(f"images: {sample_images(config.model, *asked, config.model_config)}")
