"""GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping (arXiv 2510.22319).

The log-ratio of a step, a mean over the latent dimensions, is below 0 on average, and its spread depends on the step: so a clip
around 1 holds good samples and bad ones, early steps and late ones differently. With the mean m of the step's Gaussian, the one
that it was drawn from, m_old, and the drawn noise z,

    log-ratio  = mean[(m - m_old) * z] / fresh - mean[(m - m_old)^2] / (2 * fresh^2)
    ratio      = exp(fresh * (log-ratio + mean[(m - m_old)^2] / (2 * fresh^2))) = exp(mean[(m - m_old) * z])
    L          = max(-A * ratio, -A * clip(ratio, 1 - e, 1 + e)) / -dt

has no bias and one scale at all steps, and the division by the length of the step, -dt = s - s', makes their gradients about
equally long. Defaults are the authors': e = 2e-6, in units of a mean over the 65,536 latent dimensions of SD3.5 at 512 pixels;
on smaller latents it wants to be larger, 1e-4 on the embedded models.

Written for the flow SDE (``sampling.sampler flow_grpo``). On other samplers and paths, fresh is that of the step, and -dt the
fall of the noise level. Costs the means of all steps beside their latents, twice the memory of a rollout.

    diffusionrl train --preset emoji-flow --algorithm.name grpo-guard --algorithm.clip-range 1e-4
"""

from torch import Tensor

from diffusionrl.algorithms.policy_gradient import SharedOut, Taken, clipped
from diffusionrl.config.algorithms import GRPOGuardConfig
from diffusionrl.sampling.rollout import Needs


class GRPOGuard(SharedOut):
    """The clipped ratio, normalised step by step."""

    needs: Needs = "means"

    def __init__(self, config: GRPOGuardConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def loss(self, taken: Taken, advantage: Tensor) -> tuple[Tensor, Tensor]:
        ratio = (taken.fresh * (taken.log_ratio + taken.moved)).exp()
        losses, beyond = clipped(advantage, ratio, self.config.clip_range)
        return losses / taken.fall, beyond
