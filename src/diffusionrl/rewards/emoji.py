"""What the embedded world knows for sure about an image: who is in it, and how beautiful it is by the gold rule.

Meant to be held out (``--evaluation.held-out emoji-judge emoji-gold``): they say whether a reward still means what it meant.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffusionrl.emoji.aesthetics import gold_rating
from diffusionrl.emoji.classifier import load_classifier, name_subjects
from diffusionrl.emoji.vocabulary import with_article
from diffusionrl.reward_config import RewardsConfig
from diffusionrl.rewards.base import Reward, register


@register("emoji-judge")
def judge(config: RewardsConfig) -> Reward:
    """1 where the classifier names the subject that the prompt begins with, else 0."""
    classifier = load_classifier()

    def judge(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        named = name_subjects(classifier, images)
        return [float(f"{prompt} ".startswith(f"{with_article(name)} ")) for name, prompt in zip(named, prompts, strict=True)]

    return judge


@register("emoji-gold")
def gold(config: RewardsConfig) -> Reward:
    """The gold rule's rating, 1 to 10, which the embedded aesthetic head was fitted to."""

    def gold(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return gold_rating(images)

    return gold
