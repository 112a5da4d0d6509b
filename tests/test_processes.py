"""Several processes are one run: the same samples, the same weights, and no hang where one of them dies.

Two processes on the CPU (gloo). One test has torchrun start them, as a user does; as that takes some ten seconds a process on a
slow core, the others are forked from a server, with what torchrun would tell them.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults import finish_together
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from diffusionrl import processes
from diffusionrl.algorithms import DDPO
from diffusionrl.api import _check_shares, train
from diffusionrl.config import CheckpointConfig, DDPOConfig, EvaluationConfig, PretrainingConfig, SamplingConfig, TrainConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import RunStopped, UserError
from diffusionrl.policies import StableDiffusionPolicy
from diffusionrl.rewards import as_mixture
from diffusionrl.runs.checkpoint import load_newest
from diffusionrl.runs.lines import read_metrics
from diffusionrl.sampling.rollout import Rollout
from diffusionrl.training.optimization import Optimization
from diffusionrl.training.state import TrainingState
from diffusionrl.training.tasks import Task

pytestmark = pytest.mark.timeout(400)  # starts of several processes on what may be a busy machine

SMALL = (
    *("--model", "./tiny", "--policy.device", "cpu", "--steps", "3", "--prompts-per-step", "4", "--samples-per-prompt", "2"),
    *("--sampling.num-steps", "2", "--sampling.batch-size", "4", "--evaluation.num-samples", "4"),
    *("--checkpoint.every", "1"),
)
REWARD = """
import os, signal

calls = 0
first = os.environ.get("RANK", "0") == "0"


def dies(images, prompts, metadata):  # the trial is the first call, the evaluation the second
    global calls
    calls += 1
    if calls == 4 and not first:
        os.kill(os.getpid(), signal.SIGKILL)
    return images.mean((1, 2, 3))


def bright(images, prompts, metadata):
    return images.mean((1, 2, 3))


def side(images):
    return (images[:, 0, 0, 0] > images[:, 0, -1, -1]).long()


def fails(images, prompts, metadata):
    global calls
    calls += 1
    if calls == 3 and not first:
        raise ValueError("only here")
    return images.mean((1, 2, 3))
"""


JOINT = """
algorithm: {name: diffusionrl, timesteps_per_step: 2, micro_batch_size: 2}
reward: ours:bright
rewards: {parity: {attribute: ours:side, classes: [left, right], credit: leave-one-out}}
evaluation: {samples_per_prompt: 2}
tasks:
  - {name: people, reward: parity, prompts: occupations, prompts_per_step: 4, samples_per_prompt: 2}
pretraining: {source: emoji, batch_size: 4, updates: 2}
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """With the tiny model and the rewards above in it."""
    (tmp_path / "tiny").symlink_to(tiny_folder)
    (tmp_path / "ours.py").write_text(REWARD)
    return tmp_path


def run(folder: Path, count: int, *options: str) -> str:
    """``diffusionrl train`` on so many processes, to its end; returns what it said."""
    return finish_together(["train", *SMALL, *options], folder, count)


def weights(run_dir: Path) -> torch.Tensor:
    found = load_newest(run_dir, exact=True)
    assert found is not None
    return torch.cat([found.tensors["policy"][name].flatten() for name in sorted(found.tensors["policy"])])


def samples(run_dir: Path) -> dict[str, bytes]:
    """Every image of every evaluation."""
    images = sorted((run_dir / "samples").glob("step_*/**/0*.png"))
    assert images
    return {str(image.relative_to(run_dir)): image.read_bytes() for image in images}


def compare_metrics(one: Path, two: Path) -> None:
    """Those of two processes are those of one, to the rounding of their sums."""
    for alone, together in zip(read_metrics(one), read_metrics(two), strict=True):
        for key in alone:
            if alone[key] is not None and "time/" not in key and not key.startswith("peak"):
                assert together[key] == pytest.approx(alone[key], rel=1e-5, abs=1e-9), key


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm())


def test_two_processes_make_the_run_of_one(folder: Path) -> None:
    for count, name in ((1, "one"), (2, "two")):
        run(folder, count, "--evaluation.held-out", "incompressibility", "--run-dir", name)
    one, two = folder / "one", folder / "two"
    assert torch.equal(weights(one), weights(two))
    assert samples(one) == samples(two)
    compare_metrics(one, two)
    line = read_metrics(two)[-1]
    assert line["processes"] == 2 and line["communication/bytes"] > 0 and line["time/communication"] > 0
    exported = [load_file(run / "export" / "pytorch_lora_weights.safetensors") for run in (one, two)]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


def test_two_processes_make_the_joint_run_of_one(folder: Path) -> None:
    """DiffusionRL on two rewards, of which one looks at groups, and the pretraining loss."""
    (folder / "joint.yaml").write_text(JOINT)
    for count, name in ((1, "one"), (2, "two")):
        run(folder, count, "--config", "joint.yaml", "--steps", "2", "--run-dir", name)
    one, two = folder / "one", folder / "two"
    assert torch.equal(weights(one), weights(two))
    assert samples(one) == samples(two)
    compare_metrics(one, two)
    last = read_metrics(two)[-1]
    assert last["pretraining/loss"] > 0 and last["people/policy/approx_kl"] > 0, "all three were trained on"


def test_two_processes_make_one_run_of_what_compares_whole_groups(folder: Path) -> None:
    """CRD: centred within groups, with two older copies and the reference model."""
    options = ["--algorithm.name", "crd", "--algorithm.noisings", "2", "--algorithm.micro-batch-size", "3", "--steps", "2"]
    for count, name in ((1, "one"), (2, "two")):
        run(folder, count, *options, "--run-dir", name)
    assert apart(weights(folder / "one"), weights(folder / "two")) < 1e-5
    compare_metrics(folder / "one", folder / "two")


def test_sharded_weights_learn_as_whole_ones(folder: Path) -> None:
    options = ["--policy.training", "full", "--optimizer.learning-rate", "1e-4", "--steps", "2"]
    # Shares of 4 and 5 samples, in 1 and 2 batches of 4.
    options += ["--prompts-per-step", "9", "--samples-per-prompt", "1", "--algorithm.updates-per-step", "3"]
    options += ["--evaluation.num-samples", "9", "--reward", "ours:bright"]  # rounding moves a file's size by bytes
    run(folder, 1, *options, "--run-dir", "one")
    run(folder, 2, *options, "--run-dir", "two")
    alone, together = (read_metrics(folder / name) for name in ("one", "two"))
    assert alone[0]["eval/reward"] == pytest.approx(together[0]["eval/reward"], rel=1e-5)
    assert alone[1]["reward/mean"] == pytest.approx(together[1]["reward/mean"], rel=1e-5)
    assert apart(weights(folder / "one"), weights(folder / "two")) < 1e-4  # the sum is rounded in another order
    said = run(folder, 2, *options, "--run-dir", "two", "--steps", "3")
    assert "going on after step 2" in said
    assert said.count("going on after") == 1
    assert len(load_file(next((folder / "two" / "export" / "unet").glob("*.safetensors")))) > 50


def test_sharded_weights_are_gathered_for_checkpoints_alone(
    monkeypatch: pytest.MonkeyPatch, make_policy: Callable[..., StableDiffusionPolicy], tmp_path: Path
) -> None:
    captured: list[int] = []
    original = TrainingState.capture
    monkeypatch.setattr(
        TrainingState, "capture", lambda self, step, *rest: captured.append(step) or original(self, step, *rest)
    )
    monkeypatch.setattr(Optimization, "sharded", True)
    config = TrainConfig(
        steps=5,
        prompts_per_step=4,
        sampling=SamplingConfig(num_steps=2),
        evaluation=EvaluationConfig(every=0, num_samples=2),
        checkpoint=CheckpointConfig(every=2),
        run_dir=tmp_path / "run",
    )
    train(config, make_policy(), lambda images, *_: images.mean((1, 2, 3)), ["a cat"])
    assert captured == [0, 2, 4, 5]


def test_whole_copies_are_the_main_processs(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []
    monkeypatch.setattr(processes, "whole", lambda tensor: gathered.append(len(tensor)) or tensor)
    tensors = {"a": torch.ones(1), "b": torch.ones(2)}
    assert list(processes.copies(tensors)) == ["a", "b"]
    monkeypatch.setattr(processes, "is_main", lambda: False)
    assert processes.copies(tensors) == {} and gathered == [1, 2, 1, 2], "the others help"


def test_what_cannot_be_shared_is_refused_by_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 4)
    for setting, config in (
        ("prompts_per_step", TrainConfig(prompts_per_step=2, samples_per_prompt=2)),
        ("evaluation.num_samples", TrainConfig(evaluation=EvaluationConfig(num_samples=6, samples_per_prompt=2))),
        ("pretraining.batch_size", TrainConfig(pretraining=PretrainingConfig("emoji", batch_size=3))),
    ):
        with pytest.raises(UserError, match=f"among 4 processes: start fewer, or raise {setting}$"):
            _check_shares(config)


def test_a_process_that_dies_ends_the_run_and_loses_nothing(folder: Path) -> None:
    options = ("--reward", "ours:dies", "--run-dir", "two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "diffusionrl", "train", *SMALL, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    # The survivor finds the other one gone, or is told to end by torchrun, which found it first.
    assert "another process has ended or does not answer" in said or "saved and stopped by SIGTERM" in said
    found = load_newest(folder / "two", exact=True)
    assert found is not None
    assert found.step < 3
    assert "warning: processes differs" in run(folder, 1, *options)
    run(folder, 1, "--reward", "ours:dies", "--run-dir", "one")
    assert apart(weights(folder / "one"), weights(folder / "two")) < 1e-5


def test_processes_end_with_their_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    parents, asked = iter([7, 7, 1]), []
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "kill", lambda process, number: asked.append((process, number)))
    monkeypatch.setattr(processes, "_LOOK", 0)
    processes._end_with(7)
    assert asked == [(os.getpid(), signal.SIGTERM)]


def test_a_reward_that_fails_on_one_process_has_failed_for_all(folder: Path) -> None:
    run(folder, 2, "--reward", "ours:fails", "--run-dir", "two", "--steps", "2")
    lines = read_metrics(folder / "two")
    assert [line.get("reward/invalid") for line in lines] == [None, 4, 0]
    assert json.loads((folder / "two" / "finished.json").read_text())["steps"] == 2


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 5))
def test_shares_are_whole_units_in_order_and_even(count: int, units: int, unit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "count", lambda: count)
        total = units * unit
        if units < count:
            with pytest.raises(UserError, match="cannot be shared"):
                processes.share(total, unit, 0)
            return
        shares = [processes.share(total, unit, process) for process in range(count)]
    assert [i for share in shares for i in share] == list(range(total))
    assert all(len(share) % unit == 0 for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= unit


@given(st.sampled_from([1, 2, 4]), st.integers(1, 9), st.integers(0, 1000))
def test_micro_batches_are_the_same_on_any_number_of_processes(count: int, size: int, seed: int) -> None:
    rows = torch.randint(0, 32, (50, 2), generator=torch.Generator().manual_seed(seed))
    empty = torch.zeros(32, 1)
    rollout = Rollout(None, [Prompt("")] * 32, empty, empty, empty, None, {}, batch_size=8)  # type: ignore[arg-type]
    alone = rollout.micro_batches(rows, size, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "count", lambda: count)
        shared = [micro for process in range(count) for micro in rollout.micro_batches(rows, size, process)]
    assert [micro.tolist() for micro in shared] == [micro.tolist() for micro in alone]
    assert sorted(row for micro in alone for row in micro.tolist()) == sorted(rows.tolist())
    assert all(len(micro) <= size for micro in alone)


def test_processes_with_different_weights_are_stopped(
    monkeypatch: pytest.MonkeyPatch, make_policy: Callable[..., StableDiffusionPolicy]
) -> None:
    config = TrainConfig()
    task = Task(config.all_tasks[0], [Prompt("a cat")], as_mixture(lambda *_: [0.0]), DDPO(DDPOConfig(), 1.0), config)
    state = TrainingState(make_policy(), [task], config)
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "ask", lambda said: [said, said])
    assert state.capture(4).step == 4
    monkeypatch.setattr(processes, "ask", lambda said: [said, said if isinstance(said, dict) else f"not {said}"])
    with pytest.raises(RunStopped, match="different weights after step 4"):
        state.capture(4)
