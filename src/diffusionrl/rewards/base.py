"""What a reward is: a function ``(images, prompts, metadata) -> scores``; how it is found, tried and checked."""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.errors import UserError

Reward = Callable[[Tensor, Sequence[str], Sequence[dict[str, Any]]], Any]
"""Called with images in [0, 1] (float32, (B, 3, H, W), on the CPU), B prompts and B metadata mappings; returns B numbers, or
``Scores``. It may have ``range``, (lowest, highest): a score outside is invalid; and ``counts``, a mapping of names to numbers,
which is logged with the step's metrics. With ``whole_groups = True`` it is called with all the samples of one prompt slot of
the step (or of the evaluation) at once, B equal prompts, and with nothing else. With ``differentiable = True`` it carries a
gradient from the images to the scores, a tensor or ``Scores``; see ``differentiable``."""

REGISTRY: dict[str, Callable[[RewardsConfig], Reward]] = {}


def register(name: str) -> Callable[[Callable[[RewardsConfig], Reward]], Callable[[RewardsConfig], Reward]]:
    """Make a reward known by name: the function that builds it from the configuration."""

    def keep(factory: Callable[[RewardsConfig], Reward]) -> Callable[[RewardsConfig], Reward]:
        REGISTRY[name] = factory
        return factory

    return keep


def differentiable(reward: Reward) -> Reward:
    """Declare that a reward has a gradient: what it returns carries one where the images do. Updates call it too, in the main
    thread, with a few images at a time."""
    reward.differentiable = True  # type: ignore[attr-defined]
    return reward


def is_differentiable(reward: Reward) -> bool:
    """Whether a reward declares a gradient."""
    return bool(getattr(reward, "differentiable", False))


@dataclass(frozen=True)
class Scores:
    """One score a sample, and whether it is one: a failed reward is not a zero.

    Attributes:
        values: float32, (B,); meaningless where invalid.
        valid: bool, (B,).
        error: why samples are invalid, for the user.
        parts: of a mixture, what each of its rewards gave, float32, (B,), NaN where invalid.
    """

    values: Tensor
    valid: Tensor
    error: str | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def join(scores: Sequence["Scores"]) -> "Scores":
        errors = [each.error for each in scores if each.error]
        values, valid = torch.cat([each.values for each in scores]), torch.cat([each.valid for each in scores])
        parts = {name: torch.cat([each.parts[name] for each in scores]) for name in scores[0].parts}
        return Scores(values, valid, errors[-1] if errors else None, parts)


class NothingSeen(UserError):
    """Raised by a reward that sees nothing on the images that it could score: all are invalid, through no fault of its own."""


def find_function(kind: str, name: str, signature: str) -> Callable[..., Any]:
    """``package.module:function``, looked up from the working directory too; ``kind`` and ``signature`` are for messages.

    Raises:
        UserError: it does not import, or is no function.
    """
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # whatever the user's module raises is the answer
        raise UserError(f"{kind} {name!r} does not import: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"{kind} {name!r} is a {type(found).__name__}, not a function {signature}")
    return found


def score(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
    """Call a reward. Whatever is wrong with it or with a score makes samples invalid: what it raises, another number of scores
    than of samples, something that is no number, NaN, infinity, a score out of its range."""
    try:
        with torch.no_grad():
            returned = reward(images, prompts, metadata)
        return as_scores(returned, prompts, getattr(reward, "range", (-math.inf, math.inf)))
    except Exception as error:  # a reward may fail in any way; the run decides how much failure it takes
        nothing = torch.zeros(len(images))
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return Scores(nothing, nothing.bool(), said)


def score_groups(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]], size: int
) -> Scores:
    """``score`` of one group of ``size`` samples in a row after the other."""
    groups = [slice(first, first + size) for first in range(0, len(images), size)]
    return Scores.join([score(reward, images[group], prompts[group], metadata[group]) for group in groups])


def looks_at_groups(reward: Reward) -> bool:
    """Whether a reward has to see all the samples of a prompt together."""
    return bool(getattr(reward, "whole_groups", False))


def as_scores(returned: Any, prompts: Sequence[str], limits: tuple[float, float]) -> Scores:
    """What a reward returned, checked; its gradient is kept. Raises UserError where it is not a number for each of the
    prompts."""
    said = returned if isinstance(returned, Scores) else None
    values = _as_floats(said.values if said else returned, len(prompts))
    answered = values.isfinite() & (said.valid if said else True)
    valid = answered & (values >= limits[0]) & (values <= limits[1])
    error = said.error if said else None
    if not valid.all() and error is None:
        first = int((~valid).nonzero()[0])
        outside = f", outside its range of {limits[0]:g} to {limits[1]:g}" if answered[first] else ""
        error = f"it returned {values[first].item():g} for {prompts[first]!r}{outside}"
    return Scores(values.nan_to_num(0.0, 0.0, 0.0), valid, error)


def _as_floats(returned: Any, count: int) -> Tensor:
    contract = f"a reward returns one number a sample, here {count}; it returned {_describe(returned)}"
    try:
        if not isinstance(returned, Tensor):
            returned = torch.tensor([float("nan") if value is None else float(value) for value in returned])
        values = returned.cpu().float()
    except (TypeError, ValueError) as error:
        raise UserError(f"{contract} ({error})") from error
    if values.shape != (count,):
        raise UserError(contract)
    return values


def _describe(returned: Any) -> str:
    shape = f" of shape {tuple(returned.shape)}" if hasattr(returned, "shape") else ""
    length = f" of length {len(returned)}" if not shape and hasattr(returned, "__len__") else ""
    return f"a {type(returned).__name__}{shape}{length}"


def grey(sample_shape: tuple[int, ...]) -> Tensor:
    """A sample that shows nothing: grey, or silent."""
    return torch.full(sample_shape, 0.5 if len(sample_shape) > 2 else 0.0)


def describe_grey(sample_shape: tuple[int, ...]) -> str:
    *before, height, width = sample_shape
    if len(before) == 0:
        return f"silent sounds of {width} values"
    return f"grey {height} x {width} images" if len(before) == 1 else f"grey clips of {before[0]} {height} x {width} frames"


def try_reward(
    reward: Reward, sample_shape: tuple[int, ...], prompts: Sequence[str], metadata: Sequence[dict[str, Any]], count: int = 2
) -> Scores:
    """Score two grey images (clips, silent sounds), or ``count``, before anything slow starts, so that a reward that cannot
    work is found now. Prompts come in turn. Returns the scores.

    Raises:
        UserError: the reward raised, said what stops it, or returned something else than ``count`` numbers. Invalid numbers
            alone pass, and ``NothingSeen``: there may be nothing to see on a grey image.
    """
    images, several = grey(sample_shape).expand(count, *sample_shape).clone(), "two" if count == 2 else count
    tried = f"the reward failed on {several} {describe_grey(sample_shape)}"
    try:
        returned = reward(images, (list(prompts) * count)[:count], (list(metadata) * count)[:count])
    except NothingSeen as nothing:
        return Scores(torch.zeros(count), torch.zeros(count, dtype=torch.bool), str(nothing))
    except Exception as error:  # whatever it raises is the answer
        raise UserError(f"{tried}: {type(error).__name__}: {error}") from error
    scores = as_scores(returned, [""] * count, (-math.inf, math.inf))
    if isinstance(returned, Scores) and not scores.valid.any():
        raise UserError(f"{tried}: {scores.error}")
    return scores
