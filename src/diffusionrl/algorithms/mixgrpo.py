"""MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE (arXiv 2507.21802).

The clipped ratio of DDPO and Flow-GRPO in a window of w denoising steps: fresh noise is drawn and trained inside, the ODE runs
outside. The window begins at the noisy end and moves towards the clean one, by a stride every so many training steps
(``window.moves`` "progressive"); or is drawn anew in every training step ("random"); or stays ("frozen").

Defaults are the authors': w = 4 (of 25 steps), a stride of 1 every 25 training steps, clip 1e-4, advantages relative to a
prompt's samples in their own standard deviations, no anchor.

Second-hand: from notes on the code, whose number of updates we have not seen (two here, as in Flow-GRPO). What its window does
at the end of the sampler depends on an option there; here it begins again. Not here: the interval that shrinks as the window
moves on, and MixGRPO-Flash, which takes fewer steps of a higher order after the window.

A run must be long enough for the window to move: 25 training steps for each place. Shorter ones want a smaller
``window.every``.

    diffusionrl train --preset emoji-flow --algorithm.name mixgrpo --algorithm.window.every 3 --algorithm.clip-range 1e-3
"""

from torch import Tensor

from diffusionrl.algorithms.policy_gradient import SharedOut, Taken, clipped
from diffusionrl.config.algorithms import MixGRPOConfig


class MixGRPO(SharedOut):
    """The clipped ratio in a window that slides."""

    def __init__(self, config: MixGRPOConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config

    def loss(self, taken: Taken, advantage: Tensor) -> tuple[Tensor, Tensor]:
        return clipped(advantage, taken.ratio, self.config.clip_range)
