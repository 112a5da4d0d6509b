"""What a run folder says of its run, read for the pages; whatever is missing or broken in it is left out."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from diffusionrl.config.files import parse_yaml
from diffusionrl.errors import UserError
from diffusionrl.runs.lines import read_metrics
from diffusionrl.runs.places import is_held

DERIVED = ("_se", "_change", "_from_peak", "_peak_std")
"""Ends of the names of metrics that say more of another one."""
TRAINING = ("time/rollout", "time/update", "time/pretraining")
"""Ends of the names of metrics that add up to the time of a step, over its tasks; a rollout lasts until all is scored."""
ASIDE = (
    "reward",
    "invalid",
    "broken_images",
    "prediction_distance",
    "prediction_norm",
    "saturation",
    "sharpness",
    "high_frequency",
)
"""Measures of an evaluation that are no scores, or shown elsewhere."""


@dataclass(frozen=True)
class Sample:
    """One image of an evaluation, or of a training step.

    Attributes:
        index: which of the evaluation's prompts and seeds, the same in every evaluation of a run; or which of the step's.
        reward: None where it is invalid.
        scores: held-out rewards and the parts of the reward, by name.
        error: why a training step's has no valid score.
        inputs: images that the prompt names.
    """

    index: int
    prompt: str
    reward: float | None
    scores: dict[str, float | None]
    image: Path
    error: str = ""
    inputs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Evaluated:
    """The samples of one evaluation, by index."""

    step: int
    queries: int
    samples: dict[int, Sample]


@dataclass(frozen=True)
class Ending:
    """Where a run stands.

    Attributes:
        kind: "finished", "running", "interrupted", "stopped", "failed" or "ended" (without a word).
        text: for the reader.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Run:
    """A run folder's content.

    Attributes:
        config: as in config.yaml.
        environment: env.json.
        metrics: the lines of metrics.jsonl, each with "hours" of training until then.
        evaluations: oldest first.
        recent: best, worst and failed samples of the last training steps by step, oldest first.
        alarms: "step", "kind" and "message", as text.
    """

    folder: Path
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluated]
    recent: dict[int, list[Sample]]
    alarms: list[dict[str, str]]
    ending: Ending

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def column(self, key: str) -> tuple[list[dict[str, Any]], list[float | None]]:
        """The lines of the metrics that have ``key``, and its values."""
        lines = [line for line in self.metrics if key in line]
        return lines, [number_or_none(line[key]) for line in lines]

    def scores(self) -> list[str]:
        """The metrics of evaluations that have a place of their own: held-out scores, parts of the reward, diversity and KL."""
        keys = dict.fromkeys(key for line in self.metrics for key in line if key.startswith("eval/"))
        aside = {f"eval/{name}" for name in ASIDE}
        return [key for key in keys if not key.endswith((*DERIVED, "/invalid")) and key not in aside]

    def tasks(self) -> list[str]:
        """Names of the further tasks that were evaluated."""
        entries = self.config.get("tasks")
        named = [str(entry.get("name")) for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        return [name for name in named if self.column(f"eval/{name}/reward")[0]]

    def last(self, key: str) -> float | None:
        """The newest value of a metric."""
        return next(iter(reversed(self.column(key)[1])), None)


def read_run(folder: Path) -> Run:
    """Read a run folder, finished or not.

    Raises:
        UserError: it is none, or its config.yaml or metrics.jsonl cannot be read.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml. Runs are in runs/NAME, or where --run-dir said")
    try:
        config_text = (folder / "config.yaml").read_text()
        config = parse_yaml(config_text)
        metrics = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
        hours = accumulate(sum(line[key] or 0.0 for key in line if key.endswith(TRAINING)) for line in metrics)
        metrics = [line | {"hours": seconds / 3600} for line, seconds in zip(metrics, hours, strict=True)]
        queries = {int(line["step"]): int(line["queries"]) for line in metrics}
        steps = int(config["steps"])
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{folder} cannot be read as a run: {type(error).__name__}: {error}") from error
    evaluations = [
        Evaluated(step, queries[step], samples)
        for step, samples in _read_samples(folder / "samples")
        if step in queries and samples
    ]
    recent = {step: list(samples.values()) for step, samples in _read_samples(folder / "samples" / "recent") if samples}
    alarms = [
        {key: str(entry.get(key, "")) for key in ("step", "kind", "message")} for entry in _objects(folder / "alarms.jsonl")
    ]
    environment = next(_objects(folder / "env.json", whole=True), {})
    done = max(queries, default=0)
    return Run(folder, config, config_text, environment, metrics, evaluations, recent, alarms, _ending(folder, done, steps))


def time_unit(runs: Sequence[Run]) -> tuple[str, int]:
    """The unit for the axis of time, and how many of it are an hour."""
    longest = max((line["hours"] for run in runs for line in run.metrics), default=0.0)
    return ("hours", 1) if longest >= 1.5 else ("minutes", 60) if longest >= 0.025 else ("seconds", 3600)


def number_or_none(value: Any) -> float | None:
    """What is a finite number, as one."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _objects(file: Path, whole: bool = False) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line or the whole file one; nothing where it is missing, and no broken ones."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError):
        return
    for line in [text] if whole else text.split("\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


def _read_samples(folder: Path) -> Iterator[tuple[int, dict[int, Sample]]]:
    for samples in sorted(folder.glob("step_*")):
        step = samples.name.removeprefix("step_")
        if step.isdecimal():
            yield int(step), {s.index: s for entry in _objects(samples / "samples.jsonl") if (s := _sample(entry, samples))}


def _sample(entry: dict[str, Any], folder: Path) -> Sample | None:
    index = entry.get("index")
    if not isinstance(index, int):
        return None
    reward = number_or_none(entry.get("reward")) if entry.get("valid") else None
    known = {"index", "prompt", "valid", "error", *ASIDE}
    scores = {str(name): number_or_none(value) for name, value in entry.items() if name not in known}
    image, inputs = folder / f"{index:05d}.png", sorted((folder / "inputs").glob(f"{index:05d}_*.png"))
    return Sample(index, str(entry.get("prompt", "")), reward, scores, image, str(entry.get("error") or ""), tuple(inputs))


def _ending(folder: Path, done: int, steps: int) -> Ending:
    at = f"{done:,} of {steps:,} steps are done"
    if (folder / "finished.json").is_file():
        marker = next(_objects(folder / "finished.json", whole=True), {})
        exported = marker.get("exported_step", done)
        weights = "" if exported == done else f"; export/ holds the weights of step {exported}"
        if "stopped" in marker:
            return Ending("stopped", f"by the guard: {marker['stopped']} ({at}{weights})")
        return Ending("finished", f"all {steps:,} steps are done{weights}")
    stopped = next(_objects(folder / "stopped.json", whole=True), None)
    if stopped is not None:
        message = str(stopped.get("message", ""))
        if stopped.get("reason") == "interrupted":
            return Ending("interrupted", f"by {message}; {at}. The same command goes on")
        return Ending("stopped" if stopped.get("reason") == "stopped" else "failed", f"{message} ({at})")
    if is_held(folder):
        return Ending("running", at)
    if done == steps and (folder / "export").is_dir():
        return Ending("finished", f"all {steps:,} steps are done")
    return Ending("ended", f"without a word, as a killed process does; {at}. The same command goes on")
