"""The run folder survives people: moved, damaged, with things of others in it, twice corrupted, and read by others."""

import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusionrl import RunStopped, TrainConfig, UserError, interruption, train
from diffusionrl.config import DDPOConfig, EvaluationConfig, SamplingConfig
from diffusionrl.evaluation.recent import write_recent
from diffusionrl.interruption import Interrupted
from diffusionrl.runs import checkpoint
from diffusionrl.runs.checkpoint import Checkpoint
from diffusionrl.runs.folder import RunFolder
from diffusionrl.runs.lines import read_metrics
from diffusionrl.runs.places import read_settings

CPU = torch.device("cpu")


def saved(step: int) -> Checkpoint:
    return Checkpoint(step, {"policy": {"w": torch.ones(2)}, "optimizer": {"m": torch.zeros(2)}}, {"score": None})


def begun(run_dir: Path, steps: int = 2) -> TrainConfig:
    """A run with a checkpoint and a line for each of its steps."""
    config = TrainConfig(steps=9, run_dir=run_dir)
    with RunFolder(run_dir, config) as folder:
        folder.begin(None, CPU)
        for step in range(steps + 1):
            folder.log({"step": step, "queries": step})
            folder.save(saved(step))
    return config


@pytest.mark.parametrize("away", ["moved", "removed"])
def test_a_folder_that_goes_away_stops_the_run_and_is_not_made_again(tmp_path: Path, away: str) -> None:
    run_dir = tmp_path / "run"
    with RunFolder(run_dir, TrainConfig(run_dir=run_dir)) as folder:
        folder.begin(None, CPU)
        if away == "moved":
            run_dir.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(run_dir)
        with pytest.raises(RunStopped, match="moved or removed while the run was at work"):
            folder.log({"step": 0, "queries": 0})
    assert not run_dir.exists()


def test_a_step_is_corrupted_for_the_second_time(tmp_path: Path) -> None:
    begun(tmp_path)
    for _ in range(3):
        checkpoint.save(tmp_path, saved(2))
        (checkpoint.folder_of(tmp_path, 2) / "state.json").write_text("{}")
        found = checkpoint.load_newest(tmp_path, exact=False)
        assert found is not None and found.step == 1
    assert len(list((tmp_path / "checkpoints").glob("corrupted_*"))) == 3


@pytest.mark.parametrize(
    "name",
    ["samples/step_000003_old", "samples/step_x", "samples/recent/step_²", "checkpoints/step_5", "checkpoints/step_copy"],
)
def test_folders_of_others_are_left_alone(tmp_path: Path, name: str) -> None:
    config = begun(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    with RunFolder(tmp_path, config) as folder:
        found = folder.find_checkpoint()
        assert found is not None and found.step == 2
        folder.begin(1, CPU)
    assert (tmp_path / name).is_dir()


def test_folders_of_others_are_left_alone_while_samples_are_kept(tmp_path: Path) -> None:
    for name in ("step_x", "step_000001_old", "step_2", "step_000001"):
        (tmp_path / "recent" / name).mkdir(parents=True)
    scores = SimpleNamespace(parts={}, valid=[], values=[])
    write_recent(SimpleNamespace(own=range(0), scores=scores, images=torch.zeros(0, 3, 8, 8), show=None), tmp_path, 9)  # type: ignore[arg-type]
    assert sorted(path.name for path in (tmp_path / "recent").iterdir()) == [
        "step_000001_old",
        "step_000009",
        "step_2",
        "step_x",
    ]


def test_one_line_a_step(tmp_path: Path) -> None:
    """Also where a run that was stopped is taken up with no steps left, for its last evaluation."""
    config = begun(tmp_path)
    for _ in range(2):
        with RunFolder(tmp_path, config) as folder:
            folder.begin(2, CPU)
            folder.log({"step": 2, "queries": 2, "eval/reward": 1.0, "eval/reward_se": 0.1})
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2]
    assert read_metrics(tmp_path)[-1]["eval/reward"] == 1.0


def test_the_lines_of_a_long_run_share_their_names(tmp_path: Path) -> None:
    """Which are most of what they hold."""
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "reward/mean": 0.5}}\n' for i in range(3)))
    first, *others = read_metrics(tmp_path)
    for line in others:
        assert all(a is b for a, b in zip(first, line, strict=True))


@pytest.mark.parametrize(("cost", "steps"), [(0.1, 1000), (5.5, 4000), (100.0, 4000)])
def test_the_report_costs_little_of_a_long_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cost: float, steps: int
) -> None:
    """An evaluation every 35 seconds, and a report that takes as long as it takes; the clock is ours."""
    now, written = [0.0], []
    monkeypatch.setattr("diffusionrl.runs.folder.time.monotonic", lambda: now[0])
    monkeypatch.setattr("diffusionrl.runs.folder.append_line", lambda file, entry: None)

    def report(run_dir: Path) -> None:
        now[0] += cost
        written.append(now[0])

    with RunFolder(tmp_path, TrainConfig(steps=steps, run_dir=tmp_path), report) as folder:
        folder.begin(None, CPU)
        for step in range(steps):
            now[0] += 35
            folder.log({"step": step, "queries": step, "eval/reward": 0.0, "eval/reward_se": 0.0, "time/rollout": 1.0})
        total = now[0]
    assert len(written) * cost < 0.02 * total + cost
    if cost < 1:
        assert len(written) == steps + 1, "where it costs nothing, it is always new"
    longest = max(later - earlier for earlier, later in pairwise(written))
    assert longest < 70 + 102 * cost, "it does not stop being written"


def test_what_is_written_can_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    begun(tmp_path)
    umask = os.umask(0)
    os.umask(umask)
    for file in (tmp_path / "checkpoints").rglob("*.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_setting_that_an_older_version_did_not_know_has_its_default(tmp_path: Path) -> None:
    config = begun(tmp_path)
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("  max_broken: 0\n", "").replace("max_broken_prompts: 0\n", ""))
    with RunFolder(tmp_path, config) as folder:
        assert not folder.new


SMALL_FILES = ["config.yaml", "env.json", "metrics.jsonl", "alarms.jsonl", "finished.json"]


@settings(max_examples=examples(80), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(SMALL_FILES),
    st.one_of(
        st.binary(max_size=30), st.sampled_from([b"", b"{", b"[]\n", b"null\n", b"{}\n", b"a: &x [*x]\n", b"[" * 9000 + b"\n"])
    ),
    st.booleans(),
)
def test_a_small_file_that_is_damaged_is_named_or_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes, added: bool
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    config = begun(run_dir, steps=1)
    file = run_dir / name
    file.write_bytes((file.read_bytes() if added and file.is_file() else b"") + content)
    try:
        with RunFolder(run_dir, config) as folder:
            if not folder.finished:
                folder.begin(1, CPU)
    except UserError as error:
        said = str(error)
        assert str(file) in said or "other settings" in said or "were asked for" in said or "exists and is no run" in said


def test_a_run_and_its_model_are_found_after_both_have_moved(tiny_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from diffusionrl.policies import find_trained

    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    shutil.copytree(tiny_folder, "models/base")
    Path("p.txt").write_text("a cat\n")
    config = TrainConfig(
        model="models/base",
        prompts="p.txt",
        steps=1,
        prompts_per_step=2,
        run_dir=Path("runs/x"),
        sampling=SamplingConfig(num_steps=2),
        algorithm=DDPOConfig(updates_per_step=1),
        evaluation=EvaluationConfig(num_samples=2),
    )
    train(config)
    assert read_settings(Path("runs/x"))["model"] == str(tmp_path / "old/models/base")
    monkeypatch.chdir(tmp_path)
    assert find_trained("old/runs/x").base == str(tmp_path / "old/models/base")
    (tmp_path / "old").rename(tmp_path / "new")
    assert find_trained("new/runs/x").base == str(tmp_path / "new/models/base")
    monkeypatch.chdir(tmp_path / "new")
    assert train(config).run_dir == Path("runs/x"), "finished, and its settings are the same"
    result = train(TrainConfig(**{**vars(config), "model": "runs/x", "run_dir": Path("runs/y")}))
    recorded = read_settings(result.run_dir)
    assert recorded["model"] == str(tmp_path / "new/models/base")
    assert recorded["policy"]["lora"] == str(tmp_path / "new/runs/x/export/pytorch_lora_weights.safetensors")


# Signals


def test_a_closed_terminal_is_a_request_to_save() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with interruption.noted():
            interruption.begin_polling()
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Interrupted, match="SIGHUP"):
                interruption.check()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with interruption.noted():
            os.kill(os.getpid(), signal.SIGHUP)
            interruption.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_more_signals_do_not_change_the_exit_code() -> None:
    code = """
import os, signal, sys
from diffusionrl import cli
from diffusionrl.cli import commands
from diffusionrl.interruption import Interrupted, check
def stop(arguments):
    from diffusionrl import interruption
    with interruption.noted():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Interrupted:
            os.kill(os.getpid(), signal.SIGTERM)
            raise
import diffusionrl.cli.train
diffusionrl.cli.train.run = stop
class Noisy:
    def write(self, text): return len(text)
    def flush(self): [os.kill(os.getpid(), n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
commands.steady_streams = lambda: setattr(sys, "stdout", Noisy())
sys.argv = ["diffusionrl", "train"]
commands.entry()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 75, done.stderr
