"""Every setting of a run, as frozen dataclasses. Defaults are DDPO's published recipe (arXiv 2305.13301, App. D).

Nothing here imports torch, so that the command line answers at once.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from diffusionrl.algorithm_config import ALGORITHMS as ALGORITHMS
from diffusionrl.algorithm_config import AlgorithmConfig as AlgorithmConfig
from diffusionrl.algorithm_config import DDPOConfig as DDPOConfig
from diffusionrl.algorithm_config import DiffusionRLConfig as DiffusionRLConfig
from diffusionrl.algorithm_config import RWRConfig as RWRConfig
from diffusionrl.errors import require
from diffusionrl.reward_config import CLIPScoreConfig, RewardsConfig


@dataclass(frozen=True)
class SamplingConfig:
    """How images are sampled, in training and in evaluation."""

    num_steps: int = 50
    """Denoising steps."""
    guidance: float = 5.0
    """Classifier-free guidance scale; 1 switches guidance off. Guidance is part of the policy that is trained."""
    sampler: Literal["ddim", "cps", "precise", "renoise", "ode", "flow_grpo", "dance_grpo"] = "ddim"
    """Row of the table in docs/transitions.md. The flow SDEs need a flow model."""
    eta: float = 1.0
    """Share of fresh noise. 1 with ddim is ancestral sampling; 0 leaves nothing for a policy gradient to use."""
    batch_size: int = 16
    """Images sampled at once: memory and speed, not results."""

    def __post_init__(self) -> None:
        require(self.num_steps >= 1, f"sampling.num_steps must be at least 1, not {self.num_steps}")
        require(self.guidance >= 1, f"sampling.guidance must be at least 1 (1 is off), not {self.guidance}")
        require(self.eta >= 0, f"sampling.eta must not be negative, not {self.eta}")
        require(self.batch_size >= 1, f"sampling.batch_size must be at least 1, not {self.batch_size}")


@dataclass(frozen=True)
class PolicyConfig:
    """Which weights are trained, and in what precision."""

    training: Literal["lora", "full"] = "lora"
    """A LoRA adapter on the UNet, or all of the UNet."""
    lora_rank: int = 4
    """Rank of the adapter; its alpha equals the rank, so the update is not rescaled."""
    lora_targets: Literal["attention", "all"] = "attention"
    """Attention projections, or all projections, convolutions and feed-forward layers of the UNet's blocks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network. Latents, log-probabilities and trained weights are float32 always."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes a GPU if there is one."""

    def __post_init__(self) -> None:
        require(self.lora_rank >= 1, f"policy.lora_rank must be at least 1, not {self.lora_rank}")
        require(
            self.training == "lora" or self.dtype == "float32",
            "policy.training 'full' needs policy.dtype float32: small updates are lost in bfloat16 weights",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 3e-4
    """3e-4 for a LoRA; the paper's 1e-5 for the whole UNet."""
    warmup: int = 0
    """Updates over which the learning rate rises from 0: AdamW's first steps are at full length, however noisy the gradient."""
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm when it is longer; inf leaves it as it is."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"optimizer.learning_rate must be positive, not {self.learning_rate}")
        require(self.warmup >= 0, f"optimizer.warmup must not be negative, not {self.warmup}")
        require(all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas must lie in [0, 1), not {self.betas}")
        require(self.epsilon >= 0, f"optimizer.epsilon must not be negative, not {self.epsilon}")
        require(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, not {self.weight_decay}")
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
        require(self.noise > 0, f"guard.noise must be positive, not {self.noise}")
        require(self.drop >= 0, f"guard.drop must not be negative, not {self.drop}")
        require(self.patience >= 1, f"guard.patience must be at least 1, not {self.patience}")


@dataclass(frozen=True)
class PretrainingConfig:
    """The pretraining loss, beside the rewards; see docs/diffusionrl.md."""

    source: str = ""
    """Real pairs of image and caption: "emoji" (scenes of the embedded world, drawn as they are asked for), or a folder of
    images (JPEG, PNG, WebP) with metadata.jsonl or metadata.csv (columns file_name and text). Empty, there is no such loss."""
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
        require(self.weight > 0, f"pretraining.weight must be positive, not {self.weight}: an empty source switches it off")
        require(self.batch_size >= 1, f"pretraining.batch_size must be at least 1, not {self.batch_size}")
        require(self.updates >= 1, f"pretraining.updates must be at least 1, not {self.updates}")
        require(0 <= self.drop_caption <= 1, f"pretraining.drop_caption must lie in [0, 1], not {self.drop_caption}")
        require(self.max_broken >= 0, f"pretraining.max_broken must not be negative, not {self.max_broken}")


_ROOMS = ("advantage", "eval", "guard", "policy", "pretraining", "prompts", "ratio", "reward", "time")
"""Where metrics of a run's own are: no task may have such a name."""


@dataclass(frozen=True)
class TaskConfig:
    """A further task: another reward, on prompts of its own; see docs/diffusionrl.md."""

    name: str = ""
    """Letters, digits, - and _: its metrics are NAME/reward/mean and so on."""
    reward: tuple[str, ...] = ("compressibility",)
    """As in the run's own ``reward``."""
    prompts: str = "ddpo-animals"
    """As in the run's own ``prompts``."""
    prompts_per_step: int = 256
    samples_per_prompt: int = 1

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def whose(self) -> str:
        """Before an error about it; nothing for the first task, which has no name."""
        return f"task {self.name}: " if self.name else ""

    def check(self) -> None:
        """Raises UserError where it cannot be trained on."""
        require(len(self.reward) >= 1, f"{self.whose}reward names no reward")
        for what in ("prompts_per_step", "samples_per_prompt"):
            require(getattr(self, what) >= 1, f"{self.whose}{what} must be at least 1, not {getattr(self, what)}")


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    model: str = "emoji"
    """"emoji" (the embedded model), a folder in diffusers' format, or a hub id."""
    reward: tuple[str, ...] = ("compressibility",)
    """Built-in rewards, or package.module:function of your own, called with (images, prompts, metadata). NAME=WEIGHT where
    several are added up."""
    prompts: str = "ddpo-animals"
    """A built-in set, a text file (one prompt a line), a JSONL or parquet file ("prompt" and any metadata), or
    dataset:ID[:SPLIT] of the library datasets."""
    max_broken_prompts: int = 0
    """Broken lines that are passed over; one more stops the run."""
    steps: int = 200
    """Training steps. DDPO's figures end near 50,000 queries: 200 steps of 256 samples."""
    prompts_per_step: int = 256
    samples_per_prompt: int = 1
    """Samples a step are prompts_per_step * samples_per_prompt."""
    seed: int = 0
    """Every random number of the run follows from it."""
    name: str | None = None
    """The run folder is runs/NAME; by default, NAME is the date and time."""
    run_dir: Path | None = None
    """The run folder, in place of runs/NAME."""
    track: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that mirror metrics.jsonl."""
    push_to_hub: str | None = None
    """OWNER/NAME on the Hugging Face hub, where export/ is uploaded when the run is finished; a new repository is private."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    algorithm: AlgorithmConfig = field(default_factory=DDPOConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    tasks: tuple[TaskConfig, ...] = ()
    """Further tasks, trained in turn after the one above in every step; a list in YAML, then --tasks.0.reward and so on."""

    @property
    def samples_per_step(self) -> int:
        """Of the first task."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def all_tasks(self) -> tuple[TaskConfig, ...]:
        """The one that the fields above describe, which has no name, and the further ones."""
        return (TaskConfig("", self.reward, self.prompts, self.prompts_per_step, self.samples_per_prompt), *self.tasks)

    @property
    def queries_per_step(self) -> int:
        """Samples a step of all tasks."""
        return sum(task.samples_per_step for task in self.all_tasks)

    @property
    def watched(self) -> tuple[str, ...]:
        """Names of the held-out rewards that the guard watches."""
        return self.guard.watch or tuple(entry.partition("=")[0] for entry in self.evaluation.held_out)

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps must be at least 1, not {self.steps}")
        require(self.max_broken_prompts >= 0, f"max_broken_prompts must not be negative, not {self.max_broken_prompts}")
        require(
            self.push_to_hub is None or re.fullmatch(r"([\w.-]+/)?[\w.-]+", self.push_to_hub) is not None,
            f"push_to_hub must be OWNER/NAME, not {self.push_to_hub!r}",
        )
        self._check_tasks()
        if not isinstance(self.algorithm, RWRConfig):
            self._check_policy_gradient(self.algorithm)
        self._check_guard()

    def _check_tasks(self) -> None:
        names = [task.name for task in self.tasks]
        for index, name in enumerate(names):
            require(
                re.fullmatch("[A-Za-z0-9_-]+", name) is not None,
                f"tasks.{index}.name must be made of letters, digits, - and _, not {name!r}",
            )
            require(name not in _ROOMS, f"tasks.{index}.name is {name!r}, where metrics of the run's own are: choose another")
            require(names.count(name) == 1, f"two tasks are named {name!r}")
        for task in self.all_tasks:
            task.check()

    def _check_guard(self) -> None:
        held_out = [entry.partition("=")[0] for entry in self.evaluation.held_out]
        for name in self.guard.watch:
            require(name in held_out, f"guard.watch names {name!r}, which is not among evaluation.held_out")
        require(
            not self.guard.stop or (bool(held_out) and self.evaluation.every > 0 and self.evaluation.num_samples >= MIN_PAIRS),
            "guard.stop needs something to watch: name evaluation.held_out, set evaluation.every above 0 and "
            f"evaluation.num_samples to at least {MIN_PAIRS}",
        )

    def _check_policy_gradient(self, algorithm: DDPOConfig | DiffusionRLConfig) -> None:
        for task in self.all_tasks:
            require(
                isinstance(algorithm, DiffusionRLConfig) or task.samples_per_step % algorithm.updates_per_step == 0,
                f"{task.whose}{task.samples_per_step} samples a step (prompts_per_step * samples_per_prompt) cannot be cut "
                f"into algorithm.updates_per_step = {algorithm.updates_per_step} equal updates",
            )
            require(
                algorithm.normalisation != "group" or task.samples_per_prompt > 1,
                f"{task.whose}algorithm.normalisation 'group' compares the samples of one prompt: "
                "set samples_per_prompt above 1",
            )
        require(
            self.sampling.sampler != "ode" and self.sampling.eta > 0,
            "a policy gradient needs fresh noise: choose a sampling.sampler other than 'ode' and sampling.eta above 0",
        )


def to_yaml(config: TrainConfig) -> str:
    """The configuration as YAML that ``--config`` reads back, but for the run folder, which is where it lies, and the
    repository, which another run should not overwrite."""
    own = {"name": None, "run_dir": None, "push_to_hub": None}
    return yaml.safe_dump(_plain(dataclasses.asdict(config)) | own, sort_keys=False)


def _plain(value: Any) -> Any:
    """Tuples as lists and paths as strings, which is what YAML knows."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
