"""Trackers mirror the metrics, and can do the run no harm."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusionrl import TrainConfig, UserError, train
from diffusionrl.config import DDPOConfig, EvaluationConfig, SamplingConfig
from diffusionrl.runs import folder as tracking
from diffusionrl.runs import trackers
from diffusionrl.runs.trackers import check_trackers


class Remembering:
    """A tracker that works, for comparison."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished = True


class Showing(Remembering):
    """One that takes images too."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[int, dict[str, Any]]] = []

    def log_images(self, values: dict[str, Any], step: int) -> None:
        self.images.append((step, values))


class FailsAtImages(Remembering):
    def log_images(self, values: dict[str, Any], step: int) -> None:
        raise OSError("too large")


class FailsAtOnce(Remembering):
    def __init__(self) -> None:
        raise ConnectionError("no such host")


class FailsLater(Remembering):
    def log(self, values: dict[str, Any], step: int) -> None:
        raise SystemExit("quota exceeded")


class FailsAtTheEnd(Remembering):
    def finish(self) -> None:
        raise OSError("cannot sync")


class HangsAtOnce(Remembering):
    def __init__(self) -> None:
        time.sleep(60)


class HangsLater(Remembering):
    def log(self, values: dict[str, Any], step: int) -> None:
        time.sleep(60)


class HangsAtTheEnd(Remembering):
    def finish(self) -> None:
        time.sleep(60)


def run(make_policy: Any, run_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: type | None) -> Any:
    made: list[Any] = []

    def make_tracker(name: str, folder: Path, settings: dict[str, Any]) -> Any:
        assert settings["optimizer.learning_rate"] == 3e-4
        made.append(kind())  # type: ignore[misc]
        return made[-1]

    monkeypatch.setattr(tracking, "make_tracker", make_tracker)
    monkeypatch.setattr(tracking, "check_trackers", lambda names: None)
    config = TrainConfig(
        steps=2,
        prompts_per_step=2,
        run_dir=run_dir,
        track=("wandb",) if kind else (),
        sampling=SamplingConfig(num_steps=2, guidance=1.0, batch_size=2),
        algorithm=DDPOConfig(updates_per_step=1),
        evaluation=EvaluationConfig(num_samples=2),
    )
    train(config, policy=make_policy(), reward=lambda images, prompts, metadata: images.mean((1, 2, 3)), prompts=["a cat"])
    return made[0] if made else None


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(("time/", "peak"))} for line in lines]


def test_a_tracker_gets_every_line(make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = run(make_policy, tmp_path / "run", monkeypatch, Remembering)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in tracker.lines] == [0, 1, 2]
    assert [values for _, values in tracker.lines] == [{k: v for k, v in line.items() if v is not None} for line in lines]
    assert tracker.finished


def test_a_tracker_that_takes_images_gets_those_of_every_evaluation(
    make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = run(make_policy, tmp_path / "run", monkeypatch, Showing)
    assert [step for step, _ in tracker.images] == [0, 2]
    for step, values in tracker.images:
        shown = values["eval/images"]
        assert shown.shape == (2, 32, 32, 3) and shown.dtype == np.uint8
        with Image.open(tmp_path / "run" / "samples" / f"step_{step:06d}" / "00001.png") as kept:
            assert np.array_equal(shown[1], np.asarray(kept))
    assert [step for step, _ in tracker.lines] == [0, 1, 2] and tracker.finished


@pytest.fixture(scope="module")
def undisturbed(make_policy: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the run writes without a tracker."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(make_policy, run_dir, monkeypatch, None)
    return metrics(run_dir)


@pytest.mark.parametrize(
    "kind", [FailsAtImages, FailsAtOnce, FailsLater, FailsAtTheEnd, HangsAtOnce, HangsLater, HangsAtTheEnd]
)
def test_a_tracker_that_fails_or_hangs_does_no_harm(
    make_policy: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    undisturbed: list[dict[str, Any]],
    kind: type,
) -> None:
    assert trackers.PATIENCE == 5
    monkeypatch.setattr(trackers, "PATIENCE", 1.0)  # which the test of one that hangs waits for
    began = time.monotonic()
    run(make_policy, tmp_path / "with", monkeypatch, kind)
    assert metrics(tmp_path / "with") == undisturbed
    assert time.monotonic() - began < 50  # a tenth on an idle machine; who hangs does so for 60 s
    assert "warning: tracker wandb" in capsys.readouterr().err


def test_a_missing_package_is_said_at_once() -> None:
    with pytest.raises(UserError, match="pip install mlflow"):
        check_trackers(["mlflow"])


def test_tensorboard_files_are_written(make_policy: Any, tmp_path: Path) -> None:
    config = TrainConfig(
        steps=1,
        prompts_per_step=2,
        run_dir=tmp_path / "run",
        track=("tensorboard",),
        sampling=SamplingConfig(num_steps=2, guidance=1.0, batch_size=2),
        algorithm=DDPOConfig(updates_per_step=1),
        evaluation=EvaluationConfig(num_samples=2),
    )
    train(config, policy=make_policy(), reward=lambda images, prompts, metadata: images.mean((1, 2, 3)), prompts=["a cat"])
    written = list((tmp_path / "run" / "trackers").rglob("events.out.tfevents.*"))
    assert written and sum(file.stat().st_size for file in written) > 500
    content = b"".join(file.read_bytes() for file in written)
    assert content.count(b"\x89PNG") >= 2 and b"eval/images" in content, "the images of both evaluations"
