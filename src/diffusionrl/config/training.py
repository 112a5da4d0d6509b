"""Optimizer, checkpoints, evaluation, guard, and the pretraining loss."""

from dataclasses import dataclass, field
from typing import Literal

from diffusionrl.config.checks import check_values
from diffusionrl.config.judges import CLIPScoreConfig
from diffusionrl.errors import require


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 3e-4
    """3e-4 for a LoRA; the paper's 1e-5 for the whole UNet."""
    warmup: int = 0
    """Updates over which the learning rate rises from 0: AdamW's first steps are at full length, however noisy the gradient."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls from the first training step to the last: not at all, on a line, or on half a cosine. A run
    that has one keeps its number of steps."""
    schedule_end: float = 0.0
    """Share of the learning rate that is left at the end."""
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm when it is longer; inf leaves it as it is."""
    average: float = 0.0
    """Decay of an exponential average of the trained weights, one step an update, which is what is evaluated and exported; 0:
    the weights themselves."""

    def __post_init__(self) -> None:
        check_values(self, "optimizer.")
        require(self.learning_rate > 0, f"optimizer.learning_rate must be positive, not {self.learning_rate}")
        require(0 <= self.schedule_end <= 1, f"optimizer.schedule_end must lie in [0, 1], not {self.schedule_end}")
        require(self.warmup >= 0, f"optimizer.warmup must not be negative, not {self.warmup}")
        require(all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas must lie in [0, 1), not {self.betas}")
        require(self.epsilon >= 0, f"optimizer.epsilon must not be negative, not {self.epsilon}")
        require(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, not {self.weight_decay}")
        require(0 <= self.average < 1, f"optimizer.average must lie in [0, 1), not {self.average}")
        require(self.max_grad_norm > 0, f"optimizer.max_grad_norm must be positive, not {self.max_grad_norm}")


MIN_PAIRS = 10
"""Fewer paired samples give no standard error to judge by."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run can be taken up from again; see docs/reliability.md."""

    every: int = 10
    """Steps between checkpoints; there is one after the last step, and one whenever a run is asked to stop (but for full
    fine-tuning on several processes: docs/processes.md)."""
    keep: int = 2
    """How many of the newest are kept, beside the one with the best evaluation."""
    exact: bool = False
    """Refuse to go on from an older checkpoint where the newest one is corrupted."""
    allow_changes: bool = False
    """Go on although settings have changed that change the result."""

    def __post_init__(self) -> None:
        check_values(self, "checkpoint.")
        require(self.every >= 1, f"checkpoint.every must be at least 1, not {self.every}")
        require(self.keep >= 2, f"checkpoint.keep must be at least 2, not {self.keep}: one may turn out corrupted")


@dataclass(frozen=True)
class EvaluationConfig:
    """The fixed seeds and prompts on which runs are compared."""

    every: int = 10
    """Steps between evaluations; 0 evaluates only before the first and after the last step."""
    num_samples: int = 64
    """Images, over the prompts in turn."""
    samples_per_prompt: int = 1
    """Images of a prompt before the next one's turn. Diversity is measured among the images of one prompt."""
    held_out: tuple[str, ...] = ()
    """Rewards that are measured at every evaluation and never trained on."""
    embeddings: CLIPScoreConfig = field(default_factory=lambda: CLIPScoreConfig(model="auto"))
    """The CLIP-type model behind the diversity: "auto" is the embedded one for the embedded model, and none for others;
    "none" is none."""

    def __post_init__(self) -> None:
        check_values(self, "evaluation.")
        require(self.every >= 0, f"evaluation.every must not be negative, not {self.every}")
        require(self.num_samples >= 2, f"evaluation.num_samples must be at least 2, not {self.num_samples}")
        require(self.samples_per_prompt >= 1, "evaluation.samples_per_prompt must be at least 1")


@dataclass(frozen=True)
class GuardConfig:
    """Held-out scores that fall while the reward rises; see docs/guard.md."""

    watch: tuple[str, ...] = ()
    """Which of evaluation.held_out are watched; none named: all of them."""
    noise: float = 3.0
    """A score is below its peak where it is so many standard errors below it."""
    patience: int = 3
    """Evaluations in a row with a score below its peak before a fall counts."""
    drop: float = 0.8
    """A score has fallen where it is, besides, so many standard deviations between images below its peak."""
    stop: bool = False
    """Stop there; and export the best weights before any score had fallen, not the last ones."""

    def __post_init__(self) -> None:
        check_values(self, "guard.")
        require(self.noise > 0, f"guard.noise must be positive, not {self.noise}")
        require(self.drop >= 0, f"guard.drop must not be negative, not {self.drop}")
        require(self.patience >= 1, f"guard.patience must be at least 1, not {self.patience}")


@dataclass(frozen=True)
class PretrainingConfig:
    """The pretraining loss, beside the rewards; see docs/diffusionrl.md."""

    source: str = ""
    """Real pairs of image and caption: "emoji" (scenes of the embedded world, drawn as they are asked for), or a folder of
    images (JPEG, PNG, WebP) with metadata.jsonl or metadata.csv (columns file_name and text), or a .txt beside each. Empty,
    there is no such loss."""
    weight: float = 1.0
    """The loss is multiplied by it. AdamW divides a constant factor out again, so ``updates`` says more."""
    batch_size: int = 16
    """Pairs in one optimizer step."""
    updates: int = 1
    """Optimizer steps on it in a training step, after those of the tasks."""
    drop_caption: float = 0.1
    """Share of the pairs that are trained without their caption, which guidance needs."""
    max_broken: int = 0
    """Images that may turn out not to decode; they are passed over, and one more stops the run."""

    def __post_init__(self) -> None:
        check_values(self, "pretraining.")
        require(self.weight > 0, f"pretraining.weight must be positive, not {self.weight}: an empty source switches it off")
        require(self.batch_size >= 1, f"pretraining.batch_size must be at least 1, not {self.batch_size}")
        require(self.updates >= 1, f"pretraining.updates must be at least 1, not {self.updates}")
        require(0 <= self.drop_caption <= 1, f"pretraining.drop_caption must lie in [0, 1], not {self.drop_caption}")
        require(self.max_broken >= 0, f"pretraining.max_broken must not be negative, not {self.max_broken}")
