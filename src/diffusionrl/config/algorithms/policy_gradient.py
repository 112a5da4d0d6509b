"""The settings of the policy gradients."""

from dataclasses import dataclass
from typing import Literal

from diffusionrl.config.algorithms.advantages import AdvantageConfig, Normalisation
from diffusionrl.errors import require


@dataclass(frozen=True)
class PolicyGradientConfig(AdvantageConfig):
    """What the policy gradients have in common."""

    clip_range: float = 1e-4
    """Clip of the per-step ratio, in units of ``logprob_reduction``: with the mean, clip_range * latent dimensions is the
    clip of the true log-ratio, 1.6 in the paper's setting of 16,384 dimensions."""
    logprob_reduction: Literal["mean", "sum"] = "mean"
    """How a log-probability runs over the latent dimensions."""
    step_weight_power: float = 0.0
    """A denoising step counts in proportion to (its fresh noise) ** this: 0, as published, all alike; 1, their gradients
    are about equally long; 2, the last steps, which have hardly any fresh noise, hardly count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.clip_range > 0, f"algorithm.clip_range must be positive, not {self.clip_range}")
        require(self.step_weight_power >= 0, f"algorithm.step_weight_power must not be negative, not {self.step_weight_power}")


@dataclass(frozen=True)
class DDPOConfig(PolicyGradientConfig):
    """DDPO; see docs/ddpo.md."""

    name: Literal["ddpo"] = "ddpo"
    """The algorithm."""
    variant: Literal["is", "sf"] = "is"
    """Importance sampling with clipping, several updates a step; or score function (REINFORCE), one update a step."""
    updates_per_step: int = 4
    """Optimizer steps on the samples of one step. "sf" takes exactly 1."""
    train_fraction: float = 1.0
    """Share of the denoising steps that is trained, drawn anew for every sample; less is faster and noisier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.train_fraction <= 1, f"algorithm.train_fraction must lie in (0, 1], not {self.train_fraction}")
        require(self.updates_per_step >= 1, f"algorithm.updates_per_step must be at least 1, not {self.updates_per_step}")
        require(
            self.variant == "is" or self.updates_per_step == 1,
            f"algorithm.variant 'sf' is on-policy: set algorithm.updates_per_step to 1, not {self.updates_per_step}",
        )


@dataclass(frozen=True)
class DiffusionRLConfig(PolicyGradientConfig):
    """DiffusionRL; see docs/diffusionrl.md."""

    name: Literal["diffusionrl"] = "diffusionrl"
    """The algorithm."""
    advantage_clip: float = 10.0
    normalisation: Normalisation = "batch"
    timesteps_per_step: int = 5
    """Denoising steps that are trained in a training step, the same for all samples, one optimizer step each."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on the samples of one step."""
        return self.timesteps_per_step

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.timesteps_per_step >= 1, f"algorithm.timesteps_per_step must be at least 1, not {self.timesteps_per_step}")

    def check_steps(self, stochastic: int) -> None:
        """Raises UserError where the sampler has fewer steps with fresh noise than are to be drawn."""
        require(
            self.timesteps_per_step <= stochastic,
            f"algorithm.timesteps_per_step is {self.timesteps_per_step}, but only {stochastic} steps of the sampler have "
            "fresh noise: lower it, or raise sampling.num_steps",
        )
