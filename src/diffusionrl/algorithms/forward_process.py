"""What the forward-process objectives share: endpoints that are noised anew, and a regression there.

An endpoint x0, in whatever way it was sampled (any sampler, few steps, with or without guidance), is noised, x = alpha * x0 +
sigma * noise, and the policy is asked what it sees: no trajectory, no log-probability. Their own files say what the loss is.

What is regressed is what networks of the path are trained for: the velocity noise - x0 on linear flows, the noise elsewhere
(Diffusion-DPO's choice on Stable Diffusion). Papers speak of velocities; both are linear in x0 at a given x, so their formulas
hold for either.

Each endpoint is noised ``noisings`` times in an update, stratified over the model's own fine grid; levels and noise are the
same for all samples of a group, so that what they have in common cancels. Papers draw from the grid that they sample on, or
from a density over sigma; here always from the fine grid, which is the pipeline's own and has its shift in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.algorithms.advantages import Advantages
from diffusionrl.algorithms.base import PlainAlgorithm
from diffusionrl.algorithms.groups import shared_out
from diffusionrl.config.algorithms import ForwardProcessConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.devices import handed, in_double
from diffusionrl.policies.base import Policy
from diffusionrl.sampling.rollout import Needs, Rollout
from diffusionrl.transitions import NoiseLevels

BEHAVIOUR = "behaviour"
"""The copy that is the policy as a step began."""


@dataclass(frozen=True)
class Estimate:
    """What a network sees in a noisy sample: x0 and the noise, (B, ...) each."""

    x0: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Noised:
    """B endpoints, each at a noise level of its own.

    Attributes:
        true: x0 and the noise, as they are.
        x: the noisy samples, (B, ...).
        linear: a linear flow, alpha = 1 - sigma.
    """

    true: Estimate
    x: Tensor
    levels: NoiseLevels
    prompts: Sequence[Prompt]
    linear: bool

    def ask(self, policy: Policy, guidance: float | None) -> Estimate:
        """The policy's estimate; guidance None is the prediction with the prompt alone."""
        return Estimate(*policy.denoise(self.x, self.levels, self.prompts, guidance))

    def output(self, estimate: Estimate) -> Tensor:
        """What is regressed: the velocity of a linear flow, and elsewhere the noise."""
        return estimate.noise - estimate.x0 if self.linear else estimate.noise

    def distance(self, one: Estimate, other: Estimate) -> Tensor:
        """The mean squared difference of what is regressed, (B,)."""
        return mean_square(self.output(one) - self.output(other))

    def error(self, estimate: Estimate) -> Tensor:
        """The distance from the truth: the loss that such networks are trained with, (B,)."""
        return self.distance(estimate, self.true)


def mean_square(values: Tensor) -> Tensor:
    """Over all but the first dimension, reduced in float64. (B, ...) -> (B,), float32."""
    return in_double(values.flatten(1)).square().mean(1).float()


def relative_error(estimate: Tensor, true: Tensor) -> Tensor:
    """mean(|estimate - true|^2) over mean(|estimate - true|), the latter without gradient and at least 1e-5. Returns (B,)."""
    gap = in_double((estimate - true).flatten(1))
    return (gap.square().mean(1) / gap.detach().abs().mean(1).clamp(min=1e-5)).float()


def column(values: Tensor, like: Tensor) -> Tensor:
    """One number a sample, (B,), shaped to broadcast over ``like``, (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def draw_mean(values: Tensor, rows: Tensor) -> Tensor:
    """The mean over the rows of a group that share their noise, for each row, (R,)."""
    draws, draw = torch.unique(rows[:, 2], return_inverse=True)
    return (torch.bincount(draw, values, len(draws)) / torch.bincount(draw, minlength=len(draws)))[draw]


def noised(
    policy: Policy,
    clean: Tensor,
    prompts: Sequence[Prompt],
    draws: Sequence[int],
    parts: Sequence[int] | None = None,
    count: int = 1,
    within: tuple[float, float] = (0.0, 1.0),
    among: NoiseLevels | None = None,
) -> Noised:
    """Endpoints at fresh noise levels.

    Args:
        clean: x0, (B, ...).
        prompts: B of them.
        draws: a seed for each sample's level and noise.
        parts: which of ``count`` equal parts of the grid the level is drawn from, uniformly; None: the only one.
        within: the part of the grid that is cut into these; 0 is its noisy end.
        among: the grid; None: the model's own fine one.
    """
    grid, rows, noises = among or policy.noise_levels, [], []
    for draw, part in zip(draws, parts or [0] * len(draws), strict=True):
        generator = torch.Generator().manual_seed(draw)
        share = within[0] + (within[1] - within[0]) * (part + torch.rand((), generator=generator).item()) / count
        rows.append(min(int(share * len(grid)), len(grid) - 1))
        noises.append(torch.randn(clean.shape[1:], generator=generator))
    places, noise = torch.tensor(rows), handed(torch.stack(noises), clean.device)
    levels = grid[places if grid.sigma[0] > grid.sigma[-1] else len(grid) - 1 - places]
    return Noised(Estimate(clean, noise), levels.noisy(clean, noise), levels, prompts, grid.linear)


@dataclass(frozen=True)
class Point:
    """What a loss may look at.

    Attributes:
        at: the noisy samples.
        own: the policy's estimates, with gradient.
        others: those of its older copies by name, and of the "reference", without gradient.
    """

    at: Noised
    own: Estimate
    others: Mapping[str, Estimate]

    @property
    def behaviour(self) -> Estimate:
        """As the step began; the policy's own where it has one update, before which it is that."""
        return self.others.get(BEHAVIOUR, Estimate(self.own.x0.detach(), self.own.noise.detach()))


class ForwardProcess(PlainAlgorithm):
    """A forward-process objective but for its ``loss``.

    Attributes:
        copies: older copies of the policy that the objective keeps, by name: the decay with which each follows the weights
            before a training step, after so many steps.
        sampled_by: the copy that samples; None: the policy itself.
        leans_on_reference: the loss looks at the reference model's estimates, beyond ``reference_weight``.
        has_ratio: the loss looks at the policy as the step began, which is kept where a step has several updates.
        reference_guidance: with which the reference model is asked.
    """

    needs: Needs = "endpoints"
    leans_on_reference = False
    has_ratio = False

    def __init__(self, config: ForwardProcessConfig, guidance: float) -> None:
        super().__init__()
        self.settings, self.guidance = config, guidance if config.train_guided else None
        self.micro_batch_size = config.micro_batch_size
        self.statistics = Advantages(config)
        if self.has_ratio and config.updates_per_step > 1:
            self.copies[BEHAVIOUR] = lambda done: 0.0
        self.reference_guidance = self.guidance

    @property
    def looks_at(self) -> list[str]:
        """Names of the copies whose estimates the loss looks at."""
        return list(self.copies)

    @property
    def needs_reference(self) -> bool:
        return self.leans_on_reference or self.settings.reference_weight > 0

    def advantages(self, rollout: Rollout) -> Tensor:
        return self.statistics.of(rollout)

    def updates(self, rollout: Rollout, advantages: Tensor, seed: int, step: int) -> Iterator[Tensor]:
        """Rows are (sample, part of the grid, seed of the draw); whole groups are shared out among the updates."""
        size, valid = rollout.group_size, rollout.scores.valid
        for update, groups in enumerate(shared_out(rollout, self.settings.updates_per_step, seed, step)):
            rows = [
                (sample, part, seeds.address(seed, "noising", step, update, group, part))
                for group in groups
                for part in range(self.settings.noisings)
                for sample in range(group * size, (group + 1) * size)
                if valid[sample]
            ]
            yield torch.tensor(rows).view(-1, 3)

    def noised(self, policy: Policy, rollout: Rollout, rows: Tensor) -> Noised:
        """The endpoints of some rows."""
        sample, settings = rows[:, 0], self.settings
        clean, prompts, parts = rollout.endpoints(sample), rollout.prompts_of(sample), rows[:, 1].tolist()
        draws, among = rows[:, 2].tolist(), self.among(policy, rollout)
        return noised(policy, clean, prompts, draws, parts, settings.noisings, settings.levels, among)

    def among(self, policy: Policy, rollout: Rollout) -> NoiseLevels:
        """The levels that endpoints are noised to."""
        return policy.noise_levels

    def losses(self, policy: Policy, rollout: Rollout, rows: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        at, weights = self.noised(policy, rollout, rows), handed(weights, rollout.latents.device)
        others = {name: self.ask(policy, at, policy.copies.used(name), self.guidance) for name in self.looks_at}
        if self.needs_reference:
            others["reference"] = self.ask(policy, at, policy.reference(), self.reference_guidance)
        point = Point(at, at.ask(policy, self.guidance), others)
        losses = self.loss(point, weights)
        figures = {"policy/denoising_loss": at.error(point.own).detach()}
        for name, other in others.items():
            distance = at.distance(point.own, other)
            figures[f"policy/distance_from_{name}"] = distance.detach()
            if name == "reference" and self.settings.reference_weight > 0:
                losses = losses + self.settings.reference_weight * distance
        return losses, figures | self.figures(point, weights)

    @torch.no_grad()
    def ask(self, policy: Policy, at: Noised, another: AbstractContextManager[None], guidance: float | None) -> Estimate:
        """Another than the policy: an older copy of it, or the reference model."""
        with another:
            return at.ask(policy, guidance)

    def over(self, rows: Tensor, measure: Callable[[Tensor], Tensor]) -> Tensor:
        """What a look at all of this process's rows gives, in micro-batches, joined. Without gradient."""
        if len(rows) == 0:
            return torch.zeros(0)
        with torch.no_grad():
            return torch.cat([measure(part).cpu() for part in torch.split(rows, self.micro_batch_size)])

    def loss(self, point: Point, weights: Tensor) -> Tensor:
        """The loss of each row, (R,), with gradient, but for the distance from the reference.

        Args:
            weights: what ``weights`` gave, (R,); by default the samples' advantages.
        """
        raise NotImplementedError

    def figures(self, point: Point, weights: Tensor) -> dict[str, Tensor]:
        """More to log, each (R,), without gradient; NaN where a row has no such figure."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics.load_state_dict(state)
