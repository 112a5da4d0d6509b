"""Several rewards as one: the sum of weight * score, each score as it is or normalised.

A normalised score is (score - mean) / std with the statistics of the evaluation before training, so that it means the same from
the first step to the last and in every evaluation.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.errors import UserError, one_of
from diffusionrl.foreign.finding import code_of
from diffusionrl.foreign.thread import within
from diffusionrl.rewards.base import (
    Reward,
    Scores,
    are_whole,
    as_scores,
    attribute_of,
    broken_image,
    counts_of,
    innermost,
    looks_at_groups,
    name_of,
    score,
    score_groups,
    try_reward,
)
from diffusionrl.rewards.cache import AnswerCache, CachedReward
from diffusionrl.rewards.loading import load_reward

_ROUNDING = 1e-3  # relative, of a score: networks in low precision may round by the place in a batch


class Mixture:
    """A weighted sum of rewards; a sample without a valid score from each of them is invalid.

    Args:
        rewards: by the name under which each is logged.
        weights: by the same names, finite; 1 where left out.

    Attributes:
        grouped: names of the rewards that look at whole groups, the samples of one prompt together.
        tried: what each reward that repeats itself gave the grey image on which it was tried (``try_mixture``).

    Raises:
        UserError: no reward, a weight that is not a finite number, or one of no reward.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float] | None = None) -> None:
        if not rewards:
            raise UserError("there is no reward: name at least one")
        self.rewards = dict(rewards)
        self.weights = dict.fromkeys(rewards, 1.0)
        for name, weight in (weights or {}).items():
            if name not in rewards:
                raise one_of("reward", name, rewards, "; each weight is by the name of its reward")
            self.weights[name] = _finite(name, weight)
        self.grouped = tuple(name for name, reward in self.rewards.items() if looks_at_groups(reward))
        self.statistics = dict.fromkeys(rewards, (0.0, 1.0))
        self.tried: dict[str, float] = {}
        self._counted_before: dict[str, float] = {}

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]], group_size: int = 1) -> Scores:
        """Call every reward (see ``rewards.base.score``): once; or, where it looks at groups, once for each, which are
        ``group_size`` samples in a row."""
        asked = (images, prompts, metadata)
        found = {
            name: score_groups(reward, *asked, group_size) if name in self.grouped else score(reward, *asked)
            for name, reward in self.rewards.items()
        }
        parts = {name: torch.where(scores.valid, scores.values, torch.nan) for name, scores in found.items()}
        errors = [f"{name}: {scores.error}" for name, scores in found.items() if scores.error]
        broken = broken_image(are_whole(images), prompts)  # through no fault of a reward
        return self._combine(parts, broken or (errors[-1] if errors else None))

    def differentiate(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        """The same scores with gradient, of rewards that have one; what a reward raises is raised."""
        parts, errors = {}, []
        for name, reward in self.rewards.items():
            scores = as_scores(reward(images, prompts, metadata), prompts, attribute_of(reward, "range", (-math.inf, math.inf)))
            parts[name] = torch.where(scores.valid, scores.values, torch.nan)
            errors += [f"{name}: {scores.error}"] if scores.error else []
        return self._combine(parts, errors[-1] if errors else None)

    def nothing(self, count: int, error: str) -> Scores:
        """No valid score for ``count`` samples."""
        return self._combine({name: torch.full((count,), torch.nan, dtype=torch.float64) for name in self.rewards}, error)

    def _combine(self, parts: dict[str, Tensor], error: str | None) -> Scores:
        values = torch.zeros_like(next(iter(parts.values())))
        for name, part in parts.items():
            mean, std = self.statistics[name]
            values = values + self.weights[name] * (part - mean) / std
        valid = values.isfinite()
        return Scores(values.nan_to_num(0.0, 0.0, 0.0), valid, error, parts)

    def require_groups(self, size: int, size_setting: str, count: int, count_setting: str) -> None:
        """``count`` samples in groups of ``size`` have to be something that each reward can look at.

        Raises:
            UserError: a reward looks at groups, and they are of one sample, or the last one is not whole; the message says
                which settings to change.
        """
        for name in self.grouped:
            told = f"the reward {name} looks at all the samples of a prompt together"
            if size < 2:
                raise UserError(f"{told}: set {size_setting} to 2 or more, not {size}")
            if count % size:
                near = max(size, count - count % size)
                raise UserError(f"{told}: {count_setting} must be a multiple of {size_setting}, {near} say, not {count}")

    def calibrate(self, scores: Scores) -> Scores:
        """Normalise by these scores from now on; returns them normalised.

        Raises:
            UserError: a reward scored them all alike.
        """
        for name, part in scores.parts.items():
            values = part[part.isfinite()].double()
            std = values.std(correction=0).item() if len(values) > 1 else 0.0
            if len(values) == 0:
                raise UserError(f"no sample has a valid score to normalise by; the reward's last error: {scores.error}")
            if not std > 0:
                raise UserError(f"the reward {name} gave all {len(values)} samples the same score: it cannot be normalised")
            self.statistics[name] = (values.mean().item(), std)
        return self._combine(scores.parts, scores.error)

    def code(self) -> dict[str, dict[str, str | None]]:
        """``code_of`` each reward that is not this package's own."""
        inner = {name: innermost(reward) for name, reward in self.rewards.items()}
        return {name: code_of(reward) for name, reward in inner.items() if not name_of(reward).startswith("diffusionrl.")}

    def counts(self) -> dict[str, float]:
        """What the rewards have counted since the run began, "NAME/WHAT" -> number."""
        return {what: count + self._counted_before.get(what, 0) for what, count in self._counted_here().items()}

    def go_on_counting(self, counts: dict[str, float]) -> None:
        """From these numbers, whatever has been counted in this process so far."""
        here = self._counted_here()
        self._counted_before = {what: count - here.get(what, 0) for what, count in counts.items()}

    def _counted_here(self) -> dict[str, float]:
        return {f"{name}/{what}": count for name, reward in self.rewards.items() for what, count in counts_of(reward).items()}


def as_mixture(reward: Reward | Mixture) -> Mixture:
    """A reward alone, as a mixture of one."""
    return reward if isinstance(reward, Mixture) else Mixture({name_of(reward): reward})


def _finite(name: str, weight: float | str) -> float:
    """Raises UserError unless a reward's weight is a finite number."""
    try:
        value = float(weight)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"reward {name!r}: the weight {weight!r} is not a finite number")
    return value


def load_mixture(names: Sequence[str], config: RewardsConfig | None = None) -> Mixture:
    """The rewards of ``NAME`` or ``NAME=WEIGHT`` each.

    Raises:
        UserError: see ``load_reward``; or a weight that is no finite number, or a name twice.
    """
    rewards: dict[str, Reward] = {}
    weights = {}
    for entry in names:
        name, equals, weight = entry.partition("=")
        if name in rewards:
            raise UserError(f"reward {name!r} is named twice")
        weights[name] = _finite(name, weight) if equals else 1.0
        rewards[name] = load_reward(name, config)
    if config is not None and config.cache is not None:
        cache = AnswerCache(config.cache.expanduser())
        for name, reward in rewards.items():
            if not looks_at_groups(reward):
                rewards[name] = CachedReward(reward, name, config, cache)
    return Mixture(rewards, weights)


def try_mixture(
    mixture: Mixture,
    sample_shape: tuple[int, ...],
    prompts: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    group_sizes: Sequence[int] = (),
    timeout: float = 600.0,
) -> list[str]:
    """``try_reward`` for each in the thread of foreign code, with a group of every size that it will be called with where it
    looks at groups; the error names the reward where there are several.

    Args:
        prompts: one or two; where a reward does not look at groups, the first one's image is scored twice.
        timeout: seconds for all of it.

    Returns:
        Names of the rewards that did not give the same image the same score.

    Raises:
        UserError: a reward cannot score, or not in time.
    """
    unsteady: list[str] = []
    if not within(timeout, lambda: unsteady.extend(_try(mixture, sample_shape, prompts, metadata, group_sizes))):
        seconds = f"{timeout:g} s (rewards.timeout)"
        raise UserError(f"the reward gave no scores for a few grey images within {seconds}: {', '.join(mixture.rewards)}")
    return unsteady


def _try(
    mixture: Mixture,
    sample_shape: tuple[int, ...],
    prompts: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    group_sizes: Sequence[int],
) -> list[str]:
    """What ``try_mixture`` does."""
    unsteady = []
    for name, reward in mixture.rewards.items():
        try:
            if name not in mixture.grouped:
                found = try_reward(reward, sample_shape, prompts, metadata, 1 + len(prompts))
                first, again = found.values[[0, -1]].tolist()
                if found.valid[[0, -1]].all() and math.isclose(first, again, rel_tol=_ROUNDING):
                    mixture.tried[name] = first
                elif found.valid[[0, -1]].all():
                    unsteady.append(name)
                continue
            for size in dict.fromkeys(group_sizes):
                try_reward(reward, sample_shape, prompts[:1], metadata[:1], size)
        except UserError as error:
            raise UserError(f"{name}: {error}" if len(mixture.rewards) > 1 else str(error)) from error
    return unsteady
