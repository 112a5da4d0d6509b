"""A whole run. Defaults are DDPO's published recipe (arXiv 2305.13301, App. D)."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from diffusionrl.config.algorithms import AlgorithmConfig, DDPOConfig, DiffusionRLConfig, RWRConfig
from diffusionrl.config.checks import check_values
from diffusionrl.config.model import PolicyConfig, SamplingConfig
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.config.training import (
    MIN_PAIRS,
    CheckpointConfig,
    EvaluationConfig,
    GuardConfig,
    OptimizerConfig,
    PretrainingConfig,
)
from diffusionrl.errors import require

_ROOMS = ("advantage", "eval", "guard", "policy", "pretraining", "prompts", "ratio", "reward", "time")
"""Where metrics of a run's own are: no task may have such a name."""
_MOST_SAMPLES = 10_000_000


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
        require(
            self.samples_per_step <= _MOST_SAMPLES,
            f"{self.whose}{self.samples_per_step:,} samples a step (prompts_per_step * samples_per_prompt) are more than "
            f"{_MOST_SAMPLES:,}: all of a step are in memory at once",
        )


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    model: str = "emoji"
    """"emoji" or "emoji-flow" (the embedded models), a folder in diffusers' format, a hub id, or a single .safetensors file."""
    model_config: str | None = None
    """Of a single file: the folder or hub id of a pipeline of its family, whose settings, tokenizers and what else the file has
    not are taken; by default what diffusers takes the file for, from the hub."""
    reward: tuple[str, ...] = ("compressibility",)
    """Built-in rewards, or package.module:function of your own, called with (images, prompts, metadata). NAME=WEIGHT where
    several are added up."""
    prompts: str = "ddpo-animals"
    """A built-in set; a file: a prompt a line, JSON, CSV, TSV or parquet ("prompt" and any metadata); or dataset:ID[:SPLIT] of
    the library datasets."""
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
        check_values(self)
        require(
            self.name is None or (re.fullmatch(r"[^/\\\0]{1,200}", self.name) is not None and self.name not in (".", "..")),
            f"name is that of a folder in runs/, without slashes, not {self.name!r}: --run-dir takes any path",
        )
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
