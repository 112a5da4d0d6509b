"""What a reward is: a function ``(images, prompts, metadata) -> scores``; how it is tried and checked."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from numbers import Complex, Real
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.errors import UserError, clean, describe, require
from diffusionrl.foreign import surroundings
from diffusionrl.foreign.thread import anything

T = TypeVar("T")

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
    return attribute_of(reward, "differentiable", False) is True


@dataclass(frozen=True)
class Scores:
    """One score a sample, and whether it is one: a failed reward is not a zero.

    Attributes:
        values: float64, (B,); meaningless where invalid.
        valid: bool, (B,).
        error: why samples are invalid, for the user.
        parts: of a mixture, what each of its rewards gave, float64, (B,), NaN where invalid.
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


class NoScores(UserError):
    """What a reward returned is not a number for each sample."""


def score(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
    """Call a reward. Whatever is wrong with it or with a score makes samples invalid: what it raises, another number of scores
    than of samples, something that is no number, NaN, infinity, a score out of its range. An image that is not finite is
    invalid, and no reward sees it; nor the rest of its group, where it looks at groups."""
    whole = are_whole(images)
    if not whole.all():
        rows = [] if looks_at_groups(reward) else whole.nonzero().flatten().tolist()
        nothing = _nothing(len(images), broken_image(whole, prompts))
        if not rows:
            return nothing
        found = score(reward, images[rows], [prompts[row] for row in rows], [metadata[row] for row in rows])
        nothing.values[rows], nothing.valid[rows] = found.values, found.valid
        return nothing
    limits = attribute_of(reward, "range", (-math.inf, math.inf))
    changed: list[str] = []
    try:
        found = _call(reward, images, prompts, metadata, changed, lambda returned: as_scores(returned, prompts, limits))
    except anything() as error:  # a reward may fail in any way; the run decides how much failure it takes
        found = _nothing(len(images), describe(error))
    meddled = surroundings.meddling(name_of(reward), changed)
    return _nothing(len(images), meddled) if meddled else found


def _call(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    changed: list[str],
    read: Callable[[Any], T],
) -> T:
    """What is read in a reward's answer. It gets copies: what it writes to is its own. Adds to ``changed`` what it changed of
    the process (see ``surroundings.kept``); reading may run foreign code too."""
    with surroundings.kept(name_of(reward), changed), torch.no_grad():
        answer = reward(images.clone(), list(prompts), [copy.deepcopy(each) for each in metadata])
        with torch.device("cpu"):
            return read(answer)


def _nothing(count: int, error: str | None) -> Scores:
    values = torch.zeros(count, dtype=torch.float64)
    return Scores(values, values != 0, error)


def are_whole(images: Tensor) -> Tensor:
    """Which images (clips, sounds) are finite all over, bool, (B,)."""
    return images.flatten(1).isfinite().all(1)


def broken_image(whole: Tensor, prompts: Sequence[str]) -> str | None:
    """What is wrong where some are not."""
    broken = (~whole).nonzero().flatten().tolist()
    if not broken:
        return None
    first = prompts[broken[0]]
    return clean(f"{len(broken)} of {len(whole)} images that the model made are not finite, the first for {first!r}")


def name_of(reward: Reward) -> str:
    """``package.module:function`` of a function or object."""
    kind = type(reward)
    module, name = attribute_of(reward, "__module__", kind.__module__), attribute_of(reward, "__qualname__", kind.__name__)
    return clean(f"{module}:{name}")


def innermost(reward: Reward) -> Reward:
    """What those of ours that are around another reward are around."""
    while name_of(reward).startswith("diffusionrl.") and "reward" in getattr(reward, "__dict__", {}):
        reward = reward.reward  # type: ignore[attr-defined]
    return reward


def attribute_of(reward: Reward, name: str, default: Any) -> Any:
    """What a reward says of itself; the default where it says nothing, or fails to."""
    try:
        return getattr(reward, name, default)
    except Exception:  # it may compute it
        return default


def score_groups(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]], size: int
) -> Scores:
    """``score`` of one group of ``size`` samples in a row after the other."""
    groups = [slice(first, first + size) for first in range(0, len(images), size)]
    return Scores.join([score(reward, images[group], prompts[group], metadata[group]) for group in groups])


def looks_at_groups(reward: Reward) -> bool:
    """Whether a reward has to see all the samples of a prompt together."""
    return attribute_of(reward, "whole_groups", False) is True


def counts_of(reward: Reward) -> dict[str, float]:
    """What a reward has counted; nothing where its ``counts`` are no names and numbers."""
    try:
        counts = dict(attribute_of(reward, "counts", {}))  # at once: its thread may be adding to them
        return {clean(name): count for name, count in counts.items() if isinstance(count, int | float) and math.isfinite(count)}
    except Exception:  # of whatever kind it is
        return {}


def as_scores(returned: Any, prompts: Sequence[str], limits: tuple[float, float]) -> Scores:
    """What a reward returned, checked; its gradient is kept. Raises NoScores where it is not a number for each prompt."""
    said = returned if isinstance(returned, Scores) else None
    values = _as_floats(said.values if said else returned, len(prompts))
    answered = values.float().isfinite()  # what float32 cannot hold is taken for infinite
    if said is not None:
        answered &= _as_floats(said.valid, len(prompts)) == 1
    valid = answered & (values >= limits[0]) & (values <= limits[1])
    error = said.error if said else None
    if not valid.all() and error is None:
        first = int((~valid).nonzero()[0])
        outside = f", outside its range of {limits[0]:g} to {limits[1]:g}" if answered[first] else ""
        error = f"it returned {values[first].item():g} for {prompts[first]!r}{outside}"
    return Scores(torch.where(valid, values, 0.0), valid, None if error is None else clean(error))


def _as_floats(returned: Any, count: int) -> Tensor:
    """float64, (count,). Raises NoScores where it is anything else than a list, an array or a tensor of so many real numbers;
    None is NaN."""
    contract = f"a reward returns one number a sample, here {count}; it returned {_describe(returned)}"
    try:
        if isinstance(returned, Iterator):
            returned = list(islice(returned, count + 1))
        if not isinstance(returned, list | tuple | Tensor) and hasattr(returned, "__array__"):
            returned = np.asarray(returned)
        if isinstance(returned, np.ndarray) and returned.dtype.kind in "biuf":
            returned = torch.from_numpy(returned.astype(np.float64))
        if isinstance(returned, Tensor):
            require(not returned.is_complex(), "complex numbers")
            values = returned.to_dense().cpu().double()
        else:
            require(isinstance(returned, list | tuple | np.ndarray), "no list, array or tensor")
            values = torch.tensor([_as_float(value) for value in returned], dtype=torch.float64)
    except Exception as error:  # whatever reading it raises is the answer
        raise NoScores(f"{contract} ({describe(error)})") from error
    if values.shape != (count,):
        raise NoScores(contract)
    return values


def _as_float(value: Any) -> float:
    """Raises UserError, or whatever the value raises, where it is no real number."""
    if value is None:
        return math.nan
    complex_number = isinstance(value, Complex) and not isinstance(value, Real)
    require(not complex_number and hasattr(type(value), "__float__"), f"{type(value).__name__} is no real number")
    try:
        return float(value)
    except OverflowError:  # of whole numbers
        return math.inf


def _describe(returned: Any) -> str:
    shape = f" of shape {tuple(returned.shape)}" if isinstance(returned, Tensor | np.ndarray) else ""
    length = f" of length {len(returned)}" if isinstance(returned, list | tuple | dict | set | str) else ""
    return f"a {type(returned).__name__}{shape}{length}"


def grey(sample_shape: tuple[int, ...]) -> Tensor:
    """A sample that shows nothing: grey, or silent."""
    return torch.full(sample_shape, 0.5 if len(sample_shape) > 2 else 0.0)


def describe_grey(sample_shape: tuple[int, ...]) -> str:
    if len(sample_shape) not in (2, 3, 4):
        return f"samples of the shape {sample_shape}"
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
    texts, told = (list(prompts) * count)[:count], (list(metadata) * count)[:count]
    changed: list[str] = []

    def read(returned: Any) -> Scores:
        scores = as_scores(returned, [""] * count, (-math.inf, math.inf))
        if isinstance(returned, Scores) and not scores.valid.any():
            raise UserError(scores.error)
        return scores

    try:
        scores = _call(reward, images, texts, told, changed, read)
    except NothingSeen as nothing:
        return _nothing(count, describe(nothing))
    except NoScores:
        raise
    except anything() as error:  # whatever it raises is the answer
        ended = "" if isinstance(error, Exception) else "it tried to end the process, "
        raise UserError(f"{tried}: {ended}{describe(error)}") from error
    meddled = surroundings.meddling(name_of(reward), changed)
    surroundings.forget()
    require(meddled is None, f"the reward cannot be used: {meddled}")
    return scores
