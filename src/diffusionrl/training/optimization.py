"""From rows of work to an optimizer step: gradient accumulation, clipping, warm-up, and a stop before anything non-finite."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from diffusionrl import processes
from diffusionrl.algorithms.base import Objective
from diffusionrl.config import OptimizerConfig
from diffusionrl.devices import in_double
from diffusionrl.interruption import check
from diffusionrl.policies.base import Policy
from diffusionrl.processes import like, whole
from diffusionrl.sampling.rollout import Rollout

FEW = 100_000_000
"""Weights: an adapter's."""


class NonFiniteError(Exception):
    """A loss or the gradient is not finite, and weights and optimizer are as before this update; or they are not finite after
    it themselves, and have to be restored.

    Args:
        losses: (R,), one a row.
    """

    def __init__(self, what: str, rollout: Rollout, rows: Tensor, advantages: Tensor, losses: Tensor) -> None:
        count = int((~losses.isfinite()).sum())
        super().__init__(f"{count} of {len(losses)} losses are" if count else what)
        self.rollout, self.rows, self.advantages, self.losses = rollout, rows, advantages, losses

    def save(self, folder: Path) -> str:
        """Everything that the losses were computed from: ``batch.safetensors``, and the prompts in ``batch.json``.

        Returns:
            The folder, or why there is none.
        """
        try:
            self._write(folder)
        except (OSError, SafetensorError) as error:
            return f"no file, for want of a disk to write to ({error})"
        return str(folder)

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rollout, own = self.rollout, self.rollout.own
        samples = torch.unique(self.rows[:, 0])
        samples = samples[(samples >= own.start) & (samples < own.stop)]
        where = (samples - own.start).to(rollout.latents.device)
        tensors = {
            "samples": samples,
            "rows": self.rows,
            "losses": self.losses,
            "advantages": self.advantages[samples],
            "latents": rollout.latents[where],
            "log_probs": rollout.log_probs[where],
        }
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / "batch.safetensors")
        prompts = [rollout.prompts[i].text for i in samples.tolist()]
        (folder / "batch.json").write_text(json.dumps(prompts, indent=1) + "\n")


def scheduled(config: OptimizerConfig, done: float, updates: int) -> float:
    """The learning rate.

    Args:
        done: share of the run's training steps that are behind it, from 0 to 1.
        updates: which one it is for; the first is 1.
    """
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.schedule]
    fallen = config.schedule_end + (1 - config.schedule_end) * left
    return config.learning_rate * fallen * min(1.0, updates / max(1, config.warmup))


class Halves(NamedTuple):
    """Of the gradients of an update's two halves.

    Attributes:
        product: of one with the other.
        first, second: of each with itself.
    """

    product: float
    first: float
    second: float


class Optimization:
    """AdamW on named parameters, with a count of its updates, which is all that the warm-up depends on.

    Attributes:
        done: share of the run's training steps before the one in progress, for the schedule.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], config: OptimizerConfig) -> None:
        self.parameters, self.config, self.updates, self.done = parameters, config, 0, 0.0
        self.adamw = torch.optim.AdamW(
            parameters.values(), config.learning_rate, config.betas, config.epsilon, config.weight_decay
        )

    @property
    def sharded(self) -> bool:
        """Each process holds a part of the weights; then all are needed for what wants them whole."""
        return processes.sharded(self.parameters.values())

    def update(
        self, algorithm: Objective, policy: Policy, rollout: Rollout, rows: Tensor, advantages: Tensor
    ) -> tuple[dict[str, Tensor], float, Halves | None]:
        """One optimizer step on the mean loss over the rows.

        Returns:
            The algorithm's figures, one number a row; the norm of the gradient before it was clipped; and how far its halves
            agree.

        Raises:
            NonFiniteError: instead of the step, or after one that made weights or moments of the optimizer infinite.
        """
        try:
            figures, halves = accumulate_gradient(algorithm, policy, rollout, rows, advantages)
            norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm))
            losses = figures.pop("loss")
            everyone, size = range(processes.count()), algorithm.micro_batch_size
            ordered = torch.cat([micro for each in everyone for micro in rollout.micro_batches(rows, size, each)])
            if not (norm.isfinite() and losses.isfinite().all()):
                raise NonFiniteError("the gradient is", rollout, ordered, advantages, losses)
            self.updates += 1
            for group in self.adamw.param_groups:
                group["lr"] = scheduled(self.config, self.done, self.updates)
            try:
                self.adamw.step()
            except RuntimeError as error:
                if "overflow" not in str(error):
                    raise
                raise NonFiniteError("the step is", rollout, ordered, advantages, losses) from error
            moments = [moment for name, moment in self.tensors().items() if not name.endswith(".step")]
            if not all_finite([*self.parameters.values(), *moments]):
                raise NonFiniteError("the weights after the update are", rollout, ordered, advantages, losses)
        finally:
            self.adamw.zero_grad()
        return figures, norm.item(), halves

    def rms(self, norm: float) -> float:
        """The root mean square of a gradient of this norm, as AdamW gets it: clipped."""
        count = sum(parameter.numel() for parameter in self.parameters.values())
        return min(norm, self.config.max_grad_norm) / math.sqrt(count)

    def tensors(self) -> dict[str, Tensor]:
        """The moments by parameter and kind, "NAME.exp_avg", as they are: of sharded weights, sharded."""
        return {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.adamw.state.get(parameter, {}).items()
        }

    def load_tensors(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Be as when ``tensors`` was called, after so many updates. Raises ValueError for those of other parameters."""
        self.adamw.state.clear()
        for name, value in tensors.items():
            owner, key = name.rsplit(".", 1)
            parameter = self.parameters[owner]
            if value.dtype != parameter.dtype or (key != "step" and value.shape != parameter.shape):
                raise ValueError(f"{name} is {tuple(value.shape)} of {value.dtype}")
            self.adamw.state[parameter][key] = value.clone() if key == "step" else like(parameter, value.clone())
        self.updates = updates


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> bool:
    """The largest of all magnitudes is finite; of sharded tensors, on all processes."""
    return bool(whole(torch.nn.utils.get_total_norm(tensors, math.inf)).isfinite())


def accumulate_gradient(
    algorithm: Objective, policy: Policy, rollout: Rollout, rows: Tensor, advantages: Tensor
) -> tuple[dict[str, Tensor], Halves | None]:
    """Add the gradient of the mean loss over all rows, in micro-batches; how they are cut changes only rounding.

    Every process runs over its own rows, in as many passes as the others (with a row that does not count where it has none
    left: sharded weights are gathered in each pass). Gradients of few weights are added up in double precision, where the order
    does not matter: Adam would make much of their rounding.

    Returns:
        The algorithm's figures and the "loss", one number a row, process by process, as in ``Rollout.micro_batches``; and how
        far the gradients of the two halves of the groups agree, where there are two.
    """
    shared = [rollout.micro_batches(rows, algorithm.micro_batch_size, process) for process in range(processes.count())]
    own, mine = rollout.own, shared[processes.index()]
    filler = rows[:1].clone()
    filler[:, 0] = own.start
    weights = _weights(algorithm, policy, rollout, rows, mine, advantages)
    gradient, middle = Sum(policy.trainable().values()), rollout.middle(rows, algorithm.micro_batch_size)
    parts: list[dict[str, Tensor]] = []
    for turn in range(max(map(len, shared))):
        check()
        micro = (mine[turn] if turn < len(mine) else filler).clone()
        micro[:, 0] -= own.start  # where this process's tensors begin
        losses, figures = algorithm.losses(policy, rollout, micro, weights[turn] if turn < len(mine) else torch.zeros(1))
        counted = len(micro) if turn < len(mine) else 0
        (losses[:counted].sum() / len(rows) + 0 * losses[counted:].sum()).backward()  # type: ignore[no-untyped-call]
        gradient.take(first=turn < len(mine) and bool(micro[0, 0] + own.start < middle))
        parts.append({key: each[:counted] for key, each in (figures | {"loss": losses.detach()}).items()})
    halves = gradient.give(halved=middle > 0)
    sizes = [sum(map(len, each)) for each in shared]
    return {key: processes.gather(torch.cat([part[key] for part in parts]), sizes) for key in parts[0]}, halves


@torch.no_grad()
def _weights(
    algorithm: Objective, policy: Policy, rollout: Rollout, rows: Tensor, micro: list[Tensor], advantages: Tensor
) -> tuple[Tensor, ...]:
    """Of each of a process's micro-batches. A process that has none is asked too: others may wait for what it says."""
    own, rows = rollout.own, torch.cat([rows[:0], *micro])
    rows[:, 0] -= own.start  # where this process's tensors begin
    weights = algorithm.weights(policy, rollout, rows, advantages[own.start : own.stop])
    return torch.split(weights, [len(each) for each in micro])


class Sum:
    """Of gradients, over micro-batches and processes. Sharded weights add up their own."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        everything = list(parameters)
        self.parameters = [parameter for parameter in everything if not isinstance(parameter, DTensor)]
        self.doubles: dict[torch.nn.Parameter, Tensor] = {}
        self.first: dict[torch.nn.Parameter, Tensor] = {}
        self.precise = sum(parameter.numel() for parameter in self.parameters) <= FEW
        self.whole = len(self.parameters) == len(everything)

    def take(self, first: bool) -> None:
        """The gradients of a micro-batch; those of the first half of the groups come first."""
        if not self.precise:
            return
        for parameter in self.parameters:
            if parameter.grad is not None:
                gradient, parameter.grad = in_double(parameter.grad), None
                self.doubles[parameter] = self.doubles[parameter] + gradient if parameter in self.doubles else gradient
        if first:
            self.first = dict(self.doubles)

    def give(self, halved: bool) -> Halves | None:
        """Their sum over all processes becomes the gradient. Returns how far its halves agree; None where there
        are more weights than are added up here."""
        if not self.precise:
            processes.add_up([parameter.grad for parameter in self.parameters if parameter.grad is not None])
            return None
        firsts = self._firsts() if halved and self.whole and self.doubles else []
        processes.add_up(list(self.doubles.values()))
        for parameter, gradient in self.doubles.items():
            parameter.grad = gradient.float()
        return self._halves(firsts) if firsts else None

    def _firsts(self) -> list[Tensor]:
        """The first half of each gradient; adding up changes the tensors that it is in."""
        return [
            self.first[parameter].float() if parameter in self.first else torch.zeros_like(gradient, dtype=torch.float32)
            for parameter, gradient in self.doubles.items()
        ]

    def _halves(self, firsts: list[Tensor]) -> Halves:
        """From the first half of each parameter's gradient."""
        processes.add_up(firsts)
        products = []
        for first, both in zip(firsts, self.doubles.values(), strict=True):
            one, other = in_double(first), both - in_double(first)
            products.append(torch.stack([(one * other).sum(), (one * one).sum(), (other * other).sum()]))
        return Halves(*torch.stack(products).sum(0).tolist())
