"""The settings of the preference objectives: samples that were chosen against samples that were rejected."""

from dataclasses import dataclass
from typing import Literal

from diffusionrl.config.algorithms.advantages import Normalisation
from diffusionrl.config.algorithms.forward_process import ForwardProcessConfig
from diffusionrl.config.algorithms.policy_gradient import PolicyGradientConfig
from diffusionrl.errors import require


@dataclass(frozen=True)
class DPOConfig(ForwardProcessConfig):
    """Diffusion-DPO; see docs/preference.md."""

    name: Literal["dpo"] = "dpo"
    """The algorithm. Scores tell who has won, no more: normalisation and advantage_clip are not used."""
    beta: float = 5000.0
    """How sharply a pair is told apart before it counts less: the smaller, the further from the reference model."""
    pairs_per_group: int = 1
    """Of the samples of a prompt: the best against the worst, the second best against the second worst, and so on."""

    @property
    def compares_groups(self) -> bool:
        """Always: pairs are made in them."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pairs(self)


@dataclass(frozen=True)
class KTOConfig(ForwardProcessConfig):
    """Diffusion-KTO; see docs/preference.md."""

    name: Literal["kto"] = "kto"
    """The algorithm. Of advantages, the sign alone counts."""
    beta: float = 1000.0
    """How sharply a sample is told from the reference model's before it counts less."""
    utility: Literal["kahneman-tversky", "loss-averse", "risk-seeking"] = "kahneman-tversky"
    """What a gain is worth: gains and losses fade alike, losses never do, or gains never do."""
    rejected_weight: float = 1.0
    """What a sample that is not wanted counts, where one that is wanted counts 1."""

    @property
    def compares_groups(self) -> bool:
        """Always: labels are told in them."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"algorithm.beta must be positive, not {self.beta}")
        require(self.rejected_weight >= 0, f"algorithm.rejected_weight must not be negative, not {self.rejected_weight}")


@dataclass(frozen=True)
class D3POConfig(PolicyGradientConfig):
    """D3PO; see docs/preference.md."""

    name: Literal["d3po"] = "d3po"
    """The algorithm. Scores tell who has won, no more: advantage_clip is not used."""
    clip_range: float = 0.1
    """Clip of a denoising step's ratio to the reference model, in units of ``logprob_reduction``."""
    normalisation: Normalisation = "group"
    beta: float = 0.1
    """How sharply a pair is told apart before it counts less, in units of ``logprob_reduction``."""
    pairs_per_group: int = 1
    """Of the samples of a prompt: the best against the worst, the second best against the second worst, and so on."""
    updates_per_step: int = 1
    """Optimizer steps on the samples of one step; groups are shared out among them."""

    @property
    def compares_groups(self) -> bool:
        """Always: pairs are made in them."""
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.kl_weight == 0, f"algorithm.kl_weight is not for {self.name}, whose loss holds the reference model already"
        )
        require(self.clip_range < 1, f"algorithm.clip_range must be below 1, not {self.clip_range}")
        require(self.updates_per_step >= 1, f"algorithm.updates_per_step must be at least 1, not {self.updates_per_step}")
        _check_pairs(self)


@dataclass(frozen=True)
class PSOConfig(D3POConfig):
    """Online PSO; see docs/preference.md."""

    name: Literal["pso"] = "pso"  # type: ignore[assignment]
    """The algorithm. Scores tell which sample is the target, no more: advantage_clip is not used."""
    beta: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window.size == 0, "algorithm.window is not for pso, which trains the whole of a short chain")


@dataclass(frozen=True)
class OfflinePSOConfig(DPOConfig):
    """Offline PSO; see docs/preference.md."""

    name: Literal["pso-offline"] = "pso-offline"  # type: ignore[assignment]
    """The algorithm. Scores tell which sample is the target, no more: normalisation and advantage_clip are not used."""
    beta: float = 5.0
    retain: float = 0.5
    """Weight of the denoising loss on the model's own samples, against forgetting."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.retain >= 0, f"algorithm.retain must not be negative, not {self.retain}")


def _check_pairs(config: DPOConfig | D3POConfig) -> None:
    require(config.beta > 0, f"algorithm.beta must be positive, not {config.beta}")
    require(config.pairs_per_group >= 1, f"algorithm.pairs_per_group must be at least 1, not {config.pairs_per_group}")
