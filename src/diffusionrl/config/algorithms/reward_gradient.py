"""The settings of the reward gradients: rewards differentiated through the decoder and a part of the chain."""

import math
from dataclasses import dataclass
from typing import Literal

from diffusionrl.config.checks import check_values
from diffusionrl.errors import require


@dataclass(frozen=True)
class RewardGradientConfig:
    """What the reward gradients have in common."""

    target: float = math.inf
    """A score beyond it teaches nothing: the loss is -min(score, target)."""
    reference_weight: float = 0.0
    """Weight of the squared distance from the reference model's prediction, at the first of a sample's trained steps."""
    micro_batch_size: int = 8
    """Rows of work in one forward pass of an update: memory and speed, not results."""

    @property
    def compares_groups(self) -> bool:
        """Never: a sample's own gradient teaches."""
        return False

    def check_steps(self, count: int) -> None:
        """Raises UserError where a sampler of ``count`` denoising steps has not what is to be trained."""

    def __post_init__(self) -> None:
        check_values(self, "algorithm.")
        require(not math.isnan(self.target), "algorithm.target must be a number")
        require(self.reference_weight >= 0, f"algorithm.reference_weight must not be negative, not {self.reference_weight}")
        require(self.micro_batch_size >= 1, f"algorithm.micro_batch_size must be at least 1, not {self.micro_batch_size}")


def _require_steps(setting: str, wanted: int, count: int, have: str = "the sampler takes") -> None:
    require(
        wanted <= count, f"algorithm.{setting} is {wanted}, and {have} {count} steps: lower it, or raise sampling.num_steps"
    )


@dataclass(frozen=True)
class DRaFTConfig(RewardGradientConfig):
    """DRaFT; see docs/reward_gradient.md."""

    name: Literal["draft"] = "draft"
    """The algorithm."""
    variant: Literal["k", "lv"] = "k"
    """The last ``last_steps``; or the last one alone, and as many more as ``renoisings`` of its sample."""
    last_steps: int = 1
    """Denoising steps at the end of the chain that are differentiated ("k" only): memory grows with them."""
    renoisings: int = 2
    """Of each sample, to the noise level of the last step ("lv" only)."""

    def check_steps(self, count: int) -> None:
        _require_steps("last_steps", self.last_steps, count)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.last_steps >= 1, f"algorithm.last_steps must be at least 1, not {self.last_steps}")
        require(self.renoisings >= 1, f"algorithm.renoisings must be at least 1, not {self.renoisings}")


@dataclass(frozen=True)
class AlignPropConfig(RewardGradientConfig):
    """AlignProp; see docs/reward_gradient.md."""

    name: Literal["alignprop"] = "alignprop"
    """The algorithm."""
    most_steps: int | None = None
    """As many of the last steps are differentiated at most; None: all."""

    def check_steps(self, count: int) -> None:
        _require_steps("most_steps", self.most_steps or 1, count)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.most_steps is None or self.most_steps >= 1, f"algorithm.most_steps must be at least 1, not {self.most_steps}"
        )


@dataclass(frozen=True)
class ReFLConfig(RewardGradientConfig):
    """ReFL; see docs/reward_gradient.md."""

    name: Literal["refl"] = "refl"
    """The algorithm."""
    late: float = 0.25
    """Share of the steps, at the end of the chain, of which one is trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.late <= 1, f"algorithm.late must lie in (0, 1], not {self.late}")


@dataclass(frozen=True)
class DRTuneConfig(RewardGradientConfig):
    """DRTune; see docs/reward_gradient.md."""

    name: Literal["drtune"] = "drtune"
    """The algorithm."""
    trained_steps: int = 3
    """Denoising steps that are trained, equally spaced."""
    early_stop: float = 0.4
    """Share of the steps, at the end of the chain, of which one is the last: what is seen there is scored."""

    def last(self, count: int) -> int:
        """How many of the last steps the chain may stop at."""
        return max(1, round(count * self.early_stop))

    def check_steps(self, count: int) -> None:
        shortest = count - self.last(count) + 1
        _require_steps("trained_steps", self.trained_steps, shortest, "the shortest chain that algorithm.early_stop leaves has")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.trained_steps >= 1, f"algorithm.trained_steps must be at least 1, not {self.trained_steps}")
        require(0 <= self.early_stop <= 1, f"algorithm.early_stop must lie in [0, 1], not {self.early_stop}")


@dataclass(frozen=True)
class FlowBPConfig(RewardGradientConfig):
    """FlowBP-Sparse; see docs/reward_gradient.md."""

    name: Literal["flowbp"] = "flowbp"
    """The algorithm."""
    trained_steps: int = 4
    """Denoising steps that are trained."""
    late_bias: float = 1.0
    """Step i of the chain, from 1, is drawn with a weight of i ** this."""
    rescale: float = 0.5
    """How far the gradient is scaled to stand for the steps that are not trained: 0 not at all, 1 fully."""

    def check_steps(self, count: int) -> None:
        _require_steps("trained_steps", self.trained_steps, count)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.trained_steps >= 1, f"algorithm.trained_steps must be at least 1, not {self.trained_steps}")
        require(self.late_bias >= 0, f"algorithm.late_bias must not be negative, not {self.late_bias}")
        require(self.rescale >= 0, f"algorithm.rescale must not be negative, not {self.rescale}")
