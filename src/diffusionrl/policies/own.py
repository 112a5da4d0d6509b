"""A policy from code of one's own: made by a function that is named, and asked once whether it answers as a policy does."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffusionrl.config import PolicyConfig
from diffusionrl.config.run import changed
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import UserError, describe, require
from diffusionrl.foreign.finding import find_function
from diffusionrl.policies.base import Policy
from diffusionrl.transitions import Grid

T = TypeVar("T")

_ANSWERS = sorted(name for name in {*Policy.__annotations__, *vars(Policy)} if not name.startswith("_"))
_ALIKE = 1e-4  # of the largest value: what a GPU may round otherwise from call to call
_SEE = "docs/own_model.md says what a policy answers, and NetworkPolicy makes one of a network"


def load_own(name: str, settings: PolicyConfig, seed: int) -> Policy:
    """What the function ``file.py:function`` or ``package.module:function`` makes of (settings, seed).

    Raises:
        UserError: there is no such function, it raises, it makes no policy, or one with other settings.
    """
    make = find_function("model", name, "(settings, seed) -> policy")
    try:
        with torch.enable_grad():  # it may train, or try
            policy = make(settings, seed)
    except Exception as error:  # whatever it raises is the answer
        raise UserError(f"model {name!r} cannot be made: {describe(error)}") from error
    require_answers(policy, f"what {name} makes")
    if policy.settings not in (None, settings):
        there = changed(settings, policy.settings)
        said = ", ".join(f"policy.{key} {found}, not {asked}" for key, (asked, found) in there.items())
        raise UserError(
            f"model {name!r} is made with other settings than were asked for ({said}): ask for these, or hand on those "
            "that the function is given"
        )
    policy.source = name
    return policy


def require_answers(policy: Any, whose: str) -> None:
    """Raises UserError for what lacks an answer of a policy."""
    missing = [name for name in _ANSWERS if not hasattr(policy, name)]
    require(not missing, f"{whose}, a {type(policy).__name__}, is no policy: it has no {', '.join(missing)}. {_SEE}")


@torch.no_grad()
def check_policy(policy: Policy, example: Prompt, steps: int) -> None:
    """Ask a policy of one's own what a run will ask it.

    Args:
        example: a prompt of the kind that will be asked.
        steps: denoising steps.

    Raises:
        UserError: it raises, or gives something of another shape, device or precision, or not the same twice. What is not
            finite is said when it is sampled, with the step where it began.
    """
    device, about = torch.device(policy.device), _ask("about", lambda: policy.about)
    require("network" in about or "pipeline" in about, f'the policy\'s about names no "network": {sorted(about)}. {_SEE}')
    _require_weights(_ask("trainable", policy.trainable), device)
    prompts, shape = [example, example], (2, *policy.latent_shape)
    start, again = (_ask("start", lambda: policy.start(prompts, [0, 1])) for _ in range(2))
    _require_tensor("start", start, shape, device)
    _require_same("start", [start], [again], "addresses")
    grid = _ask("grid", lambda: policy.grid(steps))
    require(isinstance(grid, Grid), f"the policy's grid is a {type(grid).__name__}, not a diffusionrl.transitions.Grid")
    levels = grid.levels[torch.tensor([0, len(grid) // 2])]
    said, repeated = (_ask("denoise", lambda: policy.denoise(start, levels, prompts, None)) for _ in range(2))
    require(isinstance(said, tuple) and len(said) == 2, f"the policy's denoise gives a {type(said).__name__}, not (x0, noise)")
    for each in said:
        _require_tensor("denoise", each, shape, device)
    _require_same("denoise", said, repeated, "x, time and prompt: is dropout on, or does it draw?")
    _require_tensor("decode", _ask("decode", lambda: policy.decode(start, prompts)), (2, *policy.sample_shape))


def _require_weights(weights: dict[str, torch.nn.Parameter], device: torch.device) -> None:
    require(bool(weights), "the policy trains nothing: trainable() is empty")
    for name, weight in weights.items():
        told = f"{weight.dtype} on {weight.device}, {'with' if weight.requires_grad else 'without'} gradient"
        fits = weight.dtype == torch.float32 and weight.requires_grad and weight.device.type == device.type
        require(fits, f"the policy's weight {name} is {told}: it has to be torch.float32 on {device}, with gradient")


def _ask(what: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it raises is the answer
        raise UserError(f"the policy's {what} raises {describe(error)}") from error


def _require_tensor(what: str, found: Any, shape: tuple[int, ...], device: torch.device | None = None) -> None:
    told = f"a {type(found).__name__}"
    if isinstance(found, Tensor):
        told = f"{tuple(found.shape)}, {found.dtype} on {found.device}"
        if (tuple(found.shape), found.dtype) == (shape, torch.float32) and (device is None or found.device.type == device.type):
            return
    raise UserError(f"the policy's {what} gives {told}: it has to be {shape}, torch.float32{f' on {device}' if device else ''}")


def _require_same(what: str, first: Any, second: Any, where: str) -> None:
    for one, other in zip(first, second, strict=True):
        first_time, second_time = (each.nan_to_num(0.0, 0.0, 0.0) for each in (one, other))
        gap = (first_time - second_time).abs().max()
        require(bool(gap <= _ALIKE * first_time.abs().max()), f"the policy's {what} is not the same twice at the same {where}")
