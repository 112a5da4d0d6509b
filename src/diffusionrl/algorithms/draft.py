"""DRaFT: Directly Fine-Tuning Diffusion Models on Differentiable Rewards (arXiv 2309.17400).

The reward's gradient runs through the decoder and the last K denoising steps; before them it is stopped:

    L = -r(decode(x_0), c),        x_K = sg(x_K)

K = 1 (``last_steps``) is what the paper recommends for its cost. DRaFT-LV (``variant lv``) lowers the variance of K = 1: the
sample is noised n = 2 times to the level s of the last step, which then runs with gradient, and all n + 1 are scored:

    x = alpha_s * sg(x_0) + sigma_s * noise,        x_0' = step(x)

Second-hand: we have seen no code of the authors. The variant is as in FlowBP's repository (sd35/draft_lv.py: the noise is of
the last step's level), the rest from notes on the paper.

    diffusionrl train --algorithm.name draft --reward aesthetic
"""

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.algorithms.reward_gradient import Chain, RewardGradient
from diffusionrl.config.algorithms import DRaFTConfig


class DRaFT(RewardGradient):
    """DRaFT-K and DRaFT-LV."""

    def __init__(self, config: DRaFTConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config
        self.ends_chain = config.variant == "k"

    def plan(self, count: int, generator: torch.Generator) -> list[list[int]]:
        """Rows are (first step, a seed of the noise or -1 for none)."""
        if self.config.variant == "k":
            return [[count - self.config.last_steps, -1]]
        draws = torch.randint(2**62, (self.config.renoisings,), generator=generator).tolist()
        return [[count - 1, draw] for draw in (-1, *draws)]

    def latents(self, chain: Chain, plan: Tensor) -> Tensor:
        first, draws = int(plan[0, 0]), plan[:, 1].tolist()
        if self.config.variant == "k":
            return chain.through(first)
        x = torch.stack([_last_input(chain, row, draw) for row, draw in enumerate(draws)])
        return chain.mean(x, first)


def _last_input(chain: Chain, row: int, draw: int) -> Tensor:
    """A sample where its last step began, or noised anew to that level."""
    if draw < 0:
        return chain.stored[row, -2]
    clean = chain.stored[row, -1]
    noise = torch.randn(clean.shape, generator=seeds.torch_generator(draw, "renoising", chain.places[row])).to(clean.device)
    return chain.table.grid.levels[-1:].noisy(clean[None], noise[None])[0]
