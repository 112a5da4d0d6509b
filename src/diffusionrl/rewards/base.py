"""What a reward is: a function ``(images, prompts, metadata) -> scores``; how it is found, tried and checked."""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusionrl.errors import UserError

Reward = Callable[[Tensor, Sequence[str], Sequence[dict[str, Any]]], Any]
"""Called with images in [0, 1] (float32, (B, 3, H, W), on the CPU), B prompts and B metadata mappings; returns B numbers."""

REGISTRY: dict[str, Reward] = {}


def register(name: str) -> Callable[[Reward], Reward]:
    """Make a reward known by name."""

    def keep(reward: Reward) -> Reward:
        REGISTRY[name] = reward
        return reward

    return keep


@dataclass(frozen=True)
class Scores:
    """One score a sample, and whether it is one: a failed reward is not a zero.

    Attributes:
        values: float32, (B,); meaningless where invalid.
        valid: bool, (B,).
        error: why samples are invalid, for the user.
    """

    values: Tensor
    valid: Tensor
    error: str | None = None

    @staticmethod
    def join(parts: Sequence["Scores"]) -> "Scores":
        errors = [part.error for part in parts if part.error]
        values, valid = torch.cat([part.values for part in parts]), torch.cat([part.valid for part in parts])
        return Scores(values, valid, errors[-1] if errors else None)


def load_reward(name: str) -> Reward:
    """A built-in reward by name, or ``package.module:function`` (looked up from the working directory too).

    Raises:
        UserError: no such reward, or it does not import.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(
            f"unknown reward {name!r}: built in are {', '.join(sorted(REGISTRY))}; your own is package.module:function"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        reward = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # whatever the user's module raises is the answer
        raise UserError(f"reward {name!r} does not import: {type(error).__name__}: {error}") from error
    if not callable(reward):
        raise UserError(f"reward {name!r} is a {type(reward).__name__}, not a function (images, prompts, metadata) -> scores")
    return reward


def score(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
    """Call a reward. What it raises, and scores that are missing, NaN or infinite, become invalid samples.

    Raises:
        UserError: it returned something else than one number a sample, which no later sample can mend.
    """
    try:
        with torch.no_grad():
            returned = reward(images, prompts, metadata)
    except Exception as error:  # a reward may fail in any way; the run decides how much failure it takes
        nothing = torch.zeros(len(images))
        return Scores(nothing, nothing.bool(), f"{type(error).__name__}: {error}")
    values = _as_floats(returned, len(images))
    valid = values.isfinite()
    if valid.all():
        return Scores(values, valid)
    first = int((~valid).nonzero()[0])
    return Scores(values.nan_to_num(0.0, 0.0, 0.0), valid, f"it returned {values[first].item()} for {prompts[first]!r}")


def _as_floats(returned: Any, count: int) -> Tensor:
    contract = f"a reward returns one number a sample, here {count}; it returned {_describe(returned)}"
    try:
        if not isinstance(returned, Tensor):
            returned = torch.tensor([float("nan") if value is None else float(value) for value in returned])
        values = returned.detach().cpu().float()
    except (TypeError, ValueError) as error:
        raise UserError(f"{contract} ({error})") from error
    if values.shape != (count,):
        raise UserError(contract)
    return values


def _describe(returned: Any) -> str:
    shape = f" of shape {tuple(returned.shape)}" if hasattr(returned, "shape") else ""
    length = f" of length {len(returned)}" if not shape and hasattr(returned, "__len__") else ""
    return f"a {type(returned).__name__}{shape}{length}"


def try_reward(reward: Reward, image_size: int, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
    """Score two grey images before anything slow starts, so that a reward that cannot work is found now.

    Raises:
        UserError: the reward raised, or returned something else than two numbers. Invalid numbers pass: there may be nothing
            to see on a grey image.
    """
    images = torch.full((2, 3, image_size, image_size), 0.5)
    try:
        returned = reward(images, (list(prompts) * 2)[:2], (list(metadata) * 2)[:2])
    except Exception as error:  # whatever it raises is the answer
        raise UserError(
            f"the reward failed on two grey {image_size} x {image_size} images: {type(error).__name__}: {error}"
        ) from error
    _as_floats(returned, len(images))
