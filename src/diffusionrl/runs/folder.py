"""The run folder's record: metrics.jsonl is the truth, the progress lines are a mirror of it."""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from diffusionrl import devices, processes
from diffusionrl.config import TrainConfig, to_yaml
from diffusionrl.config.run import settings_of
from diffusionrl.errors import RunStopped, UserError
from diffusionrl.interruption import Interrupted
from diffusionrl.runs import checkpoint
from diffusionrl.runs.alarms import Watch
from diffusionrl.runs.checkpoint import Checkpoint
from diffusionrl.runs.lines import PARTIAL, append_line, read_lines, read_metrics, read_object, replace_file
from diffusionrl.runs.places import check_run_dir, default_of, flat, read_settings, same
from diffusionrl.runs.progress import GONE, Progress
from diffusionrl.runs.trackers import IMAGES, Mirror, check_trackers, close_all, make_tracker

_RECORDED = ("diffusionrl", "torch", "diffusers", "peft", "transformers", "safetensors", "numpy", "pillow")
_LINES = ("metrics.jsonl", "alarms.jsonl")
_SHOW_AFTER = 30.0  # seconds: the report is no older than that and a step
SAFE_CHANGES = ("steps", "max_queries", "track", "evaluation.every", "checkpoint.", "guard.")
"""Settings that a run may be taken up with in another value: they say how long it goes on and what it writes, nothing else."""


@dataclass(frozen=True)
class Score:
    """Mean of the valid scores of an evaluation, and the standard error of that mean."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class TrainResult:
    """What a run made: its folder, and the evaluations before the first step and of the weights that it exported.

    Attributes:
        not_pushed: why the hub did not take the export, where it was to.
    """

    run_dir: Path
    before: Score
    after: Score
    not_pushed: str | None = None


def read_result(run_dir: Path) -> TrainResult:
    """Of a finished run."""
    lines = {line["step"]: line for line in read_metrics(run_dir) if "eval/reward" in line}
    before, after = (
        Score(*(float("nan") if line[key] is None else line[key] for key in ("eval/reward", "eval/reward_se")))
        for line in (lines[min(lines)], lines[exported_step(run_dir, max(lines))])
    )
    return TrainResult(run_dir, before, after)


def tell_result(run_dir: Path) -> TrainResult:
    """``read_result``, on all processes."""
    if processes.count() == 1:
        return read_result(run_dir)
    found = processes.tell(asdict(read_result(run_dir)) | {"run_dir": str(run_dir)} if processes.is_main() else None)
    return TrainResult(Path(found["run_dir"]), Score(**found["before"]), Score(**found["after"]))


def exported_step(run_dir: Path, last: int) -> int:
    """The step whose weights are in ``export``: the ``last`` one, unless the guard chose another."""
    marker = run_dir / "finished.json"
    exported = read_object(marker).get("exported_step") if marker.is_file() else None
    return last if exported is None else exported


class RunFolder:
    """A run's folder, held by one process: a new one, or one to go on with.

    ``with RunFolder(...)`` holds it; nothing is written before ``begin``. ``report`` is called with the folder when there is
    something new to show, and at the end.

    Attributes:
        new: there is no run in it yet.
        finished: all steps are done and exported, or the guard has stopped the run; which of them is said in words. None where
            there is something left to do.

    Raises:
        UserError: another process is at work there; it is no run; its settings differ in what changes the result; or it has
            more steps behind it than are asked for.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, report: Callable[[Path], object] | None = None) -> None:
        self._place, self.config, self._report = run_dir, config, report
        self._lock = FileLock(run_dir / "lock")
        self._progress = Progress(config.last_step, config.queries_per_step)
        self.new, self._begun = True, False
        self.finished: str | None = None
        self._shown = time.monotonic()
        self._made: list[Path] = []
        self._mirrors: list[Mirror] = []
        self._watch = Watch(config)
        self._identity: tuple[int, int] | None = None  # of the folder that is held
        self._last: dict[str, Any] = {}  # the newest line of metrics

    @property
    def run_dir(self) -> Path:
        """Raises RunStopped where a run is at work in it, and somebody has moved or removed it."""
        if self._is_lost():
            raise RunStopped(
                f"{self._place} was moved or removed while the run was at work in it. It goes on from its newest "
                "checkpoint where it is now: the same command with that --run-dir"
            )
        return self._place

    def _is_lost(self) -> bool:
        return self._begun and self._identity is not None and _identity_of(self._place) != self._identity

    def __enter__(self) -> "RunFolder":
        try:
            self._look()
        except BaseException:
            self._let_go()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._progress.close()
        try:
            close_all(self._mirrors)
            if self._begun and not self._is_lost():
                self._note_end(error)
                self._show()
        finally:
            self._let_go()

    def _note_end(self, error: BaseException | None) -> None:
        """What ended the run early, for whoever looks at it later."""
        if error is None:
            return
        reason = {Interrupted: "interrupted", RunStopped: "stopped"}.get(type(error), "failed")
        message = str(error) if reason != "failed" else f"{type(error).__name__}: {error}"
        with suppress(OSError):
            replace_file(self.run_dir / "stopped.json", json.dumps({"reason": reason, "message": message}) + "\n")

    def _show(self) -> None:
        if self._report is not None:
            self._report(self.run_dir)
            self._shown = time.monotonic()  # when it was done, so that a slow disk is not kept busy

    def check_disk(self, need: int) -> None:
        """Raises UserError where the disk cannot hold ``need`` bytes more."""
        free = checkpoint.free_bytes(self.run_dir)
        if need > free:
            raise UserError(
                f"this run may need {need / 1e6:.0f} MB in {self.run_dir}, for checkpoints and samples, "
                f"and {free / 1e6:.0f} MB are free: choose another --run-dir"
            )

    def _let_go(self) -> None:
        """Release the folder; one that was held and nothing was written to is as if it had not been."""
        if self._lock.is_locked and self.new and not self._begun:
            with suppress(OSError):
                (self._place / "lock").unlink()
                for folder in self._made:
                    folder.rmdir()
        self._lock.release(force=True)

    def _look(self) -> None:
        check_trackers(self.config.track)
        self._made = [folder for folder in (self.run_dir, *self.run_dir.parents) if not folder.exists()]
        check_run_dir(self.run_dir)
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.run_dir} cannot be made: {error}: choose another --run-dir") from error
        self._hold()
        self._identity = _identity_of(self.run_dir)
        self.new = not (self.run_dir / "config.yaml").is_file()
        if not self.new:
            self._compare_settings()
            marker = self.run_dir / "finished.json"
            ending = read_object(marker) if marker.is_file() else {}
            done = ending.get("steps", 0)
            for name in _LINES:
                if (self.run_dir / name).is_file():
                    read_lines(self.run_dir / name)  # which are needed later
            if done > self.config.last_step:
                raise UserError(f"{self.run_dir} is finished with {done} steps; {self.config.last_step} were asked for")
            if "stopped" in ending and self.config.guard.stop:
                self.finished = f"the guard stopped it at step {done}: {ending['stopped']}. With --guard.no-stop it goes on"
            elif done == self.config.last_step and (self.config.guard.stop or ending.get("exported_step", done) == done):
                self.finished = f"all {done} steps are done"
        elif any(p.name != "lock" and p.suffix != PARTIAL for p in self.run_dir.iterdir()):
            raise UserError(f"{self.run_dir} exists and is no run: choose another --name or --run-dir")

    def _hold(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:  # which is an OSError too
            raise UserError(f"another process is at work in {self.run_dir}: choose another --name, or wait for it") from error
        except OSError as error:
            raise UserError(f"{self.run_dir} cannot be written to: {error}") from error

    def _compare_settings(self) -> None:
        before, now = flat(read_settings(self.run_dir)), flat(settings_of(self.config))
        for key in now.keys() - before.keys():  # which an older version did not know
            before[key] = default_of(self.config, key)
        changed = [key for key in sorted(before.keys() | now.keys()) if not same(before.get(key), now.get(key))]
        if not changed:
            return
        listed = "\n".join(f"  {key}: {before.get(key)} -> {now.get(key)}" for key in changed)
        print(f"settings changed since {self.run_dir} began:\n{listed}", file=sys.stderr)
        unsafe = [key for key in changed if not key.startswith(SAFE_CHANGES)]
        if unsafe and not self.config.checkpoint.allow_changes:
            raise UserError(
                f"{self.run_dir} was begun with other settings, and these change its result: {', '.join(unsafe)}. "
                "Choose another --name, or go on all the same with --checkpoint.allow-changes"
            )

    def find_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint of a run that is to go on."""
        if self.new:
            return None
        checkpoint.clean(self.run_dir)
        found = checkpoint.load_newest(self.run_dir, self.config.checkpoint.exact)
        if found is not None and found.step > self.config.last_step:
            raise UserError(f"{self.run_dir} has {found.step} steps behind it; {self.config.last_step} were asked for")
        return found

    def begin(self, step: int | None, device: torch.device, about: dict[str, Any] | None = None) -> None:
        """Write settings and environment; forget what was recorded after ``step``, which is made again. None: all of it."""
        self._begun = True
        for half_written in (*self.run_dir.glob(f"*{PARTIAL}"), *self.run_dir.glob("export/**/.tmp*")):  # safetensors' own
            half_written.unlink()
        self._progress.begin(step or 0)
        for samples in (*self.run_dir.glob("samples/step_*"), *self.run_dir.glob("samples/recent/step_*")):
            of = checkpoint.step_of(samples)
            if of is not None and (step is None or of > step):
                shutil.rmtree(samples)
        for marker in ("finished.json", "stopped.json"):
            (self.run_dir / marker).unlink(missing_ok=True)
        for line in self._keep_until(step, "metrics.jsonl"):
            self._watch.see(line)  # whose alarms are on file
            self._last = line
        self._keep_until(step, "alarms.jsonl")
        replace_file(self.run_dir / "config.yaml", to_yaml(self.config))
        environment: dict[str, Any] = {
            "command": sys.argv,
            "folder": str(self.run_dir.absolute()),
            "seed": self.config.seed,
            "resumed_from_step": step,
            "python": platform.python_version(),
            "versions": {package: version(package) for package in _RECORDED},
            "platform": platform.platform(),
            "device": devices.name_of(device) or platform.processor() or device.type,
            "threads": torch.get_num_threads(),
            "processes": processes.count(),
            "model": about,
        }
        self._compare_environment(environment)
        replace_file(self.run_dir / "env.json", json.dumps(environment, indent=2) + "\n")
        settings = flat(settings_of(self.config))
        self._mirrors = [Mirror(name, partial(make_tracker, name, self.run_dir, settings)) for name in self.config.track]
        if step is not None:
            self._show()

    def _keep_until(self, step: int | None, name: str) -> list[dict[str, Any]]:
        """Forget the lines of a file after ``step``, which are made again; returns those that stay. None: forget all."""
        file = self.run_dir / name
        if not file.is_file():
            return []
        kept = [line for line in read_lines(file) if step is not None and line["step"] <= step]
        replace_file(file, "".join(json.dumps(line) + "\n" for line in kept))
        return kept

    def _compare_environment(self, now: dict[str, Any]) -> None:
        """Say what differs from when the run began: the rest may differ in rounding."""
        file = self.run_dir / "env.json"
        if now["resumed_from_step"] is None or not file.is_file():
            return
        try:
            then = read_object(file)
        except UserError as error:
            print(f"warning: what differs from when the run began is not known: {error}", file=sys.stderr)
            return
        for key in ("python", "versions", "platform", "device", "threads", "processes"):
            if then.get(key) != now[key]:
                print(
                    f"warning: {key} differs, so the rest may differ in rounding: {then.get(key)} -> {now[key]}",
                    file=sys.stderr,
                )

    def say(self, text: str) -> None:
        """A line on the terminal, if there still is one."""
        self._progress.close()
        with suppress(*GONE):
            print(text, flush=True)

    def save(self, found: Checkpoint) -> None:
        """See ``checkpoint.save``."""
        checkpoint.save(self.run_dir, found)

    def prune(self, best: int | None) -> None:
        """See ``checkpoint.prune``."""
        checkpoint.prune(self.run_dir, self.config.checkpoint.keep, best)

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and print progress. Non-finite numbers are written as null."""
        finite = {k: v if v == v and abs(v) != float("inf") else None for k, v in metrics.items()}
        if finite["step"] == self._last.get("step"):  # the step was done before, and is evaluated now: one line a step
            finite = self._last | finite
            self._keep_until(finite["step"] - 1, "metrics.jsonl")
        append_line(self.run_dir / "metrics.jsonl", finite)
        self._last = finite
        samples = self.run_dir / "samples" / f"step_{metrics['step']:06d}"
        images = sorted(samples.glob("0*.png"))[:IMAGES] if "eval/reward" in metrics else []
        for mirror in self._mirrors:
            mirror.log(finite, images)
        self._progress.show(metrics)
        for alarm in self._watch.see(finite):
            self.alarm(alarm.step, alarm.kind, alarm.message)
        if "eval/reward" in finite or time.monotonic() - self._shown > _SHOW_AFTER:
            self._show()

    def alarm(self, step: int, kind: str, message: str) -> None:
        """Warn on the terminal and append a line to alarms.jsonl. A run that is taken up before this step forgets it."""
        append_line(self.run_dir / "alarms.jsonl", {"step": step, "kind": kind, "message": message})
        self._progress.close()
        with suppress(*GONE):
            print(f"warning: step {step}: {message}", file=sys.stderr, flush=True)

    def finish(self, ending: dict[str, Any]) -> None:
        """There is nothing left to do: "steps" are done, and what else is to be said of the end."""
        if "stopped" in ending:
            self.say(f"the guard stops the run: {ending['stopped']}; export/ holds step {ending['exported_step']}")
        replace_file(self.run_dir / "finished.json", json.dumps(ending) + "\n")


class NoFolder(RunFolder):
    """The run folder as all processes but the main one see it: there is nothing in it, and nothing is written."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(Path(os.devnull), config)

    def __enter__(self) -> "NoFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        pass

    def check_disk(self, need: int) -> None:
        pass

    def begin(self, step: int | None, device: torch.device, about: dict[str, Any] | None = None) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def save(self, found: Checkpoint) -> None:
        pass

    def prune(self, best: int | None) -> None:
        pass

    def log(self, metrics: dict[str, Any]) -> None:
        pass

    def alarm(self, step: int, kind: str, message: str) -> None:
        pass

    def finish(self, ending: dict[str, Any]) -> None:
        pass


def _identity_of(folder: Path) -> tuple[int, int] | None:
    """Device and number of a folder; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
