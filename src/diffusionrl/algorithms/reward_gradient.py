"""What the reward gradients share: the last part of a chain, run again with gradient, decoded, and scored by a reward that has
one. Their own files say which part.

Samples are drawn and scored without gradient, as for any algorithm. An update begins at a stored latent x_k and computes the
means m of the steps again; a step's value is the stored one, its gradient the mean's:

    x_{k+1} = stored x_{k+1} + m(x_k) - sg(m(x_k)),        L = -reward(decode(x_T))

so the fresh noise of a stochastic sampler is held fixed (the usual reparametrisation), and what is scored is what was sampled.

Where the network's input is cut off (``direct``), a step passes a gradient on by its sum alone, x' = a * x + b * output, as if
the network's output did not depend on x. What is held fixed there is what networks of the path are trained to give: the
velocity of a linear flow (a = 1 with an ODE), the noise elsewhere.

What is drawn is drawn once an update, the same for all its samples, as the papers' code has it: so all processes make as many
passes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.algorithms.base import PlainAlgorithm
from diffusionrl.algorithms.forward_process import mean_square
from diffusionrl.config.algorithms import RewardGradientConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.devices import handed
from diffusionrl.policies.base import Policy
from diffusionrl.sampling.rollout import Needs, Rollout, metadata_of, predict
from diffusionrl.transitions import SamplerTable


@dataclass(frozen=True)
class Chain:
    """R samples' chains, to be run again in part.

    Attributes:
        stored: their latents, (R, T + 1, ...).
        places: theirs among all samples of the step.
    """

    policy: Policy
    table: SamplerTable
    stored: Tensor
    prompts: Sequence[Prompt]
    guidance: float
    places: Sequence[int]

    def see(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """What the policy sees in x at a denoising step: (x0, noise)."""
        return predict(self.policy, self.table, x, self._rows(step, x), self.prompts, self.guidance)

    def mean(self, x: Tensor, step: int) -> Tensor:
        """Where a denoising step leads from x, but for its fresh noise."""
        return self.table.mean(self._rows(step, x), *self.see(x, step))

    def through(self, first: int) -> Tensor:
        """The endpoints, with gradient through every step from ``first`` on."""
        x = self.stored[:, first]
        for step in range(first, len(self.table)):
            x = with_gradient(self.stored[:, step + 1], self.mean(x, step))
        return x

    def direct(self, steps: Sequence[int], until: int, scale: float = 1.0) -> Tensor:
        """The latents that step ``until`` begins with, with gradient through the outputs of some steps before it; the networks'
        inputs carry none."""
        x = self.stored[:, until]
        for step in steps:
            carried = scale * self.kept[step + 1 : until].prod().item()
            mean = self.mean(self.stored[:, step], step)
            x = x + carried * (mean - mean.detach())
        return x

    @property
    def kept(self) -> Tensor:
        """What is left of a change of x after each step, (T,), if the network's output stays the same."""
        grid, table = self.table.grid, self.table
        return table.alpha_next + table.kept if self.linear else table.alpha_next / grid.alpha

    @property
    def seen(self) -> Tensor:
        """What is left of it in x0 as it is seen there, (T,)."""
        return torch.ones_like(self.table.grid.alpha) if self.linear else 1 / self.table.grid.alpha

    @property
    def linear(self) -> bool:
        return self.policy.noise_levels.linear

    def output(self, x: Tensor, step: int) -> Tensor:
        """What a network of the path is trained to give: the velocity of a linear flow, and elsewhere the noise."""
        x0, noise = self.see(x, step)
        return noise - x0 if self.linear else noise

    def _rows(self, step: int, x: Tensor) -> Tensor:
        return torch.full((len(x),), step, device=x.device)


def with_gradient(value: Tensor, of: Tensor) -> Tensor:
    """The value, to the bit, with another's gradient."""
    return value + (of - of.detach())


class RewardGradient(PlainAlgorithm):
    """A reward gradient but for its ``plan`` and its ``latents``."""

    needs: Needs = "trajectories"
    needs_reward_gradient = True
    ends_chain = True
    """What is scored is the endpoint of the chain: the score is the sample's own."""

    def __init__(self, config: RewardGradientConfig, guidance: float) -> None:
        super().__init__()
        self.settings, self.guidance, self.micro_batch_size = config, guidance, config.micro_batch_size

    @property
    def needs_reference(self) -> bool:
        return self.settings.reference_weight > 0

    def plan(self, count: int, generator: torch.Generator) -> list[list[int]]:
        """What is made of each sample in an update, a row each; a row begins with the first trained step.

        Args:
            count: denoising steps of the sampler.
        """
        raise NotImplementedError

    def latents(self, chain: Chain, plan: Tensor) -> Tensor:
        """The latents that are scored, (R, ...), with gradient.

        Args:
            plan: a row of ``plan`` for each, (R, K).
        """
        raise NotImplementedError

    def advantages(self, rollout: Rollout) -> Tensor:
        """A sample's own gradient teaches: 1 where it is valid."""
        return rollout.scores.valid.float()

    def updates(self, rollout: Rollout, advantages: Tensor, seed: int, step: int) -> Iterator[Tensor]:
        """One update of all valid samples; its rows are those of ``plan``, behind the sample."""
        plan = self.plan(len(rollout.table), seeds.torch_generator(seed, "chain", step))
        samples = rollout.scores.valid.nonzero().flatten().tolist()
        yield torch.tensor([(sample, *row) for row in plan for sample in samples], dtype=torch.long).view(-1, 1 + len(plan[0]))

    def losses(self, policy: Policy, rollout: Rollout, rows: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert rollout.reward is not None
        sample, plan = rows[:, 0], rows[:, 1:]
        prompts, places = rollout.prompts_of(sample), rollout.among_all(sample)
        stored = rollout.latents[handed(sample, rollout.latents.device)]
        chain = Chain(policy, rollout.table, stored, prompts, self.guidance, places.tolist())
        images = policy.decode(self.latents(chain, plan), prompts, gradient=True).cpu()
        scores = rollout.reward.differentiate(
            images, [prompt.text for prompt in prompts], metadata_of(prompts, rollout.sampling_rate)
        )
        losses = -weights.cpu() * scores.values.clamp(max=self.settings.target) * scores.valid
        value = scores.values.detach()
        figures = {"reward/differentiated": value}
        if self.ends_chain:
            figures["reward/differentiated_gap"] = (value - rollout.scores.values[places]).abs()
        if self.needs_reference:
            distance = self._distance(chain, int(plan[0, 0]))
            figures["policy/distance_from_reference"] = distance.detach()
            losses = losses + self.settings.reference_weight * distance
        return losses, figures

    def _distance(self, chain: Chain, step: int) -> Tensor:
        """From what the reference model sees in the stored latents of a step, (R,)."""
        x = chain.stored[:, step]
        with torch.no_grad(), chain.policy.reference():
            reference = chain.output(x, step)
        return mean_square(chain.output(x, step) - reference).cpu()
