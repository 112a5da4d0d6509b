"""What the policy gradients share: the loss of (sample, denoising step) pairs. Their own files say where it comes from."""

import torch
from torch import Tensor

from diffusionrl.policies.base import Policy
from diffusionrl.rollout import Rollout, denoise_step
from diffusionrl.transitions import Reduction, SamplerTable, log_density


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
        reduction: of log-probabilities over the latent dimensions; ``clip_range`` is in its units.
        score_function: -advantage * log-probability, in place of the clipped ratio.
        step_weight_power: a denoising step counts in proportion to (its fresh noise) ** this.
    """
    sample, step = pairs.to(rollout.latents.device).unbind(1)
    x, following = rollout.latents[sample, step], rollout.latents[sample, step + 1]
    mean, std = denoise_step(policy, rollout.table, x, step, rollout.embeddings[sample], guidance)
    log_prob = log_density(following, mean, std, reduction)
    advantage = advantages.to(x.device)[sample]
    log_ratio = log_prob - rollout.log_probs[sample, step]
    ratio = log_ratio.exp()
    loss = -advantage * log_prob if score_function else clipped_loss(advantage, ratio, clip_range)
    distance = (ratio.detach() - 1).abs()
    return loss * _step_weights(rollout.table, step_weight_power).to(x.device)[step], {
        "ratio_gap": distance,
        "policy/clip_fraction": (distance > clip_range).float(),
        "policy/approx_kl": 0.5 * log_ratio.detach() ** 2,
    }


def _step_weights(table: SamplerTable, power: float) -> Tensor:
    """(T,), of mean 1 over the stochastic steps."""
    weights = table.fresh**power
    return weights / weights[table.fresh > 0].mean()
