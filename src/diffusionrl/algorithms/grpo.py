"""Flow-GRPO: Training Flow Matching Models via Online RL (Liu et al., arXiv 2505.05470).

DDPO's decision process (``ddpo.py``) on flows made stochastic, with advantages relative to a prompt's own samples in the step,
and an anchor to the model that training began from. With the advantage A of a sample, each of its denoising steps has the loss

    max(-A * ratio, -A * clip(ratio, 1 - e, 1 + e)) + beta * KL,        ratio = p(x' | x, c) / p_old(x' | x, c)
    A  = (r - mean of the prompt's samples) / standard deviation of the step, clamped to plus or minus 5
    KL = |mean - mean_ref|^2 / (2 * fresh^2),        of the step's Gaussian to the reference's, a mean over the dimensions

Defaults are the authors': e = 1e-4, beta = 0.04 (0.01 for PickScore), two updates a step. Their sampler is ``flow_grpo`` with
eta 0.7 (``sampling.sampler``); the loss is the same on any other with fresh noise. With DDIM on Stable Diffusion it is DDPO
with DPOK's anchor; with ``dance_grpo``, ``shared_start``, ``train_fraction`` 0.6, ``kl_weight`` 0 and ``normalisation`` "group"
it is DanceGRPO (arXiv 2505.07818).

The paper's KL is that of the Gaussians, as here. Its code leaves the length of the step, -dt, out of the variance, so what it
adds is -dt times as much: about a tenth on ten steps. For the code's strength, divide ``kl_weight`` by the number of steps.

Deviations: whole groups stay in the mean where all scores are equal (their advantages are 0); the code drops them.

    diffusionrl train --preset emoji-flow --algorithm.name grpo --algorithm.clip-range 1e-3 --algorithm.step-weight-power 2
"""

from torch import Tensor

from diffusionrl.algorithms.policy_gradient import SharedOut, Taken, clipped
from diffusionrl.config.algorithms import GRPOConfig


class GRPO(SharedOut):
    """The clipped ratio with an anchor."""

    def __init__(self, config: GRPOConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config, self.shared_start = config, config.shared_start

    def loss(self, taken: Taken, advantage: Tensor) -> tuple[Tensor, Tensor]:
        return clipped(advantage, taken.ratio, self.config.clip_range)
