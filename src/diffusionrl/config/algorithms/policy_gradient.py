"""The settings of the policy gradients."""

from dataclasses import dataclass, field
from typing import Literal

from diffusionrl.config.algorithms.advantages import AdvantageConfig, Normalisation
from diffusionrl.config.checks import check_values
from diffusionrl.errors import require


@dataclass(frozen=True)
class WindowConfig:
    """Denoising steps in a row that have fresh noise and are trained, the same for all samples of a training step; the others
    are steps of the ODE."""

    size: int = 0
    """How many; 0: all steps of the sampler that have fresh noise, and no ODE."""
    moves: Literal["frozen", "random", "progressive"] = "frozen"
    """Always the first place; one drawn anew in every training step; or along the sampler, and again from the first place after
    the last one."""
    within: tuple[float, float] = (0.0, 1.0)
    """Part of the sampler's steps with fresh noise that it lies in; 0 is the noisy end."""
    stride: int = 1
    """By how many steps it moves ("progressive" only)."""
    every: int = 25
    """After how many training steps it moves ("progressive" only)."""

    def __post_init__(self) -> None:
        check_values(self, "algorithm.window.")
        low, high = self.within
        require(self.size >= 0, f"algorithm.window.size must not be negative, not {self.size}")
        require(0 <= low < high <= 1, f"algorithm.window.within must be two rising numbers in [0, 1], not {self.within}")
        require(self.stride >= 1, f"algorithm.window.stride must be at least 1, not {self.stride}")
        require(self.every >= 1, f"algorithm.window.every must be at least 1, not {self.every}")

    def places(self, steps: int) -> range:
        """Where a window may begin, among so many steps with fresh noise.

        Raises:
            UserError: it does not fit.
        """
        first, end = round(self.within[0] * steps), round(self.within[1] * steps)
        require(
            first + self.size <= end,
            f"algorithm.window.size is {self.size}, but algorithm.window.within leaves {end - first} of the {steps} steps of "
            "the sampler that have fresh noise: lower it, widen within, or raise sampling.num_steps",
        )
        return range(first, end - self.size + 1)

    def progress(self, step: int, places: int) -> int:
        """Which of the places it has in a training step, the first of which is 1."""
        return (step - 1) // self.every * self.stride % places if self.moves == "progressive" else 0


@dataclass(frozen=True)
class PolicyGradientConfig(AdvantageConfig):
    """What the policy gradients have in common."""

    logprob_reduction: Literal["mean", "sum"] = "mean"
    """How a log-probability runs over the latent dimensions."""
    step_weight_power: float = 0.0
    """A denoising step, with its anchor, counts in proportion to (its fresh noise) ** this: 0, as published, all alike; 1,
    their gradients are about equally long; 2, the last steps, which have hardly any fresh noise, hardly count."""
    kl_weight: float = 0.0
    """Weight of the KL of a denoising step's Gaussian to the reference model's, in units of ``logprob_reduction``."""
    window: WindowConfig = field(default_factory=WindowConfig)
    """Which denoising steps have fresh noise in training; evaluation takes the whole sampler."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.step_weight_power >= 0, f"algorithm.step_weight_power must not be negative, not {self.step_weight_power}")
        require(self.kl_weight >= 0, f"algorithm.kl_weight must not be negative, not {self.kl_weight}")

    def check_steps(self, stochastic: int) -> None:
        """Raises UserError where the sampler has fewer steps with fresh noise than are to be trained."""
        self.window.places(stochastic)


@dataclass(frozen=True)
class SharedOutConfig(PolicyGradientConfig):
    """Of policy gradients whose samples are shared out among the updates of a step."""

    updates_per_step: int = 2
    """Optimizer steps on the samples of one step."""
    train_fraction: float = 1.0
    """Share of the denoising steps that is trained, drawn anew for every sample; less is faster and noisier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.train_fraction <= 1, f"algorithm.train_fraction must lie in (0, 1], not {self.train_fraction}")
        require(self.updates_per_step >= 1, f"algorithm.updates_per_step must be at least 1, not {self.updates_per_step}")


@dataclass(frozen=True)
class ClippedConfig(SharedOutConfig):
    """Of those whose ratio is clipped."""

    clip_range: float = 1e-4
    """Clip of the per-step ratio, in units of ``logprob_reduction``: with the mean, clip_range * latent dimensions is the
    clip of the true log-ratio, 1.6 in DDPO's setting of 16,384 dimensions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.clip_range > 0, f"algorithm.clip_range must be positive, not {self.clip_range}")


@dataclass(frozen=True)
class DDPOConfig(ClippedConfig):
    """DDPO; see docs/ddpo.md."""

    name: Literal["ddpo"] = "ddpo"
    """The algorithm."""
    variant: Literal["is", "sf"] = "is"
    """Importance sampling with clipping, several updates a step; or score function (REINFORCE), one update a step."""
    updates_per_step: int = 4
    """Optimizer steps on the samples of one step. "sf" takes exactly 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
    clip_range: float = 1e-4
    """Clip of the per-step ratio, in units of ``logprob_reduction``."""
    timesteps_per_step: int = 5
    """Denoising steps that are trained in a training step, the same for all samples, one optimizer step each."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on the samples of one step."""
        return self.timesteps_per_step

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.clip_range > 0, f"algorithm.clip_range must be positive, not {self.clip_range}")
        require(self.timesteps_per_step >= 1, f"algorithm.timesteps_per_step must be at least 1, not {self.timesteps_per_step}")

    def check_steps(self, stochastic: int) -> None:
        super().check_steps(stochastic)
        trained = self.window.size or stochastic
        require(
            self.timesteps_per_step <= trained,
            f"algorithm.timesteps_per_step is {self.timesteps_per_step}, but only {trained} steps of the sampler have "
            "fresh noise: lower it, or raise sampling.num_steps",
        )


@dataclass(frozen=True)
class GRPOConfig(ClippedConfig):
    """Flow-GRPO; see docs/policy_gradient.md."""

    name: Literal["grpo"] = "grpo"
    """The algorithm."""
    normalisation: Normalisation = "group-mean"
    kl_weight: float = 0.04
    shared_start: bool = False
    """All samples of a group begin at the same noise (DanceGRPO)."""


@dataclass(frozen=True)
class GRPOFastConfig(ClippedConfig):
    """Flow-GRPO-Fast; see docs/policy_gradient.md."""

    name: Literal["grpo-fast"] = "grpo-fast"
    """The algorithm."""
    normalisation: Normalisation = "group-mean"
    clip_range: float = 1e-5
    window: WindowConfig = field(default_factory=lambda: WindowConfig(2, "random", (0.0, 0.5)))


@dataclass(frozen=True)
class MixGRPOConfig(ClippedConfig):
    """MixGRPO; see docs/policy_gradient.md."""

    name: Literal["mixgrpo"] = "mixgrpo"
    """The algorithm."""
    normalisation: Normalisation = "group"
    window: WindowConfig = field(default_factory=lambda: WindowConfig(4, "progressive"))


@dataclass(frozen=True)
class GRPOGuardConfig(ClippedConfig):
    """GRPO-Guard; see docs/policy_gradient.md."""

    name: Literal["grpo-guard"] = "grpo-guard"
    """The algorithm."""
    normalisation: Normalisation = "group-mean"
    clip_range: float = 2e-6
    """Clip of the normalised ratio."""
    kl_weight: float = 0.0


@dataclass(frozen=True)
class FlowDPPOConfig(SharedOutConfig):
    """Flow-DPPO; see docs/policy_gradient.md."""

    name: Literal["flow-dppo"] = "flow-dppo"
    """The algorithm."""
    normalisation: Normalisation = "group-mean"
    divergence: float = 1e-5
    """Denoising steps whose policy is further from the one that sampled leave the loss where they would go further still; in
    units of KL * (fall of the noise level in the step)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.divergence > 0, f"algorithm.divergence must be positive, not {self.divergence}")


@dataclass(frozen=True)
class TempFlowConfig(ClippedConfig):
    """TempFlow-GRPO; see docs/policy_gradient.md."""

    name: Literal["tempflow"] = "tempflow"
    """The algorithm."""
    normalisation: Normalisation = "group"
    window: WindowConfig = field(default_factory=lambda: WindowConfig(1, "random"))
    """Where the samples of a group part: before it, they are one."""
    noise_weight: float = 2.25
    """A denoising step counts this times its fresh noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.compares_groups and self.window.size > 0,
            "algorithm tempflow compares branches of one prefix: algorithm.normalisation must be 'group' or 'group-mean', and "
            f"algorithm.window.size at least 1, not {self.normalisation!r} and {self.window.size}",
        )
        require(self.noise_weight > 0, f"algorithm.noise_weight must be positive, not {self.noise_weight}")
