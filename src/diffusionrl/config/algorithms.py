"""The settings of each algorithm, as frozen dataclasses. Nothing here imports torch."""

from dataclasses import dataclass
from math import inf
from typing import Literal

from diffusionrl.errors import require


@dataclass(frozen=True)
class PolicyGradientConfig:
    """What the policy gradients have in common."""

    clip_range: float = 1e-4
    """Clip of the per-step ratio, in units of ``logprob_reduction``: with the mean, clip_range * latent dimensions is the
    clip of the true log-ratio, 1.6 in the paper's setting of 16,384 dimensions."""
    logprob_reduction: Literal["mean", "sum"] = "mean"
    """How a log-probability runs over the latent dimensions."""
    advantage_clip: float = 5.0
    """Advantages are clamped to plus or minus this."""
    normalisation: Literal["prompt", "batch", "group"] = "prompt"
    """Advantages relative to a prompt's recent rewards, to the whole step, or to the samples of one prompt in the step."""
    buffer_size: int = 32
    """Rewards remembered for each prompt ("prompt" only)."""
    min_count: int = 16
    """A prompt with fewer remembered rewards uses the statistics of the whole step ("prompt" only)."""
    step_weight_power: float = 0.0
    """A denoising step counts in proportion to (its fresh noise) ** this: 0, as published, all alike; 1, their gradients
    are about equally long; 2, the last steps, which have hardly any fresh noise, hardly count."""
    micro_batch_size: int = 32
    """(sample, denoising step) pairs in one forward pass of an update: memory and speed, not results."""

    def __post_init__(self) -> None:
        require(self.clip_range > 0, f"algorithm.clip_range must be positive, not {self.clip_range}")
        require(self.advantage_clip > 0, f"algorithm.advantage_clip must be positive, not {self.advantage_clip}")
        require(
            0 <= self.step_weight_power < inf,
            f"algorithm.step_weight_power must not be negative or infinite, not {self.step_weight_power}",
        )
        require(self.micro_batch_size >= 1, f"algorithm.micro_batch_size must be at least 1, not {self.micro_batch_size}")
        require(
            1 <= self.min_count <= self.buffer_size,
            f"algorithm.min_count must lie between 1 and buffer_size ({self.buffer_size}), not {self.min_count}",
        )


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
class RWRConfig:
    """Reward-weighted regression; see docs/rwr.md."""

    name: Literal["rwr"] = "rwr"
    """The algorithm."""
    variant: Literal["rwr", "sparse"] = "rwr"
    """Samples weighted by exp(inverse_temperature * reward); or the best ones alone, all alike."""
    inverse_temperature: float = 0.2
    """In units of 1 / reward: 0.2 is for kilobytes ("rwr" only)."""
    percentile: float = 0.9
    """Rewards at or above it are trained on ("sparse" only)."""
    normalisation: Literal["prompt", "batch"] = "prompt"
    """Weights over the samples of one prompt, or of the whole step. One sample alone always has weight 1."""
    updates_per_step: int = 400
    """Optimizer steps on the samples of one step."""
    batch_size: int = 128
    """Samples in one optimizer step, each at a time of its own."""
    train_guided: bool = True
    """Train the guided prediction; False trains the one with the prompt alone, and still samples with guidance."""
    micro_batch_size: int = 32
    """Samples in one forward pass of an update: memory and speed, not results."""

    def __post_init__(self) -> None:
        require(self.inverse_temperature > 0, f"algorithm.inverse_temperature must be positive, not {self.inverse_temperature}")
        require(0 <= self.percentile <= 1, f"algorithm.percentile must lie in [0, 1], not {self.percentile}")
        require(self.updates_per_step >= 1, f"algorithm.updates_per_step must be at least 1, not {self.updates_per_step}")
        require(self.batch_size >= 1, f"algorithm.batch_size must be at least 1, not {self.batch_size}")
        require(self.micro_batch_size >= 1, f"algorithm.micro_batch_size must be at least 1, not {self.micro_batch_size}")


@dataclass(frozen=True)
class DiffusionRLConfig(PolicyGradientConfig):
    """DiffusionRL; see docs/diffusionrl.md."""

    name: Literal["diffusionrl"] = "diffusionrl"
    """The algorithm."""
    advantage_clip: float = 10.0
    normalisation: Literal["prompt", "batch", "group"] = "batch"
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


AlgorithmConfig = DDPOConfig | RWRConfig | DiffusionRLConfig
ALGORITHMS: dict[str, type[AlgorithmConfig]] = {"ddpo": DDPOConfig, "diffusionrl": DiffusionRLConfig, "rwr": RWRConfig}
