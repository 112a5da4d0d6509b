"""What the policy gradients share: advantages, and the loss of (sample, denoising step) pairs. Their own files say where it
comes from."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusionrl.algorithms.advantages import Advantages
from diffusionrl.config.algorithms import PolicyGradientConfig
from diffusionrl.policies.base import Policy
from diffusionrl.sampling.rollout import Needs, Rollout, denoise_step
from diffusionrl.transitions import Reduction, SamplerTable, log_density


class PolicyGradient:
    """An algorithm but for its ``updates``, which say which pairs are trained when.

    Args:
        score_function: -advantage * log-probability, in place of the clipped ratio.
    """

    needs: Needs = "trajectories"
    sampled_by: str | None = None
    needs_reference = False
    needs_reward_gradient = False

    def __init__(self, config: PolicyGradientConfig, guidance: float, score_function: bool = False) -> None:
        self.settings, self.guidance, self.score_function = config, guidance, score_function
        self.micro_batch_size, self.logprob_reduction = config.micro_batch_size, config.logprob_reduction
        self.statistics = Advantages(config)
        self.copies: Mapping[str, Callable[[int], float]] = {}

    def advantages(self, rollout: Rollout) -> Tensor:
        return self.statistics.of(rollout)

    def weights(self, policy: Policy, rollout: Rollout, rows: Tensor, advantages: Tensor) -> Tensor:
        return advantages[rows[:, 0]]

    def losses(self, policy: Policy, rollout: Rollout, rows: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_gradient_losses(
            policy,
            rollout,
            rows,
            weights,
            self.guidance,
            self.logprob_reduction,
            self.settings.clip_range,
            self.score_function,
            self.settings.step_weight_power,
        )

    def state_dict(self) -> dict[str, Any]:
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics.load_state_dict(state)


def clipped_loss(advantage: Tensor, ratio: Tensor, clip_range: float) -> Tensor:
    """PPO's pessimistic loss: the ratio earns nothing beyond the clip, and is always charged."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def policy_gradient_losses(
    policy: Policy,
    rollout: Rollout,
    pairs: Tensor,
    advantages: Tensor,
    guidance: float,
    reduction: Reduction,
    clip_range: float,
    score_function: bool = False,
    step_weight_power: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair, (P,), with gradient; and figures to log, each (P,), without.

    Args:
        pairs: (sample, denoising step), (P, 2); the step's fresh noise is above 0.
        advantages: of each pair's sample, (P,).
        reduction: of log-probabilities over the latent dimensions; ``clip_range`` is in its units.
        score_function: -advantage * log-probability, in place of the clipped ratio.
        step_weight_power: a denoising step counts in proportion to (its fresh noise) ** this.
    """
    sample, step = pairs.to(rollout.latents.device).unbind(1)
    x = rollout.latents[sample, step]
    mean, std = denoise_step(policy, rollout.table, x, step, rollout.prompts_of(sample), guidance)
    log_prob = log_density(rollout.step_to(sample, step), mean, std, reduction)
    advantage = advantages.to(x.device)
    log_ratio = log_prob - rollout.log_probs[sample, step]
    ratio = log_ratio.exp()
    loss = -advantage * log_prob if score_function else clipped_loss(advantage, ratio, clip_range)
    distance = (ratio.detach() - 1).abs()
    return loss * step_weights(rollout.table, step_weight_power).to(x.device)[step], {
        "ratio_gap": distance,
        "policy/clip_fraction": (distance > clip_range).float(),
        "policy/approx_kl": 0.5 * log_ratio.detach() ** 2,
    }


def step_weights(table: SamplerTable, power: float) -> Tensor:
    """(T,), of mean 1 over the stochastic steps."""
    weights = table.fresh**power
    return weights / weights[table.fresh > 0].mean()
