"""A scheduler that offers a pipeline the times that are asked for, and hears what its loop hands to ``step``.

It stands in the place of the pipeline's own one, which makes the grid. So the network's output is heard after guidance, sign
and packing, and whatever else a family does: nothing here knows a family.
"""

from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from diffusionrl.policies.schedules import Schedule
from diffusionrl.transitions import Grid

_Answer = namedtuple("_Answer", "prev_sample")  # some pipelines take it as [0], some as .prev_sample


class Heard(NamedTuple):
    """What a loop handed to ``step``."""

    output: Tensor
    sample: Tensor
    timestep: Tensor


class Enough(Exception):
    """What was asked for has been heard: leaves the pipeline's loop."""


class Offer(NamedTuple):
    """Times for the loop to run over, (T,) or, one for each sample, (T, B); and their levels as the scheduler counts them."""

    timesteps: Tensor
    sigmas: Tensor


class Listener:
    """In the place of ``pipeline.scheduler``.

    Attributes:
        offer: None makes the native grid, and runs through it.
        answers: what the next steps return; the loop is left at the first one without.
        heard: what the steps were handed.
        grid: the native one, as it was last made.
        on_step: called after each step of a run through.
        prepared: whether the latents of a run through have been made, so that the loop is next.
    """

    order = 1
    init_noise_sigma = 1.0  # latents are kept at unit scale
    _OWN = (
        "native",
        "schedule",
        "offer",
        "answers",
        "heard",
        "grid",
        "on_step",
        "prepared",
        "timesteps",
        "sigmas",
        "num_inference_steps",
    )

    def __init__(self, native: Any) -> None:
        self.native, self.schedule = native, Schedule(native)
        self.offer: Offer | None = None
        self.answers: list[Tensor] = []
        self.heard: list[Heard] = []
        self.grid: Grid | None = None
        self.on_step: Callable[[], None] | None = None
        self.prepared = False
        self.timesteps: Any = None
        self.sigmas: Any = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Some pipelines ask ``isinstance(self.scheduler, ...)``."""
        return type(self.__dict__["native"]) if "native" in self.__dict__ else Listener

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["native"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Listener._OWN:
            self.__dict__[name] = value
        else:
            setattr(self.native, name, value)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        if self.offer is not None:
            self.timesteps, self.sigmas = self.offer
        else:
            given = {"device": device, "timesteps": timesteps, "sigmas": sigmas, "mu": mu}
            if timesteps is None and sigmas is None:
                given["num_inference_steps"] = num_inference_steps
            self.native.set_timesteps(**{name: value for name, value in given.items() if value is not None})
            self.grid = self.schedule.grid()
            self.timesteps = self.grid.timesteps.to(self.native.timesteps)  # a scheduler's may be integers
            self.sigmas = getattr(self.native, "sigmas", None)
        self.num_inference_steps = len(self.timesteps)

    def set_begin_index(self, *_: Any) -> None:
        pass

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def add_noise(self, original: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        assert self.grid is not None
        row = int((self.grid.timesteps == timesteps.reshape(-1)[0].float().cpu()).nonzero()[0, 0])
        return self.grid.alpha[row].item() * original + self.grid.sigma[row].item() * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        return self.add_noise(sample, noise, timestep)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, **__: Any) -> Any:
        self.heard.append(Heard(model_output, sample, torch.as_tensor(timestep)))
        if self.offer is None:
            if self.on_step is not None:
                self.on_step()
            return _Answer(sample)
        if self.answers:
            return _Answer(self.answers.pop(0))
        raise Enough


@contextmanager
def networks_run_once(components: Mapping[str, Any], listener: Listener) -> Iterator[list[str]]:
    """Networks run until the first step, and then give what they gave; yields the names of those that are called afterwards."""
    networks = {name: part for name, part in components.items() if isinstance(part, torch.nn.Module)}
    recorded: dict[str, list[Any]] = {name: [] for name in networks}
    called: list[str] = []
    early: list[str] = []  # of the first step, for loops of one
    turn: dict[str, int] = {}
    own: dict[str, Any] = {name: network.__dict__.get("forward") for name, network in networks.items()}

    def replaying(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            noted = called if listener.heard else early if listener.prepared else []
            if name not in noted:
                noted.append(name)
            index = turn[name] = turn.get(name, -1) + 1
            if listener.heard and index < len(recorded[name]):
                return recorded[name][index]
            result = forward(*given, **named)
            if not listener.heard:
                recorded[name].append(result)
            return result

        return run

    try:
        for name, network in networks.items():
            network.forward = replaying(name, network.forward)
        listener.on_step, listener.prepared = turn.clear, False
        yield called
        called.extend([] if called else early)
    finally:
        listener.on_step = None
        for name, network in networks.items():
            del network.forward
            if own[name] is not None:
                network.forward = own[name]


@contextmanager
def outputs_counted(networks: Iterable[torch.nn.Module]) -> Iterator[list[int]]:
    """The sizes of all that the networks give within it."""
    counts: list[int] = []

    def count(network: torch.nn.Module, given: Any, output: Any) -> None:
        counts.append(sum(each.numel() for each in tree_leaves(output) if isinstance(each, Tensor)))

    handles = [network.register_forward_hook(count) for network in networks]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
