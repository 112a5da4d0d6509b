"""Rewards that are differentiated: which ones can be, and whether they keep their word."""

from collections.abc import Sequence
from typing import Any

import torch

from diffusionrl.config.rewards import DIFFERENTIABLE_REWARDS
from diffusionrl.errors import UserError
from diffusionrl.rewards.base import Scores, grey, is_differentiable
from diffusionrl.rewards.mixture import Mixture

AGREEMENT = 1e-3
"""A score and the same score with gradient differ by no more, relative to the larger of it and 1: the two are one call."""


def require_gradient(mixture: Mixture, algorithm: str) -> None:
    """Raises UserError unless every reward can be differentiated, one image at a time."""
    without = [name for name, reward in mixture.rewards.items() if not is_differentiable(reward)]
    if without:
        raise UserError(
            f"algorithm {algorithm} follows the reward's gradient, and {', '.join(without)} has none: choose among "
            f"{', '.join(DIFFERENTIABLE_REWARDS)}, or a torch function of your own with the attribute differentiable = True; "
            "for other rewards choose another algorithm (ddpo, nft ...)"
        )
    if mixture.grouped:
        raise UserError(
            f"algorithm {algorithm} follows the reward's gradient sample by sample, and {', '.join(mixture.grouped)} looks at "
            "whole groups: choose another algorithm (ddpo, nft ...)"
        )


def try_gradient(
    mixture: Mixture, sample_shape: tuple[int, ...], prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> None:
    """Differentiate the scores of grey samples, one a prompt.

    Raises:
        UserError: a reward raises, its scores have no gradient or one that is not finite, or they are not those that it gives
            without. Samples that are invalid without a gradient are passed over.
    """
    samples = grey(sample_shape).repeat(len(prompts), *[1] * len(sample_shape))
    for name, reward in mixture.rewards.items():
        alone, told = Mixture({name: reward}), f"the reward {name} declares a gradient (differentiable = True)"
        plain = alone.score(samples, prompts, metadata)
        if not plain.valid.any():
            continue
        images = samples.clone().requires_grad_()
        try:
            with torch.enable_grad():
                scores = alone.differentiate(images, prompts, metadata)
        except Exception as error:  # whatever it raises is the answer
            raise UserError(f"{told}, and cannot be called with one: {type(error).__name__}: {error}") from error
        if not scores.values.requires_grad:
            raise UserError(f"{told}, and its scores carry none: something detaches them, or they are no tensor")
        (gradient,) = torch.autograd.grad(scores.values.sum(), images, allow_unused=True)
        if gradient is None or not gradient.isfinite().all():
            found = "none reaches the images" if gradient is None else "it is not finite on a grey image"
            raise UserError(f"{told}, and {found}")
        _compare(plain, scores, told)


def _compare(plain: Scores, scores: Scores, told: str) -> None:
    gap = (scores.values.detach() - plain.values).abs() / plain.values.abs().clamp(min=1)
    if not (gap[plain.valid] <= AGREEMENT).all():
        raise UserError(
            f"{told}, and scores the same images {plain.values.tolist()} without and {scores.values.tolist()} with it"
        )
