"""The settings of the forward-process objectives: regressions on endpoints that are noised anew."""

import math
from dataclasses import dataclass, field
from typing import Literal

from diffusionrl.config.algorithms.advantages import AdvantageConfig, Normalisation
from diffusionrl.config.checks import check_values
from diffusionrl.errors import require


@dataclass(frozen=True)
class CopySchedule:
    """Decay of an older copy before each training step: start + growth * (steps done - flat), between start and limit."""

    start: float = 0.0
    flat: int = 0
    growth: float = 0.001
    limit: float = 0.5

    def __call__(self, done: int) -> float:
        """After so many training steps."""
        return min(self.start + self.growth * max(0, done - self.flat), self.limit)

    def __post_init__(self) -> None:
        check_values(self, "algorithm.older.")
        require(0 <= self.start <= self.limit < 1, f"a copy's decay must lie in [0, 1), not {self.start} to {self.limit}")
        require(self.growth >= 0 and self.flat >= 0, "a copy's growth and flat steps must not be negative")


@dataclass(frozen=True)
class ForwardProcessConfig(AdvantageConfig):
    """What the forward-process objectives have in common."""

    normalisation: Normalisation = "group-mean"
    noisings: int = 4
    """Fresh noise levels of each endpoint in an update, one in each of so many equal parts of the model's own grid; they and
    the noise are the same for all samples of a group."""
    levels: tuple[float, float] = (0.0, 1.0)
    """Part of the model's own grid that noise levels are drawn from; 0 is its noisy end."""
    train_guided: bool = False
    """Train the guided prediction; False trains the one with the prompt alone, whatever samples are drawn with."""
    updates_per_step: int = 1
    """Optimizer steps on the samples of one step; groups are shared out among them."""
    reference_weight: float = 0.0
    """Weight of the squared distance from the reference model's prediction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.levels
        require(self.noisings >= 1, f"algorithm.noisings must be at least 1, not {self.noisings}")
        require(0 <= low < high <= 1, f"algorithm.levels must be two rising numbers in [0, 1], not {self.levels}")
        require(self.updates_per_step >= 1, f"algorithm.updates_per_step must be at least 1, not {self.updates_per_step}")
        require(self.reference_weight >= 0, f"algorithm.reference_weight must not be negative, not {self.reference_weight}")


@dataclass(frozen=True)
class NFTConfig(ForwardProcessConfig):
    """DiffusionNFT; see docs/forward_process.md."""

    name: Literal["nft"] = "nft"
    """The algorithm."""
    noisings: int = 10
    reference_weight: float = 1e-4
    mixing: float = 1.0
    """The implicit policies are old + mixing * (new - old) and old - mixing * (new - old)."""
    older: CopySchedule = field(default_factory=CopySchedule)
    """The copy that samples and that the implicit policies lean on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mixing > 0, f"algorithm.mixing must be positive, not {self.mixing}")


@dataclass(frozen=True)
class AWMConfig(ForwardProcessConfig):
    """Advantage Weighted Matching; see docs/forward_process.md."""

    name: Literal["awm"] = "awm"
    """The algorithm."""
    noisings: int = 6
    levels: tuple[float, float] = (0.0, 0.9)
    reference_weight: float = 1e-3
    clip_range: float = 1.0
    """Clip of the ratio; 1 hardly clips."""
    likelihood: Literal["plain", "time", "time-squared", "huber", "ghuber"] = "ghuber"
    """What the training loss is turned into before it stands in for a log-likelihood."""
    older_weight: float = 1.0
    """Weight of the squared distance from the average."""
    older: CopySchedule = field(default_factory=lambda: CopySchedule(limit=0.3))
    """The average of the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.clip_range > 0, f"algorithm.clip_range must be positive, not {self.clip_range}")
        require(self.older_weight >= 0, f"algorithm.older_weight must not be negative, not {self.older_weight}")


@dataclass(frozen=True)
class RAMConfig(ForwardProcessConfig):
    """RAM; see docs/forward_process.md."""

    name: Literal["ram"] = "ram"
    """The algorithm."""
    noisings: int = 8
    advantage_clip: float = math.inf
    reward_scale: float = 100.0
    """m: how far the target lies from the reference model's prediction, for an advantage of 1."""
    older: CopySchedule = field(default_factory=lambda: CopySchedule(growth=0.01, limit=0.9))
    """The copy that samples and that the target leans on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.reward_scale > 0, f"algorithm.reward_scale must be positive, not {self.reward_scale}")


@dataclass(frozen=True)
class FlowAWRConfig(ForwardProcessConfig):
    """FlowAWR; see docs/forward_process.md."""

    name: Literal["flow-awr"] = "flow-awr"
    """The algorithm. Its advantages are a softmax over each prompt's samples: normalisation and advantage_clip are not used."""
    reference_weight: float = 1e-4
    older: CopySchedule = field(default_factory=CopySchedule)
    """The copy that samples and that the target leans on."""


@dataclass(frozen=True)
class VGRPOConfig(ForwardProcessConfig):
    """V-GRPO; see docs/forward_process.md."""

    name: Literal["v-grpo"] = "v-grpo"
    """The algorithm."""
    advantage_clip: float = math.inf
    soft_clip: float = 3.0
    """Advantages become soft_clip * tanh(advantage / soft_clip)."""
    clip_range: float = math.inf
    """Clip of the ratio, where a step has several updates."""
    behaviour_weight: float = 0.0
    """Weight of the squared distance of x0 from the estimate of the policy that the step began with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.soft_clip > 0, f"algorithm.soft_clip must be positive, not {self.soft_clip}")
        require(self.clip_range > 0, f"algorithm.clip_range must be positive, not {self.clip_range}")
        require(self.behaviour_weight >= 0, f"algorithm.behaviour_weight must not be negative, not {self.behaviour_weight}")


@dataclass(frozen=True)
class EPGConfig(ForwardProcessConfig):
    """EPG; see docs/forward_process.md."""

    name: Literal["epg"] = "epg"
    """The algorithm. Its advantages are less the prompt's mean, no more: normalisation and advantage_clip are not used."""


@dataclass(frozen=True)
class DGPOConfig(ForwardProcessConfig):
    """DGPO; see docs/forward_process.md."""

    name: Literal["dgpo"] = "dgpo"
    """The algorithm."""
    levels: tuple[float, float] = (0.0, 0.6)
    beta: float = 100.0
    """How sharply a group's preference is weighed against the reference model."""
    clip_range: float = 1e-3
    """Samples whose likelihood has moved by more, in the direction of their advantage, leave the loss; where a step has several
    updates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"algorithm.beta must be positive, not {self.beta}")
        require(self.clip_range > 0, f"algorithm.clip_range must be positive, not {self.clip_range}")


@dataclass(frozen=True)
class CRDConfig(ForwardProcessConfig):
    """CRD; see docs/forward_process.md."""

    name: Literal["crd"] = "crd"
    """The algorithm."""
    noisings: int = 20
    reference_weight: float = 0.1
    reference_guidance: float | None = 4.5
    """With which the reference model is asked; None: the prediction with the prompt alone."""
    beta: float = 1.0
    """Of the implied reward."""
    older: CopySchedule = field(default_factory=lambda: CopySchedule(0.25, 0, 0.005, 0.999))
    """The copy that the implied reward is measured from."""
    sampler: CopySchedule = field(default_factory=lambda: CopySchedule(0.0, 75, 0.0075, 0.999))
    """The copy that samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"algorithm.beta must be positive, not {self.beta}")


@dataclass(frozen=True)
class ORWConfig(ForwardProcessConfig):
    """ORW-CFM-W2; see docs/forward_process.md."""

    name: Literal["orw"] = "orw"
    """The algorithm. Its weights are a softmax over the step's samples: normalisation and advantage_clip are not used."""
    reference_weight: float = 1.0
    inverse_temperature: float = 0.2
    """In units of 1 / reward: 0.2 is for kilobytes."""

    @property
    def compares_groups(self) -> bool:
        """Never: it compares the step."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.inverse_temperature > 0, f"algorithm.inverse_temperature must be positive, not {self.inverse_temperature}")


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

    @property
    def compares_groups(self) -> bool:
        """Never: one sample alone has weight 1."""
        return False

    def __post_init__(self) -> None:
        check_values(self, "algorithm.")
        require(self.inverse_temperature > 0, f"algorithm.inverse_temperature must be positive, not {self.inverse_temperature}")
        require(0 <= self.percentile <= 1, f"algorithm.percentile must lie in [0, 1], not {self.percentile}")
        require(self.updates_per_step >= 1, f"algorithm.updates_per_step must be at least 1, not {self.updates_per_step}")
        require(self.batch_size >= 1, f"algorithm.batch_size must be at least 1, not {self.batch_size}")
        require(self.micro_batch_size >= 1, f"algorithm.micro_batch_size must be at least 1, not {self.micro_batch_size}")
