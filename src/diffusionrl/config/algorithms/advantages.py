"""How scores become advantages, which most algorithms have in common."""

from dataclasses import dataclass
from typing import Literal

from diffusionrl.config.checks import check_values
from diffusionrl.errors import require

Normalisation = Literal["prompt", "batch", "group", "group-mean"]


@dataclass(frozen=True)
class AdvantageConfig:
    """What a sample's score is compared with."""

    advantage_clip: float = 5.0
    """Advantages are clamped to plus or minus this."""
    normalisation: Normalisation = "prompt"
    """Advantages relative to a prompt's recent rewards, to the whole step, or to the samples of one prompt in the step; with
    "group-mean", to the mean of those, in standard deviations of the whole step."""
    combine: Literal["scores", "advantages"] = "scores"
    """Of several rewards: add up their scores; or their advantages, each normalised on its own (GDPO), so that no reward drowns
    another that varies less. The sum is then scaled to a standard deviation of 1 over the step."""
    buffer_size: int = 32
    """Rewards remembered for each prompt ("prompt" only)."""
    min_count: int = 16
    """A prompt with fewer remembered rewards uses the statistics of the whole step ("prompt" only)."""
    micro_batch_size: int = 32
    """Rows of work in one forward pass of an update: memory and speed, not results."""

    @property
    def compares_groups(self) -> bool:
        """Whether a prompt with one sample in the step teaches nothing."""
        return self.normalisation.startswith("group")

    def __post_init__(self) -> None:
        check_values(self, "algorithm.")
        require(self.advantage_clip > 0, f"algorithm.advantage_clip must be positive, not {self.advantage_clip}")
        require(self.micro_batch_size >= 1, f"algorithm.micro_batch_size must be at least 1, not {self.micro_batch_size}")
        require(
            self.combine == "scores" or self.normalisation != "prompt",
            "algorithm.combine 'advantages' compares within the step: set algorithm.normalisation to 'batch' or 'group'",
        )
        require(
            1 <= self.min_count <= self.buffer_size,
            f"algorithm.min_count must lie between 1 and buffer_size ({self.buffer_size}), not {self.min_count}",
        )
