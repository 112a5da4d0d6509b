"""``diffusionrl sample``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from diffusionrl.cli.parsing import quiet_libraries, settings_of, take
from diffusionrl.config import SamplingConfig
from diffusionrl.errors import UserError, require
from diffusionrl.paths import expand, is_there


@dataclass(frozen=True)
class SampleConfig:
    """Make images. With --search NAME, images that a reward likes better: see sample --search demon --help."""

    model: str = "emoji"
    """"emoji", a folder in diffusers' format, a hub id, a single .safetensors file, file.py:function, or a run folder (its
    model with what it learned)."""
    model_config: str | None = None
    """Of a single file: as in train."""
    lora: Path | None = None
    """As in evaluate."""
    prompts: tuple[str, ...] = ("a cat", "a dog", "a butterfly", "a doctor")
    """One image a prompt and seed; or a built-in set or one file of prompts, whose .jsonl lines may name images."""
    seeds: tuple[int, ...] = (0, 1)
    """The same seed makes the same image whatever else is asked for."""
    out: Path = Path("samples")
    """Folder for the images and grid.png; it must not exist."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """By default that of the run, or of the preset "emoji"."""

    def __post_init__(self) -> None:
        for what in ("prompts", "seeds"):
            require(len(getattr(self, what)) >= 1, f"{what} names none: give one or more")


def run(arguments: Sequence[str]) -> None:
    search_name, rest = take(list(arguments), "--search")
    if search_name is not None:
        from diffusionrl.cli import search  # whose dataclasses take their time, which --help has not

        search.run(search_name, rest)
        return
    if any(each.partition("=")[0] in ("--reward", "--held-out") or each.startswith("--search.") for each in arguments):
        raise UserError("a reward is looked for with --search best-of-n, demon or particles; evaluate scores a model as it is")
    sampling = settings_of(arguments).sampling
    config = tyro.cli(SampleConfig, default=SampleConfig(sampling=sampling), args=arguments, prog="diffusionrl sample")
    out = expand(config.out)
    if is_there(out):
        raise UserError(f"{out} exists: choose another --out")
    from diffusionrl.runs.places import check_model_name  # which imports NumPy

    check_model_name(config.model)
    quiet_libraries()
    from diffusionrl.sampling.samples import sample_images

    asked = (config.prompts, config.seeds, config.sampling, out)
    print(f"images: {sample_images(config.model, *asked, config.model_config, config.lora)}")
