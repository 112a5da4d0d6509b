"""Flow-GRPO-Fast: Flow-GRPO (``grpo.py``) on a few denoising steps (the authors' repository, yifan123/flow_grpo).

In every training step, a window of two denoising steps in a row is drawn, the same for all samples, in the earlier half of the
sampler. There, fresh noise is drawn and the clipped ratio is trained; all other steps are the ODE's. So what tells the samples
of a group apart, beside their beginnings, is what is trained, and an update takes 2 steps of each sample, not 10.

As in its settings: no anchor (beta 0), a clip of 1e-5, two updates a step; its sampler is ``cps`` with eta 0.8, without
guidance.

Second-hand: the settings are from notes on the code. Deviation: the code draws a window for each batch of a process, here it is
the same for all of a training step; samples whose advantage is 0 stay in the mean, the code drops them.

    diffusionrl train --preset emoji-flow --algorithm.name grpo-fast --algorithm.clip-range 1e-3
"""

from torch import Tensor

from diffusionrl.algorithms.policy_gradient import SharedOut, Taken, clipped
from diffusionrl.config.algorithms import GRPOFastConfig


class GRPOFast(SharedOut):
    """The clipped ratio in a window that is drawn anew in every training step."""

    def __init__(self, config: GRPOFastConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def loss(self, taken: Taken, advantage: Tensor) -> tuple[Tensor, Tensor]:
        return clipped(advantage, taken.ratio, self.config.clip_range)
