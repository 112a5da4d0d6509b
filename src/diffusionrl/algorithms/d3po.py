"""D3PO: Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model (arXiv 2311.13231).

Direct preference optimization in the decision process of DDPO: every denoising step of the chain that won is to become
likelier than under the reference model, every step of the one that lost less likely. With rho = p_theta / p_ref of a step, and
w and l the two chains at the same step:

    L = -log sigmoid(beta * log clip(rho_w, 1 - c, 1 + c) - beta * log clip(rho_l, 1 - c, 1 + c))

As in the authors' code: beta is 0.1, c is 0.1, log-probabilities are means over the latent dimensions, and the reference is
the model that training began from. Humans judge there; here it is the reward, and pairs are the best and the worst chain of a
prompt (``pairs_per_group``).

Deviations: the two chains begin from noise of their own, in the paper from the same; ``step_weight_power`` weighs denoising
steps as in ``ddpo.py``, 0 as published.

    diffusionrl train --algorithm.name d3po
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffusionrl.algorithms.groups import both, compare, labels_of, pairs_of, shared_out
from diffusionrl.algorithms.policy_gradient import PolicyGradient, step_weights
from diffusionrl.config.algorithms import D3POConfig
from diffusionrl.devices import handed
from diffusionrl.policies.base import Policy
from diffusionrl.sampling.rollout import Rollout, denoise_step
from diffusionrl.transitions import log_density


class D3PO(PolicyGradient):
    """D3PO. An "advantage" is 1 for a winner, -1 for a loser."""

    needs_reference = True

    def __init__(self, config: D3POConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def advantages(self, rollout: Rollout) -> Tensor:
        return labels_of(pairs_of(rollout, self.config.pairs_per_group), len(rollout.prompts))

    def updates(self, rollout: Rollout, advantages: Tensor, seed: int, step: int) -> Iterator[Tensor]:
        """Rows are (winner, loser - winner, denoising step), of the steps with fresh noise."""
        pairs = pairs_of(rollout, self.config.pairs_per_group)
        stochastic = (rollout.table.fresh > 0).nonzero().flatten().tolist()
        for groups in shared_out(rollout, self.config.updates_per_step, seed, step):
            rows = [(winner, loser - winner, row) for group in groups for winner, loser in pairs[group] for row in stochastic]
            yield torch.tensor(rows).view(-1, 3)

    def losses(self, policy: Policy, rollout: Rollout, rows: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        pairs, step = both(rows), rows[:, -1]
        places = handed(pairs, rollout.latents.device).unbind(1)
        log_prob = self.log_probs(policy, rollout, pairs)
        with torch.no_grad(), policy.reference():
            reference = self.log_probs(policy, rollout, pairs)
        ratio, clip = log_prob - reference, self.config.clip_range
        losses, figures = compare(ratio.clamp(math.log1p(-clip), math.log1p(clip)), self.config.beta)
        gap = (log_prob.detach() - rollout.log_probs[places]).exp() - 1
        clipped = (ratio.detach().exp() - 1).abs() > clip
        figures |= {"ratio_gap": gap.abs().view(2, -1).amax(0), "policy/clip_fraction": clipped.float().view(2, -1).mean(0)}
        return losses * handed(step_weights(rollout.table, self.config.step_weight_power)[step], losses.device), figures

    def log_probs(self, policy: Policy, rollout: Rollout, pairs: Tensor) -> Tensor:
        """Of some denoising steps, (B,), each a (sample, step)."""
        places, (sample, step) = handed(pairs, rollout.latents.device).unbind(1), pairs.unbind(1)
        x, prompts = rollout.latents[places], rollout.prompts_of(sample)
        mean, std = denoise_step(policy, rollout.table, x, step, prompts, self.guidance)
        return log_density(rollout.step_to(*places), mean, std, self.logprob_reduction)
