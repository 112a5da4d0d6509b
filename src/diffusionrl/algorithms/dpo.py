"""Diffusion-DPO: Diffusion Model Alignment Using Direct Preference Optimization (arXiv 2311.12908).

Of two samples of a prompt, the winner w and the loser l, the policy is to become likelier to make the winner, against the
reference model. With d = |v_theta - v|^2 and d_ref of the reference, at one noise level and noise for both samples (Eq. 14):

    D = (d(w) - d_ref(w)) - (d(l) - d_ref(l)),        L = -log sigmoid(-(beta / 2) * D)

averaged after the logarithm, over pairs and noise levels. v is what the network of the path regresses: the noise on Stable
Diffusion, as in the paper, the velocity on flows.

Pairs are drawn: the best and the worst sample of each group by the reward (``pairs_per_group``), which makes the paper's
offline loss an online one; or they come from disk (``preferences``), as in the paper. As in the authors' code, d is a mean over
the latent dimensions, and beta is 5000. The reference is the model without its adapter.

Deviations: several noise levels of a pair in one update (``noisings``), stratified; the paper fine-tunes all weights at a batch
of 2048 pairs, at a learning rate of 1e-8 a pair.

    diffusionrl train --algorithm.name dpo
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.algorithms.forward_process import ForwardProcess
from diffusionrl.algorithms.groups import both, compare, labels_of, pairs_of, shared_out
from diffusionrl.config.algorithms import DPOConfig
from diffusionrl.policies.base import Policy
from diffusionrl.sampling.rollout import Rollout


class DPO(ForwardProcess):
    """Diffusion-DPO, on pairs that are drawn or from disk. An "advantage" is 1 for a winner, -1 for a loser."""

    leans_on_reference = True

    def __init__(self, config: DPOConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def advantages(self, rollout: Rollout) -> Tensor:
        return labels_of(pairs_of(rollout, self.config.pairs_per_group), len(rollout.prompts))

    def updates(self, rollout: Rollout, advantages: Tensor, seed: int, step: int) -> Iterator[Tensor]:
        """Rows are (winner, loser - winner, part of the grid, seed of the draw)."""
        pairs = pairs_of(rollout, self.config.pairs_per_group)
        for update, groups in enumerate(shared_out(rollout, self.config.updates_per_step, seed, step)):
            rows = [
                (winner, loser - winner, part, seeds.address(seed, "noising", step, update, group, part))
                for group in groups
                for part in range(self.config.noisings)
                for winner, loser in pairs[group]
            ]
            yield torch.tensor(rows).view(-1, 4)

    def losses(self, policy: Policy, rollout: Rollout, rows: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        at = self.noised(policy, rollout, both(rows))
        reference = self.ask(policy, at, policy.reference(), self.guidance)
        own = at.ask(policy, self.guidance)
        error, distance = at.error(own), at.distance(own, reference)
        losses, figures = self.compared(error, at.error(reference))
        means = {"policy/denoising_loss": error, "policy/distance_from_reference": distance}
        figures |= {name: each.detach().view(2, -1).mean(0) for name, each in means.items()}
        return losses + self.config.reference_weight * distance.view(2, -1).mean(0), figures

    def compared(self, error: Tensor, reference: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``compare``. The errors, the policy's with gradient, are of the winners and then of the losers, (2R,)."""
        return compare(reference - error, self.config.beta / 2)
