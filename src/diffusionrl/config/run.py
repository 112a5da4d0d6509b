"""A whole run. Defaults are DDPO's published recipe (arXiv 2305.13301, App. D)."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from diffusionrl.config.algorithms import (
    AlgorithmConfig,
    D3POConfig,
    DDPOConfig,
    DPOConfig,
    ForwardProcessConfig,
    KTOConfig,
    PolicyGradientConfig,
    PSOConfig,
    RewardGradientConfig,
    SharedOutConfig,
)
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

_ROOMS = ("advantage", "eval", "guard", "policy", "preferences", "pretraining", "prompts", "ratio", "reward", "time")
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
    """"emoji" or "emoji-flow" (the embedded models), a folder in diffusers' format, a hub id, a single .safetensors file, or
    code of your own, file.py:function or package.module:function, called with (settings, seed); see docs/own_model.md."""
    model_config: str | None = None
    """Of a single file: the folder or hub id of a pipeline of its family, whose settings, tokenizers and what else the file has
    not are taken; by default what diffusers takes the file for, from the hub."""
    reward: tuple[str, ...] = ("compressibility",)
    """Built-in rewards, or package.module:function or file.py:function of your own, called with (images, prompts, metadata).
    NAME=WEIGHT where several are added up."""
    prompts: str = "ddpo-animals"
    """A built-in set; a file: a prompt a line, JSON, CSV, TSV or parquet ("prompt" and any metadata); or dataset:ID[:SPLIT] of
    the library datasets."""
    preferences: str = ""
    """Judged images from disk in the place of samples, for the algorithms dpo and kto; see docs/preference.md. A folder with
    metadata.jsonl or metadata.csv (columns chosen, rejected, prompt; or file_name, label, prompt), a parquet file with
    Pick-a-Pic's columns (jpg_0, jpg_1, label_0, caption), or dataset:ID[:SPLIT] with them. A step takes prompts_per_step pairs
    or labelled images; reward and prompts are then for evaluations alone, and samples_per_prompt is not used."""
    max_broken_preferences: int = 0
    """Pairs or labelled images that may turn out not to decode; they are passed over, and one more stops the run."""
    max_broken_prompts: int = 0
    """Broken lines that are passed over; one more stops the run."""
    steps: int = 200
    """Training steps. DDPO's figures end near 50,000 queries: 200 steps of 256 samples."""
    prompts_per_step: int = 256
    samples_per_prompt: int = 1
    """Samples a step are prompts_per_step * samples_per_prompt."""
    redraw_queries: int = 0
    """Samples that a step may draw beyond these, in the place of groups whose samples all score alike, which teach nothing: new
    prompts take their place (DAPO's dynamic sampling)."""
    blind: bool = False
    """A control: every sample counts 1 in training, whatever it scores. Rewards are measured all the same."""
    max_queries: int | None = None
    """The run ends before it would score more samples for training than this, however many steps are left."""
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
        """Samples a step that are scored, of all tasks; judged images need no score."""
        return sum(task.samples_per_step for task in (self.tasks if self.preferences else self.all_tasks))

    @property
    def last_step(self) -> int:
        """``steps``, or as many as ``max_queries`` pays for."""
        if self.max_queries is None:
            return self.steps
        return min(self.steps, self.max_queries // (self.queries_per_step + self.redraw_queries * len(self.all_tasks)))

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
        require(
            self.max_broken_preferences >= 0, f"max_broken_preferences must not be negative, not {self.max_broken_preferences}"
        )
        self._check_tasks()
        self._check_queries()
        self._check_algorithm()
        self._check_blind()
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

    def _check_queries(self) -> None:
        require(
            not self.preferences or (self.redraw_queries == 0 and self.max_queries is None),
            "preferences need no score: leave redraw_queries and max_queries out, and set steps",
        )
        require(self.redraw_queries >= 0, f"redraw_queries must not be negative, not {self.redraw_queries}")
        require(
            self.redraw_queries == 0 or self.samples_per_prompt > 1,
            "redraw_queries replaces groups whose samples score alike: set samples_per_prompt above 1",
        )
        require(
            self.last_step >= 1,
            f"max_queries is {self.max_queries}, and a step takes {self.queries_per_step} samples, with redraw_queries as many "
            "again as that allows: raise it, or lower prompts_per_step",
        )

    def _check_blind(self) -> None:
        algorithm, name = self.algorithm, self.algorithm.name
        if not self.blind:
            return
        require(not self.preferences, "blind is for samples, not for preferences: judged images are labels")
        require(self.redraw_queries == 0, "redraw_queries looks at scores, and a blind run does not: set it to 0")
        require(
            not isinstance(algorithm, RewardGradientConfig),
            f"algorithm {name} follows the reward's gradient and gives samples no weight: it has no blind run",
        )
        require(
            not isinstance(algorithm, DPOConfig | D3POConfig),
            f"algorithm {name} learns from pairs, and there is none of samples that count alike: its control is --reward noise",
        )

    def _check_guard(self) -> None:
        held_out = [entry.partition("=")[0] for entry in self.evaluation.held_out]
        for name in self.guard.watch:
            require(name in held_out, f"guard.watch names {name!r}, which is not among evaluation.held_out")
        require(
            not self.guard.stop or (bool(held_out) and self.evaluation.every > 0 and self.evaluation.num_samples >= MIN_PAIRS),
            "guard.stop needs something to watch: name evaluation.held_out, set evaluation.every above 0 and "
            f"evaluation.num_samples to at least {MIN_PAIRS}",
        )

    def _check_algorithm(self) -> None:
        algorithm = self.algorithm
        require(
            not self.preferences or isinstance(algorithm, DPOConfig | KTOConfig),
            f"preferences are learnt from by --algorithm.name dpo, kto and pso-offline, not by {algorithm.name}",
        )
        for task in self.all_tasks:
            self._check_groups(task)
        if isinstance(algorithm, PolicyGradientConfig):
            require(
                self.sampling.sampler != "ode" and self.sampling.eta > 0,
                "a policy gradient needs fresh noise: choose a sampling.sampler other than 'ode' and sampling.eta above 0",
            )
            algorithm.window.places(self.sampling.num_steps)
        require(
            not isinstance(algorithm, PSOConfig) or self.sampling.num_steps > 1,
            "pso leaves the last denoising step out, which adds no noise: set sampling.num_steps above 1",
        )

    def _check_groups(self, task: TaskConfig) -> None:
        algorithm, drawn = self.algorithm, not self.preferences or bool(task.name)
        require(
            not (drawn and algorithm.compares_groups) or task.samples_per_prompt > 1,
            f"{task.whose}algorithm {algorithm.name} compares the samples of one prompt (algorithm.normalisation): "
            "set samples_per_prompt above 1",
        )
        if isinstance(algorithm, SharedOutConfig):
            require(
                task.samples_per_step % algorithm.updates_per_step == 0,
                f"{task.whose}{task.samples_per_step} samples a step (prompts_per_step * samples_per_prompt) cannot be cut "
                f"into algorithm.updates_per_step = {algorithm.updates_per_step} equal updates",
            )
        if drawn and isinstance(algorithm, DPOConfig | D3POConfig):
            require(
                2 * algorithm.pairs_per_group <= task.samples_per_prompt,
                f"{task.whose}{task.samples_per_prompt} samples of a prompt (samples_per_prompt) do not make "
                f"algorithm.pairs_per_group = {algorithm.pairs_per_group} pairs",
            )
        if isinstance(algorithm, ForwardProcessConfig | D3POConfig):
            require(
                algorithm.updates_per_step <= task.prompts_per_step,
                f"{task.whose}prompts_per_step is {task.prompts_per_step}, fewer than algorithm.updates_per_step = "
                f"{algorithm.updates_per_step}: a prompt's samples belong to one update",
            )


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The configuration as a run records it: but for the run folder, which is where it lies, and the repository, which another
    run should not overwrite."""
    own = {"name": None, "run_dir": None, "push_to_hub": None}
    settings: dict[str, Any] = plain(dataclasses.asdict(config))
    return settings | own


def changed(before: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    """Of two configurations of a kind, the fields that differ: what each says."""
    names = [each.name for each in dataclasses.fields(before)]
    pairs = {name: (getattr(before, name), getattr(now, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def to_yaml(config: TrainConfig) -> str:
    """``settings_of`` as YAML that ``--config`` reads back."""
    return yaml.safe_dump(settings_of(config), sort_keys=False)


def plain(value: Any) -> Any:
    """Tuples as lists and paths as strings, which is what YAML knows."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
