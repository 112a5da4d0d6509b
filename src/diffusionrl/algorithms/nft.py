"""DiffusionNFT: Online Diffusion Reinforcement with Forward Process (arXiv 2509.16117).

The policy is a step along a direction from an older copy of itself, towards what scored well. With r in [0, 1] how good a
sample is, its velocity v = noise - x0 and the mixing b, two implicit policies are regressed on it:

    v+ = (1 - b) * v_old + b * v_theta,        v- = (1 + b) * v_old - b * v_theta
    L  = r * |v+ - v|^2 + (1 - r) * |v- - v|^2

At v_theta = v_old the gradient is (2r - 1) * b times that of the denoising loss: good samples attract, bad ones repel. The copy
samples, and follows the policy before each step with a decay of min(0.001 * steps, 0.5).

As in the authors' code:
- r = clip(A / 10 + 1/2, 0, 1), with A the advantage relative to the prompt's samples in standard deviations of the step,
  clamped at 5; the loss is multiplied by 5 / b (the paper: r from A / Z in [-1, 1], without the factor; AdamW divides it out);
- errors are those of x0, divided by their own mean absolute value, without gradient: all noise levels count about alike;
- the distance from the reference model has weight 1e-4 (``reference_weight``).

Deviation: levels are stratified over the whole grid; the code trains at 99 % of the times that it samples on. On
variance-preserving paths the same formulas hold for x0.

    diffusionrl train --algorithm.name nft
"""

from torch import Tensor

from diffusionrl.algorithms.forward_process import ForwardProcess, Point, relative_error
from diffusionrl.config.algorithms import NFTConfig


class NFT(ForwardProcess):
    """DiffusionNFT."""

    sampled_by = "older"

    def __init__(self, config: NFTConfig, guidance: float) -> None:
        super().__init__(config, guidance)
        self.config = config
        self.copies["older"] = config.older

    def loss(self, point: Point, weights: Tensor) -> Tensor:
        largest, mixing = self.config.advantage_clip, self.config.mixing
        older, true = point.others["older"].x0, point.at.true.x0
        good = (weights / largest / 2 + 0.5).clamp(0, 1)
        step = mixing * (point.own.x0 - older)
        towards, away = relative_error(older + step, true), relative_error(older - step, true)
        return (good * towards + (1 - good) * away) * largest / mixing
