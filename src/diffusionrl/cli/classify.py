"""``diffusionrl classify``."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from diffusionrl.cli.parsing import quiet_libraries
from diffusionrl.config.judges import DiffusionClassifierConfig
from diffusionrl.errors import UserError, require
from diffusionrl.paths import expand, is_there

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_SHOWN = 3  # prompts on a line


@dataclass(frozen=True)
class ClassifyConfig(DiffusionClassifierConfig):
    """Which of some prompts fits an image best, by the errors that a diffusion model makes in denoising it; see
    docs/classify.md."""

    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files, or folders of them. Images are cropped and resized to what the model makes."""
    out: Path | None = None
    """A file for the log-probability of every prompt, a line of JSON an image; it must not exist."""


def run(arguments: Sequence[str]) -> None:
    config = tyro.cli(ClassifyConfig, args=arguments, prog="diffusionrl classify")
    files = [file for image in config.images for file in _files(expand(image))]
    require(len(files) >= 1, "name one image or more")
    require(len(config.prompts) >= 1, "name what to choose among: --prompts with two texts or more, or one set or file of them")
    config = replace(config, out=None if config.out is None else expand(config.out))
    if config.out is not None and is_there(config.out):
        raise UserError(f"{config.out} exists: choose another --out")
    from diffusionrl.data.prompts import prompts_given  # which imports NumPy
    from diffusionrl.runs.places import check_model_name

    prompts = {prompt.text: prompt for prompt in prompts_given(config.prompts)}
    require(len(prompts) >= 2, "one prompt alone has nothing to be compared with: name two or more with --prompts")
    check_model_name(config.model)
    quiet_libraries()
    from diffusionrl.data.media import open_image
    from diffusionrl.rewards.diffusion_classifier import load_classifier
    from diffusionrl.training.disk import cropped

    for file in files:
        open_image(file)  # a broken one is found now
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
    classifier = load_classifier(config, next(iter(prompts.values())))
    for file in files:
        image = cropped(open_image(file), classifier.policy.sample_shape)
        found = classifier.log_probabilities(image, list(prompts.values()))
        ranked = sorted(zip(found.tolist(), prompts, strict=True), key=lambda each: -each[0])
        best = [f"{text} {math.exp(value):.3f}" for value, text in ranked[:_SHOWN]]
        print(f"{file}  {'  '.join(best)}", flush=True)
        if config.out is not None:
            with config.out.open("a") as lines:
                lines.write(
                    json.dumps({"image": str(file), "log_probabilities": {text: value for value, text in ranked}}) + "\n"
                )


def _files(place: Path) -> list[Path]:
    """Raises UserError where there is no image."""
    if place.is_dir():
        found = sorted(file for file in place.iterdir() if file.suffix.lower() in _ENDINGS)
        require(len(found) >= 1, f"{place} holds no image ({', '.join(_ENDINGS)})")
        return found
    require(place.is_file(), f"there is no image {place}")
    return [place]
