"""Nothing is lost: kills, signals, full disks and flipped bits, and a run that ends as if nothing had happened."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import die_at, finish, finish_elsewhere, flip_bit, kill, start, tiny_run, wait_for, what_it_made

from diffusionrl import TrainConfig, UserError, interruption, train
from diffusionrl.algorithms import DDPO, make_algorithm
from diffusionrl.cli import START_AGAIN
from diffusionrl.config import CheckpointConfig, DDPOConfig, EvaluationConfig, SamplingConfig
from diffusionrl.data.prompts import load_prompts
from diffusionrl.evaluation import fixed_seed as evaluation
from diffusionrl.interruption import Interrupted
from diffusionrl.policies import EMBEDDED_MODEL
from diffusionrl.rewards import Mixture, as_mixture
from diffusionrl.runs import checkpoint
from diffusionrl.runs.folder import RunFolder
from diffusionrl.sampling import rollout
from diffusionrl.training.state import TrainingState
from diffusionrl.training.tasks import Task


@pytest.fixture(scope="module")
def undisturbed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run makes that nothing happens to, and how long it takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(tiny_run(tiny_folder, folder / "first"), folder / "log")  # whatever is slow the first time
    began = time.monotonic()
    assert finish(tiny_run(tiny_folder, folder / "run"), folder / "log") == 0, (folder / "log").read_text()
    return what_it_made(folder / "run") | {"seconds": time.monotonic() - began}


def assert_same(run_dir: Path, undisturbed: dict[str, Any]) -> None:
    made = what_it_made(run_dir)
    assert made["metrics"] == undisturbed["metrics"]
    assert made["files"] == undisturbed["files"]


@pytest.mark.timeout(300)  # some fifteen processes, one after another
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(
    tiny_folder: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    """2 kills; a run that is done before its kill is compared, and another one begun."""
    rng, kills, runs = random.Random(0), 0, 0
    run_dir = tmp_path / "run_0"
    while kills < 2:
        process = start(tiny_run(tiny_folder, run_dir), tmp_path / "log")
        process.join(rng.uniform(0, 1.1 * undisturbed["seconds"]))
        steps = checkpoint.complete_steps(run_dir)
        if process.exitcode is None:
            kill(process)
            kills += 1
            for step in checkpoint.complete_steps(run_dir):
                checkpoint.verify(checkpoint.folder_of(run_dir, step))
            assert set(steps[-1:]) <= set(checkpoint.complete_steps(run_dir)), "a checkpoint was lost"
        else:
            assert process.exitcode == 0, (tmp_path / "log").read_text()
            assert_same(run_dir, undisturbed)
            runs += 1
            run_dir = tmp_path / f"run_{runs}"
    assert finish(tiny_run(tiny_folder, run_dir), tmp_path / "log") == 0
    assert_same(run_dir, undisturbed)


@pytest.mark.parametrize(
    "place",
    ["write:4", "manifest:1", "flush:6", "rename:1", "prune:2"],
)
def test_a_kill_while_saving(tiny_folder: Path, tmp_path: Path, undisturbed: dict[str, Any], place: str) -> None:
    assert callable(die_at)
    run_dir = tmp_path / "run"
    assert finish(tiny_run(tiny_folder, run_dir), tmp_path / "log", f"die_at:{place}") == -signal.SIGKILL
    for step in checkpoint.complete_steps(run_dir):
        checkpoint.verify(checkpoint.folder_of(run_dir, step))
    assert finish(tiny_run(tiny_folder, run_dir), tmp_path / "log") == 0
    assert_same(run_dir, undisturbed)
    assert not list((run_dir / "checkpoints").glob(".*")), "nothing half-written is left"


def test_a_kill_amid_the_samples_of_a_step(tiny_folder: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """Step 5's are there, step 2's are gone, and the run goes on from step 4."""
    kept = {Path(name).parent.name for name in undisturbed["files"] if name.startswith("samples/recent/")}
    assert kept == {"step_000004", "step_000005", "step_000006"}
    run_dir = tmp_path / "run"
    process = start(tiny_run(tiny_folder, run_dir), tmp_path / "log")
    wait_for((run_dir / "samples" / "recent" / "step_000005").is_dir, 60)
    kill(process)
    assert finish(tiny_run(tiny_folder, run_dir), tmp_path / "log") == 0
    assert_same(run_dir, undisturbed)


def test_what_a_kill_left_of_an_export_is_removed(tiny_folder: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    run_dir = tmp_path / "run"
    assert finish(tiny_run(tiny_folder, run_dir), tmp_path / "log", "die_at:rename:1") == -signal.SIGKILL
    (run_dir / "export").mkdir(exist_ok=True)
    (run_dir / "export" / ".tmpvVj9Ra").write_bytes(b"half a file, as safetensors begins one")
    assert finish(tiny_run(tiny_folder, run_dir), tmp_path / "log") == 0
    assert_same(run_dir, undisturbed)


def test_a_finished_run_says_so_and_more_steps_go_on(tiny_folder: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    assert finish(tiny_run(tiny_folder, run_dir, "--steps", "3"), log) == 0
    assert finish(tiny_run(tiny_folder, run_dir, "--steps", "3"), log) == 0
    assert "is finished: all 3 steps are done" in log.read_text()
    assert finish(tiny_run(tiny_folder, run_dir, "--steps", "2"), log) == 2
    assert finish(tiny_run(tiny_folder, run_dir), log) == 0
    assert "steps: 3 -> 6" in log.read_text() and "going on after step 3" in log.read_text()
    assert_same(run_dir, undisturbed)


def test_settings_that_change_the_result_are_refused_unless_allowed(tiny_folder: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    assert finish(tiny_run(tiny_folder, run_dir, "--steps", "2"), log) == 0
    changed = ["--steps", "4", "--optimizer.learning-rate", "1e-3"]
    assert finish(tiny_run(tiny_folder, run_dir, *changed), log) == 2
    assert "these change its result: optimizer.learning_rate" in " ".join(log.read_text().split())
    assert finish(tiny_run(tiny_folder, run_dir, *changed, "--checkpoint.allow-changes"), log) == 0


def test_a_folder_is_held_before_anything_is_in_it(tmp_path: Path) -> None:
    """While the first process still loads its model; who is refused leaves the lock alone, and who leaves, nothing."""
    run_dir, config = tmp_path / "deep" / "run", TrainConfig()
    with RunFolder(run_dir, config):
        for _ in range(2):
            with pytest.raises(UserError, match="another process is at work"), RunFolder(run_dir, config):
                pass
        assert (run_dir / "lock").is_file()
    assert not (tmp_path / "deep").exists()


def test_a_second_process_is_refused_at_once(tiny_folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = start(tiny_run(tiny_folder, run_dir, "--steps", "200"), tmp_path / "log")
    wait_for((run_dir / "metrics.jsonl").is_file)
    began = time.monotonic()
    assert finish(tiny_run(tiny_folder, run_dir, "--steps", "200"), tmp_path / "second") == 2
    assert "another process is at work in" in (tmp_path / "second").read_text()
    assert time.monotonic() - began < 5
    kill(first)
    assert finish(tiny_run(tiny_folder, run_dir, "--steps", "3", "--checkpoint.every", "1"), tmp_path / "log") in (0, 2)
    assert "another process" not in (tmp_path / "log").read_text(), "the lock of a dead process is none"


def handles(process: ForkServerProcess, number: signal.Signals) -> bool:
    caught = Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) >> (number - 1) & 1)


PHASES = {
    "loading": lambda run: True,
    "first evaluation": lambda run: (run / "config.yaml").is_file(),
    "training": lambda run: len(checkpoint.complete_steps(run)) >= 1,
}


@pytest.mark.parametrize(
    ("phase", "number"),
    [*((phase, signal.SIGTERM) for phase in PHASES), ("training", signal.SIGINT), ("training", signal.SIGUSR1)],
)
def test_a_signal_saves_and_stops(
    tiny_folder: Path, tmp_path: Path, undisturbed: dict[str, Any], phase: str, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    process = start(tiny_run(tiny_folder, run_dir), tmp_path / "log")
    wait_for(lambda: handles(process, number) and PHASES[phase](run_dir))
    time.sleep(0.01)
    os.kill(process.pid, number)  # type: ignore[arg-type]
    process.join(20)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == START_AGAIN, said
    assert f"stopped by {number.name}" in said
    if phase == "training":
        done = len((run_dir / "metrics.jsonl").read_text().splitlines()) - 1
        assert checkpoint.complete_steps(run_dir)[-1] == done, "no step that was done is lost"
    assert finish(tiny_run(tiny_folder, run_dir), tmp_path / "log") == 0
    assert_same(run_dir, undisturbed)


def test_a_signal_while_the_command_imports(tiny_folder: Path, tmp_path: Path) -> None:
    """In a process of its own, which imports torch first; nothing is left behind."""
    command = [sys.executable, "-m", "diffusionrl", *tiny_run(tiny_folder, tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: "torch" in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == START_AGAIN, said
    assert "stopped by SIGTERM before there was anything to save" in said
    assert not (tmp_path / "run").exists()


def test_a_hanging_reward_does_not_hold_the_process(tiny_folder: Path, tmp_path: Path) -> None:
    """Its threads, and those that it started itself, are left behind at the end."""
    (tmp_path / "sleepy_reward.py").write_text(
        "import time\nfrom concurrent.futures import ThreadPoolExecutor\ncalls = []\n"
        "def sleepy(images, prompts, metadata):\n    calls.append(1)\n    if len(calls) > 2:\n"
        "        with ThreadPoolExecutor() as pool:\n            list(pool.map(time.sleep, [100]))\n"
        "    return [float(image.mean()) for image in images]\n"
    )
    options = ["--reward", "sleepy_reward:sleepy", "--rewards.no-normalise", "--rewards.timeout", "0.5", "--steps", "1"]
    arguments = tiny_run(tiny_folder, tmp_path / "run", *options)
    assert finish(arguments, tmp_path / "log", f"find_modules:{tmp_path}") == 1, "nothing was scored in the last step"
    assert "no scores within 0.5 s" in (tmp_path / "log").read_text()


def test_a_lost_terminal_does_not_stop_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    assert finish(tiny_run(tiny_folder, tmp_path / "run", "--steps", "2"), tmp_path / "log", "lose_terminal") in (0, 1)
    assert (tmp_path / "run" / "finished.json").is_file()


def test_workers_of_a_reward_end_by_a_signal_as_processes_do() -> None:
    with interruption.noted():
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads
            worker.start()
        time.sleep(0.5)  # until it runs
        worker.terminate()
        worker.join(5)
        assert worker.exitcode == -signal.SIGTERM


def in_reward(images: Any, prompts: Any, metadata: Any) -> list[float]:
    return [float(image.mean()) for image in images]


@pytest.mark.parametrize("where", ["rollout", "reward", "update", "evaluation", "save"])
def test_a_signal_in_each_phase_of_a_step(
    make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """In one process, at an exact place of step 3; then on, and the same as without."""

    def config(name: str) -> TrainConfig:
        return TrainConfig(
            steps=4,
            prompts_per_step=4,
            run_dir=tmp_path / name,
            sampling=SamplingConfig(num_steps=3, batch_size=4),
            algorithm=DDPOConfig(updates_per_step=2, min_count=1),
            evaluation=EvaluationConfig(every=3, num_samples=2),
            checkpoint=CheckpointConfig(every=3),
        )

    train(config("whole"), policy=make_policy(), reward=in_reward, prompts=["a cat", "a dog"])
    owner, name, nth = {
        "rollout": (rollout, "denoise_step", 2 + 3 + 2 * 6 + 1),  # first evaluation: 3; a step: 3 here, 3 * 2 in its updates
        "reward": (Mixture, "score", 4),
        "update": (DDPO, "losses", 6),
        "evaluation": (evaluation, "write_sample", 3),
        "save": (checkpoint, "save_file", 1),
    }[where]
    original, calls = getattr(owner, name), []

    def stopping(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, stopping)
    with pytest.raises(Interrupted):
        train(config("stopped"), policy=make_policy(), reward=in_reward, prompts=["a cat", "a dog"])
    monkeypatch.undo()
    assert checkpoint.complete_steps(tmp_path / "stopped") in ([2], [3])
    assert (tmp_path / "stopped" / "export").is_dir()
    train(config("stopped"), policy=make_policy(), reward=in_reward, prompts=["a cat", "a dog"])
    assert what_it_made(tmp_path / "stopped") == what_it_made(tmp_path / "whole")


@pytest.fixture(scope="module")
def two_checkpoints(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    assert finish(tiny_run(tiny_folder, folder / "run", "--steps", "4"), folder / "log") == 0
    return folder / "run"


def test_every_flipped_bit_is_found(two_checkpoints: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    for i in range(20):
        copy = tmp_path / str(i)
        shutil.copytree(two_checkpoints, copy)
        flip_bit(checkpoint.folder_of(copy, 4), rng)
        with pytest.raises(checkpoint.Corrupted):
            checkpoint.load(checkpoint.folder_of(copy, 4))
        with pytest.raises(UserError, match="corrupted checkpoint"):
            checkpoint.load_newest(copy, exact=True)
        found = checkpoint.load_newest(copy, exact=False)
        assert found is not None and found.step == 2


def test_missing_surplus_and_truncated_files_are_found(two_checkpoints: Path, tmp_path: Path) -> None:
    for i, spoil in enumerate(
        [
            lambda folder: (folder / "policy.safetensors").unlink(),
            lambda folder: (folder / "MANIFEST.json").unlink(),
            lambda folder: (folder / "extra.safetensors").write_bytes(b""),
            lambda folder: os.truncate(folder / "optimizer.safetensors", 50),
            lambda folder: (folder / "state.json").write_text("{}"),
            lambda folder: (folder / "MANIFEST.json").write_text("[]"),
        ]
    ):
        copy = tmp_path / str(i)
        shutil.copytree(two_checkpoints, copy)
        spoil(checkpoint.folder_of(copy, 4))
        found = checkpoint.load_newest(copy, exact=False)
        assert found is not None and found.step == 2


def test_a_run_without_a_usable_checkpoint_is_not_begun_anew(tiny_folder: Path, two_checkpoints: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    for step in checkpoint.complete_steps(run_dir):
        (checkpoint.folder_of(run_dir, step) / "MANIFEST.json").write_text("{}")
    assert finish(tiny_run(tiny_folder, run_dir), tmp_path / "log") == 2
    assert "none of the" in (tmp_path / "log").read_text()
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 5


def test_the_best_and_the_newest_are_kept(tmp_path: Path) -> None:
    for step, score in [(1, 0.5), (2, 9.0), (3, float("nan")), (4, None), (5, 1.0), (6, None)]:
        checkpoint.save(tmp_path, checkpoint.Checkpoint(step, {"policy": {"w": torch.zeros(2)}}, {"score": score}))
        checkpoint.prune(tmp_path, keep=2)
    assert checkpoint.complete_steps(tmp_path) == [2, 5, 6]
    checkpoint.prune(tmp_path, keep=1, best=5)
    assert checkpoint.complete_steps(tmp_path) == [5, 6], "the one that is named is the best, whatever the scores say"


def test_a_corrupted_checkpoint_does_not_count_among_those_that_are_kept(two_checkpoints: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    (checkpoint.folder_of(run_dir, 4) / "state.json").write_text("{}")
    assert checkpoint.load_newest(run_dir, exact=False) is not None
    assert checkpoint.complete_steps(run_dir) == [2]
    assert (run_dir / "checkpoints" / "corrupted_step_000004").is_dir()


def test_other_prompts_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    prompts, log = tmp_path / "prompts.txt", tmp_path / "log"
    prompts.write_text("a cat\na dog\n")
    arguments = tiny_run(tiny_folder, tmp_path / "run", "--prompts", str(prompts))
    assert finish([*arguments, "--steps", "2"], log) == 0
    prompts.write_text("a cat\nan ant\n")
    assert finish(arguments, log) == 2
    assert "the prompts are not those that the run began with" in log.read_text()


def test_broken_prompts_that_were_drawn_are_remembered(
    make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusionrl.data.prompts.CHECKED", 1)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\nbroken\n')
    config = TrainConfig(
        steps=4,
        prompts=str(tmp_path / "p.jsonl"),
        max_broken_prompts=1,
        prompts_per_step=8,
        sampling=SamplingConfig(num_steps=2, batch_size=8),
        algorithm=DDPOConfig(updates_per_step=1, min_count=1),
        evaluation=EvaluationConfig(every=0, num_samples=2),
        checkpoint=CheckpointConfig(every=1),
    )
    for steps in (2, 4):
        train(replace(config, steps=steps, run_dir=tmp_path / "halves"), policy=make_policy(), reward=in_reward)
    found = checkpoint.load_newest(tmp_path / "halves", exact=True)
    assert found is not None and [place for place, _ in found.state["tasks"][""]["broken"]] == [1]
    fresh = load_prompts(config.prompts, 1)
    task = Task(config.all_tasks[0], fresh, as_mixture(in_reward), make_algorithm(config), config)
    TrainingState(make_policy(), [task], config).restore(found)
    assert list(fresh.broken) == [1]  # type: ignore[attr-defined]


def test_a_run_goes_on_from_the_checkpoint_before_a_corrupted_one(
    tiny_folder: Path, two_checkpoints: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    flip_bit(checkpoint.folder_of(run_dir, 4), random.Random(1))
    assert finish(tiny_run(tiny_folder, run_dir, "--checkpoint.exact"), tmp_path / "log") == 2
    assert finish(tiny_run(tiny_folder, run_dir), tmp_path / "log") == 0
    assert "corrupted checkpoint passed over" in (tmp_path / "log").read_text()
    assert_same(run_dir, undisturbed)


@pytest.mark.parametrize("fault", ["1", "20", "17:EROFS"])
def test_a_full_or_read_only_disk_stops_the_run_and_loses_nothing(
    tiny_folder: Path, tmp_path: Path, undisturbed: dict[str, Any], fault: str
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    assert finish(tiny_run(tiny_folder, run_dir), log, f"fill_disk_at:{fault}") == 1
    said = log.read_text()
    assert ("Read-only file system" if "EROFS" in fault else "No space left on device") in said
    assert "MB are free" in said and "Traceback" not in said
    for step in checkpoint.complete_steps(run_dir):
        checkpoint.verify(checkpoint.folder_of(run_dir, step))
    assert finish(tiny_run(tiny_folder, run_dir), log) == 0
    assert_same(run_dir, undisturbed)


def test_a_disk_that_is_too_small_is_said_before_anything_slow(
    make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match=r"may need .* MB in .* and 0 MB are free"):
        train(TrainConfig(run_dir=tmp_path / "run"), policy=make_policy(), reward=in_reward, prompts=["a cat"])
    assert not (tmp_path / "run").exists()


def test_with_everything_at_hand_nobody_reaches_for_the_network(
    tiny_folder: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    clip = str(EMBEDDED_MODEL.parent / "clip")
    rewards = ["--reward", "clip-score", "--rewards.clip-score.model", clip]
    assert finish(tiny_run(tiny_folder, tmp_path / "run", *rewards), tmp_path / "log", "cut_network") == 0
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "cache" / "models--some--model"
    shutil.copytree(tiny_folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    arguments = tiny_run(tiny_folder, tmp_path / "cached", "--model", "some/model")
    assert finish(arguments, tmp_path / "log", f"use_cache:{tmp_path / 'cache'}") == 0, (tmp_path / "log").read_text()
    made, expected = what_it_made(tmp_path / "cached"), dict(undisturbed["files"])
    for files in (made["files"], expected):
        del files["export/README.md"]  # which names the model
    assert (made["files"], made["metrics"]) == (expected, undisturbed["metrics"])
    assert finish(tiny_run(tiny_folder, tmp_path / "other", "--model", "no/such"), tmp_path / "log", "cut_network") == 99


def test_nothing_of_unix_alone_is_needed_to_import(tmp_path: Path) -> None:
    assert finish_elsewhere(tmp_path / "log") == 0, (tmp_path / "log").read_text()


def test_prompts_are_never_paths_or_markup(tiny_folder: Path, tmp_path: Path) -> None:
    nasty = [
        "../../x",
        "/etc/passwd",
        "<script>alert(1)</script>",
        "{prompt}",
        "%s%n",
        "$(touch y)",
        "a\tb",
        "-h",
        "\u202etac a",
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(nasty))
    before = set(tmp_path.iterdir())
    run_dir = tmp_path / "folder" / "run"
    arguments = tiny_run(tiny_folder, run_dir, "--prompts", str(tmp_path / "prompts.txt"), "--evaluation.num-samples", "9")
    assert finish(arguments, tmp_path / "log") == 0
    assert set(tmp_path.iterdir()) - before == {tmp_path / "folder", tmp_path / "log"}
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"run"}
    samples = {path.name for path in (run_dir / "samples" / "step_000000").iterdir()}
    assert samples == {"grid.png", "samples.jsonl", *(f"{i:05d}.png" for i in range(9))}
