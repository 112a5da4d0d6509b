"""DDPO: Training Diffusion Models with Reinforcement Learning (Black et al., arXiv 2305.13301).

Denoising is a decision process of T steps: the state is (prompt, t, x_t), the action x_{t-1}, the policy the sampler's
Gaussian, and the reward comes at the end. With the advantage A of a sample, each of its steps has the loss

    score function (SF, Eq. 3)        -A * log p(x_{t-1} | x_t, c)
    importance sampling (IS, Eq. 4)   max(-A * ratio, -A * clip(ratio, 1 - e, 1 + e)),    ratio = p / p_old, per step

averaged over samples and steps. SF is on-policy: one update a step. At p = p_old the two gradients agree.

Where the paper is silent or its code departs from it, this file follows the code:
- log-probabilities are means over the latent dimensions (the equations imply sums), so the ratio is the geometric mean over
  dimensions; ``logprob_reduction`` says which, and ``clip_range`` is in its units;
- advantages are clamped (at 5, as in the PyTorch release; 10 in JAX);
- steps whose fresh noise is 0 carry no log-probability and are left out.

Where its code shuffles the samples and cuts them into updates, every ``updates_per_step`` samples in a row are shared out at
random here, one to each update: so each has its part of every prompt's samples, and of every process's.

Options that are not in the paper: ``kl_weight`` above 0 is DPOK's anchor (arXiv 2305.16381); ``window`` trains a few
denoising steps in a row, the others being the ODE's; ``step_weight_power`` weighs denoising steps by a power of their fresh
noise (1 as in TempFlow-GRPO). A step's gradient is residual / fresh^2 * dmean, about as long as 1 / fresh, so on coarse grids
the noise of the last steps drowns the rest.
"""

from torch import Tensor

from diffusionrl.algorithms.policy_gradient import SharedOut, Taken, clipped
from diffusionrl.config import DDPOConfig


class DDPO(SharedOut):
    """DDPO-IS and DDPO-SF."""

    def __init__(self, config: DDPOConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def loss(self, taken: Taken, advantage: Tensor) -> tuple[Tensor, Tensor]:
        losses, beyond = clipped(advantage, taken.ratio, self.config.clip_range)
        return (-advantage * taken.log_prob if self.config.variant == "sf" else losses), beyond
