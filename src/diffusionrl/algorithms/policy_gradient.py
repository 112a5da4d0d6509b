"""What the policy gradients share: advantages, which denoising steps are trained, and the loss of (sample, denoising step)
pairs. Their own files say what the loss is.

The trained window: of all steps with fresh noise, a training step may keep a few in a row, the same for all of its samples; the
others become steps of the ODE and are not trained (``config.WindowConfig``). The anchor: ``kl_weight`` times the KL of a step's
Gaussian to the one that the reference model would draw from, |mean - mean_ref|^2 / (2 * fresh^2), at the latents that the
policy visited.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.algorithms.advantages import Advantages
from diffusionrl.algorithms.base import PlainAlgorithm
from diffusionrl.config.algorithms import PolicyGradientConfig, SharedOutConfig
from diffusionrl.devices import handed
from diffusionrl.policies.base import Policy
from diffusionrl.sampling.rollout import Needs, Rollout, denoise_step
from diffusionrl.transitions import SamplerTable, gaussian_kl, log_density


@dataclass(frozen=True)
class Taken:
    """P denoising steps that were taken, as the policy sees them now.

    Attributes:
        log_prob: of what was drawn, (P,), with gradient.
        log_ratio: the same, less what it was when it was drawn.
        fresh: the fresh noise of each step, (P,).
        fall: by how much the noise level falls in it, (P,); -dt of a flow.
        moved: KL of the step's Gaussian to the one that it was drawn from, (P,), with gradient; 0 where the algorithm does not
            need ``means``.
    """

    log_prob: Tensor
    log_ratio: Tensor
    fresh: Tensor
    fall: Tensor
    moved: Tensor

    @property
    def ratio(self) -> Tensor:
        return self.log_ratio.exp()


class PolicyGradient(PlainAlgorithm):
    """A policy gradient but for its ``loss``, and its ``updates``, which say which pairs are trained when."""

    needs: Needs = "trajectories"

    def __init__(self, config: PolicyGradientConfig, guidance: float) -> None:
        super().__init__()
        self.settings, self.guidance = config, guidance
        self.micro_batch_size, self.logprob_reduction = config.micro_batch_size, config.logprob_reduction
        self.statistics = Advantages(config)

    @property
    def needs_reference(self) -> bool:
        return self.settings.kl_weight > 0

    def table(self, sampler: SamplerTable, seed: int, step: int) -> SamplerTable:
        """With the ODE outside the window.

        Raises:
            UserError: the window does not fit.
        """
        window, stochastic = self.settings.window, sampler.stochastic
        if window.size == 0:
            return sampler
        places = window.places(len(stochastic))
        place = places[window.progress(step, len(places))]
        if window.moves == "random":
            place = places[seeds.address(seed, "window", step) % len(places)]
        return sampler.only(stochastic[place : place + window.size])

    def advantages(self, rollout: Rollout) -> Tensor:
        return self.statistics.of(rollout)

    def losses(self, policy: Policy, rollout: Rollout, rows: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows are (sample, denoising step); the step's fresh noise is above 0."""
        sample, step = rows.unbind(1)
        there = handed(rows, rollout.latents.device)
        table, x = rollout.table, rollout.latents[there[:, 0], there[:, 1]]
        arguments = (policy, table, x, step, rollout.prompts_of(sample), self.guidance)
        reference = self._reference_mean(*arguments)
        mean, std = denoise_step(*arguments)
        taken = self._taken(rollout, step, there, mean, std)
        losses, beyond = self.loss(taken, handed(weights, x.device))
        log_ratio = taken.log_ratio.detach()
        figures = {
            "ratio_gap": (log_ratio.exp() - 1).abs(),
            "policy/clip_fraction": beyond.float(),
            "policy/approx_kl": 0.5 * log_ratio**2,
        }
        if reference is not None:
            distance = gaussian_kl(mean, reference, std, self.logprob_reduction)
            losses = losses + self.settings.kl_weight * distance
            figures["policy/kl_from_reference"] = distance.detach()
        return losses * handed(step_weights(table, self.settings.step_weight_power)[step], x.device), figures

    @torch.no_grad()
    def _reference_mean(self, policy: Policy, *arguments: Any) -> Tensor | None:
        if not self.needs_reference:
            return None
        with policy.reference():
            return denoise_step(policy, *arguments)[0]

    def _taken(self, rollout: Rollout, step: Tensor, there: Tensor, mean: Tensor, std: Tensor) -> Taken:
        """``there``: the rows, on the device."""
        places = there[:, 0], there[:, 1]
        log_prob = log_density(rollout.step_to(*places), mean, std, self.logprob_reduction)
        moved = torch.zeros_like(log_prob)
        if rollout.means is not None:
            moved = gaussian_kl(mean, rollout.means[places], std, self.logprob_reduction)
        grid = rollout.table.grid
        fresh, fall = (handed(each[step], mean.device) for each in (rollout.table.fresh, grid.sigma - grid.sigma_next))
        return Taken(log_prob, log_prob - rollout.log_probs[places], fresh, fall, moved)

    def loss(self, taken: Taken, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each step, (P,), with gradient; and whether it is beyond the clip, (P,).

        Args:
            advantage: of each step's sample, (P,).
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics.load_state_dict(state)


class SharedOut(PolicyGradient):
    """A policy gradient but for its ``loss``: every ``updates_per_step`` samples in a row are shared out at random, one to each
    update. So each has its part of every prompt's samples, and of every process's."""

    def __init__(self, config: SharedOutConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.sharing = config

    def updates(self, rollout: Rollout, advantages: Tensor, seed: int, step: int) -> Iterator[Tensor]:
        total, count = len(rollout.prompts), self.sharing.updates_per_step
        blocks = -(-total // count)
        draws = torch.rand(blocks, count, generator=seeds.torch_generator(seed, "update_order", step)).argsort(1)
        for part in (torch.arange(blocks)[:, None] * count + draws).unbind(1):
            part = part[part < total]
            yield self.pairs(rollout, part[rollout.scores.valid[part]], seed, step)

    def pairs(self, rollout: Rollout, samples: Tensor, seed: int, step: int) -> Tensor:
        """The (sample, denoising step) pairs that an update on these samples runs over, (P, 2)."""
        stochastic = rollout.table.stochastic
        count = max(1, round(self.sharing.train_fraction * len(stochastic)))
        pairs = []
        for sample in samples.tolist():
            drawn = torch.randperm(len(stochastic), generator=seeds.torch_generator(seed, "trained_steps", step, sample))
            chosen = stochastic[drawn[:count]].sort().values
            pairs.append(torch.stack([torch.full_like(chosen, sample), chosen], 1))
        return torch.cat(pairs) if pairs else torch.zeros(0, 2, dtype=torch.long)


def clipped_loss(advantage: Tensor, ratio: Tensor, clip_range: float) -> Tensor:
    """PPO's pessimistic loss: the ratio earns nothing beyond the clip, and is always charged."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def clipped(advantage: Tensor, ratio: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """What ``PolicyGradient.loss`` gives, of the clipped ratio."""
    return clipped_loss(advantage, ratio, clip_range), (ratio.detach() - 1).abs() > clip_range


def step_weights(table: SamplerTable, power: float) -> Tensor:
    """(T,), of mean 1 over the stochastic steps."""
    weights = table.fresh**power
    return weights / weights[table.fresh > 0].mean()
