"""What the embedded world says of an image: who is in it, and how beautiful it is by the gold rule.

Meant to be held out, both (``--evaluation.held-out emoji-judge emoji-gold``): on images that are no longer of this world the
rule alone can rise.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.emoji.aesthetics import gold_rating
from diffusionrl.emoji.classifier import CLASSES, load_classifier, name_subjects
from diffusionrl.emoji.vocabulary import with_article
from diffusionrl.rewards.base import Reward, Scores, register

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
