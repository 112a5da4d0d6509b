"""What the embedded world says of an image: who is in it, how beautiful it is by the gold rule, and how near to a scene.

Meant to be held out (``--evaluation.held-out emoji-judge emoji-scene``). On images that are no longer of this world the gold
rule alone can rise. ``emoji-scene`` is a product, which fell in all runs on noise of benchmarks/gold.py:

- the rule, (rating - 1) / 9;
- the share of what the prompt asks for that is where it belongs, by template matching (``emoji-template`` alone);
- nearness to the nearest scene that is asked for, 1 - distance / 0.2 and at least 0. The distance is the root mean squared
  error; a scene of one subject is at 0.21 from the nearest one of another (median of 40).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.emoji.aesthetics import gold_rating
from diffusionrl.emoji.classifier import CLASSES, load_classifier, name_subjects
from diffusionrl.emoji.scenes import IMAGE_SIZE
from diffusionrl.emoji.templates import match
from diffusionrl.emoji.vocabulary import with_article
from diffusionrl.errors import require
from diffusionrl.rewards.base import Reward, Scores, register

FAR = 0.2
_SUBJECTS = {with_article(name): name for name in CLASSES}


@register("emoji-judge")
def judge(config: RewardsConfig) -> Reward:
    """1 where the classifier names the subject that the prompt begins with, else 0; invalid where it begins with no subject
    that the classifier knows."""
    classifier = load_classifier()

    def judge(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        asked = [_SUBJECTS.get(" ".join(prompt.split(" ", 2)[:2])) for prompt in prompts]
        pairs = zip(name_subjects(classifier, images), asked, strict=True)
        values = torch.tensor([math.nan if subject is None else float(named == subject) for named, subject in pairs])
        unknown = [prompt for prompt, subject in zip(prompts, asked, strict=True) if subject is None]
        error = f"{unknown[-1]!r} begins with no animal or thing that the embedded classifier knows" if unknown else None
        return Scores(values, values.isfinite(), error)

    return judge


@register("emoji-gold")
def gold(config: RewardsConfig) -> Reward:
    """The gold rule's rating, 1 to 10, which the embedded aesthetic head was fitted to."""

    def gold(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return gold_rating(images)

    return gold


def template(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
    """The share of the sprites that a prompt asks for that are where it puts them; invalid where it is no caption of the
    world."""
    return _scores(_match(images, prompts)[0], prompts)


def scene(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
    """The gold rule times that share times nearness."""
    shares, distances = _match(images, prompts)
    return _scores((gold_rating(images) - 1) / 9 * shares * (1 - distances / FAR).clamp(min=0), prompts)


def _match(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    size = tuple(images.shape[-2:])
    require(
        size == (IMAGE_SIZE, IMAGE_SIZE),
        f"scenes of the embedded world are {IMAGE_SIZE} x {IMAGE_SIZE} pixels, and these images {size[0]} x {size[1]}",
    )
    return match(images, prompts)


def _scores(values: Tensor, prompts: Sequence[str]) -> Scores:
    unknown = [prompt for prompt, value in zip(prompts, values.tolist(), strict=True) if math.isnan(value)]
    error = f"{unknown[-1]!r} is no caption of the embedded world: docs/embedded_world.md" if unknown else None
    return Scores(values, values.isfinite(), error)


template.range = scene.range = (0.0, 1.0)  # type: ignore[attr-defined]
register("emoji-template")(lambda config: template)
register("emoji-scene")(lambda config: scene)
