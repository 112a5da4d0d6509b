"""Joint training: several rewards in turn, each with prompts, statistics and randomness of its own, and exact resume."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_points import make_painter
from safetensors.torch import load_file
from torch import Tensor

from diffusionrl import Prompt, RunStopped, TrainConfig, UserError, train
from diffusionrl.algorithms import make_algorithm
from diffusionrl.cli import main, parse_train
from diffusionrl.config import CheckpointConfig, DDPOConfig, EvaluationConfig, SamplingConfig, TaskConfig, to_yaml
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.data.prompts import load_prompts
from diffusionrl.interruption import Interrupted
from diffusionrl.rewards import Scores, as_mixture
from diffusionrl.runs.checkpoint import Checkpoint
from diffusionrl.sampling.rollout import Rollout
from diffusionrl.training.tasks import Task
from diffusionrl.training.trainer import Trainer

REWARDS = """
import os, signal

calls = []


def bright(images, prompts, metadata):
    return images.mean((1, 2, 3))


def blue(images, prompts, metadata):
    assert all(prompt.startswith("an ") for prompt in prompts)
    return images[:, 2].mean((1, 2)) * 100


blue.counts = {"asked": 3}


def killing(images, prompts, metadata):
    calls.append(len(images))
    if len(calls) == 6:  # the trial, the first evaluation, two steps, the evaluation, and now the third step
        os.kill(os.getpid(), signal.SIGTERM)
    return blue(images, prompts, metadata)


def failing(images, prompts, metadata):
    return blue(images, prompts, metadata) if len(images) < 4 else [None] * len(images)


def short(images, prompts, metadata):
    return [1.0]
"""

YAML = """
reward: incompressibility
samples_per_prompt: 4
tasks:
  - name: things
    reward: [compressibility=2, aesthetic]
    prompts: things
    prompts_per_step: 4
    samples_per_prompt: 2
  - name: people
    reward: emoji-gold
    prompts: occupations
    prompts_per_step: 8
"""


def bright(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, object]]) -> Tensor:
    return images.mean((1, 2, 3))


def blue(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, object]]) -> Tensor:
    return images[:, 2].mean((1, 2))


def joint(**settings: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "steps": 4,
            "prompts_per_step": 4,
            "sampling": SamplingConfig(num_steps=3, sampler="cps", eta=0.7, batch_size=8),
            "algorithm": DDPOConfig(updates_per_step=2, min_count=2),
            "evaluation": EvaluationConfig(every=2, num_samples=2),
            "checkpoint": CheckpointConfig(every=1),
            "tasks": (TaskConfig("blue", ("joint_rewards:blue",), "articles.txt", 3, 2),),
        }
        | settings
    )


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with rewards and prompts in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "joint_rewards", raising=False)
    (tmp_path / "joint_rewards.py").write_text(REWARDS)
    (tmp_path / "articles.txt").write_text("an ant\nan owl\n")
    return tmp_path


def trainer_of(policy: Any, config: TrainConfig, tasks: Sequence[TaskConfig] = ()) -> Trainer:
    further = [Task(each, [Prompt("an ant")], as_mixture(blue), make_algorithm(config), config) for each in tasks]
    return Trainer(policy, bright, [Prompt("a cat")], make_algorithm(config), config, further=further)


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if "time/" not in key and key != "peak_memory_gb"}


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [timeless(json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# Settings


def test_tasks_of_a_file_can_be_overridden_and_read_back(tmp_path: Path) -> None:
    (tmp_path / "joint.yaml").write_text(YAML)
    config = parse_train(["--config", str(tmp_path / "joint.yaml"), "--tasks.0.samples-per-prompt", "8"])
    assert config.tasks == (
        TaskConfig("things", ("compressibility=2", "aesthetic"), "things", 4, 8),
        TaskConfig("people", ("emoji-gold",), "occupations", 8, 1),
    )
    assert (config.samples_per_step, config.queries_per_step) == (64, 64 + 32 + 8)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse_train(["--config", str(tmp_path / "config.yaml")]) == config
    assert parse_train([]).tasks == ()


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("tasks: things", "tasks must be a list"),
        ("tasks:\n  - reward: aesthetic", "each with its name"),
        ("tasks:\n  - name: a b", "tasks.0.name must be made of letters, digits, - and _, not 'a b'"),
        ("tasks:\n  - name: reward", "where metrics of the run's own are"),
        ("tasks:\n  - name: a\n  - name: a", "two tasks are named 'a'"),
        ("tasks:\n  - name: a\n    rewrad: aesthetic", "--tasks.0.reward"),
        ("tasks:\n  - name: a\n    prompts_per_step: 0", "task a: prompts_per_step must be at least 1, not 0"),
        ("tasks:\n  - name: a\n    prompts_per_step: 7", "task a: 7 samples a step"),
        ("tasks:\n  - name: a\n    reward: asthetic", "task a: unknown reward 'asthetic'; did you mean 'aesthetic'?"),
        ("tasks:\n  - name: a\n    prompts: nowhere.txt", "task a: prompts 'nowhere.txt': no such file"),
        ("tasks:\n  - name: a\n    reward: joint_rewards:short", "task a: a reward returns one number a sample"),
        ("tasks:\n  - name: a\n    reward: vlm-yes", "task a: rewards.vlm.model is needed"),
    ],
)
def test_bad_tasks(at_home: Path, capsys: Any, yaml: str, said: str) -> None:
    (at_home / "joint.yaml").write_text(yaml + "\n")
    try:
        code = main(["train", "--config", "joint.yaml", "--run-dir", "run"])
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    heard = capsys.readouterr()
    assert code == 2
    assert said in " ".join((heard.err + heard.out).replace("│", " ").split())
    assert not (at_home / "run").exists()


# Steps


def test_each_task_has_its_own_samples_statistics_and_updates() -> None:
    config = joint()
    trainer = trainer_of(make_painter(), config, config.tasks)
    counted: list[int] = []
    trainer.state.optimization.adamw.register_step_post_hook(lambda *_: counted.append(1))
    metrics = trainer.step(1)
    assert len(counted) == 4, "two updates for each of two tasks"
    assert metrics["queries"] == 4 + 6
    assert metrics["blue/ratio/max_gap"] < 1e-5, "the second task samples with what the first one learned"
    assert metrics["blue/advantage/prompts"] == 1 and metrics["blue/time/update"] > 0
    statistics = [task.capture()["algorithm"]["prompt_statistics"] for task in trainer.tasks]
    assert [list(each) for each in statistics] == [["a cat"], ["an ant"]]


def test_the_first_task_draws_as_if_it_were_alone() -> None:
    config = joint()
    alone = timeless(trainer_of(make_painter(), replace(config, tasks=())).step(1))
    beside = timeless(trainer_of(make_painter(), config, config.tasks).step(1))
    assert {key: beside[key] for key in alone} == alone | {"queries": 10}


def test_tasks_draw_by_their_names() -> None:
    tasks = (TaskConfig("one", prompts_per_step=4), TaskConfig("two", prompts_per_step=4))
    config = joint(tasks=tasks)
    metrics = trainer_of(make_painter(), config, tasks).step(1)
    assert metrics["one/reward/mean"] != metrics["two/reward/mean"]
    swapped = trainer_of(make_painter(), replace(config, tasks=tasks[::-1]), tasks[::-1])
    assert swapped.tasks[2].seed == trainer_of(make_painter(), config, tasks).tasks[1].seed


# Runs


def test_a_joint_run_and_its_folder(at_home: Path) -> None:
    config = joint(run_dir=at_home / "run", rewards=RewardsConfig(normalise=True))
    train(config, policy=make_painter(), reward=bright, prompts=["a cat"])
    found = lines(at_home / "run")
    assert [line["queries"] for line in found] == [0, 10, 20, 30, 40]
    assert [("eval/blue/reward" in line, "eval/blue/reward_se" in line) for line in found] == [
        (step % 2 == 0, step % 2 == 0) for step in range(5)
    ]
    assert found[0]["eval/blue/reward"] == pytest.approx(0, abs=1e-4), "normalised by its own first evaluation"
    assert found[1]["blue/reward/joint_rewards:blue/asked"] == 3
    samples = at_home / "run" / "samples" / "step_000004"
    entries = [json.loads(line) for line in (samples / "blue" / "samples.jsonl").read_text().splitlines()]
    assert [entry["prompt"] for entry in entries] == ["an ant", "an owl"]
    assert (samples / "blue" / "grid.png").is_file() and (samples / "samples.jsonl").is_file()
    report = (at_home / "run" / "report.html").read_text()
    assert "reward of task blue" in report
    assert "the reward of task blue, trained on" in (at_home / "run" / "export" / "README.md").read_text()


def test_a_joint_run_goes_on_exactly(at_home: Path) -> None:
    config = joint(tasks=(TaskConfig("blue", ("joint_rewards:killing",), "articles.txt", 3, 2),))
    straight = replace(config, tasks=(replace(config.tasks[0], reward=("joint_rewards:blue",)),), run_dir=at_home / "straight")
    given = {"reward": bright, "prompts": ["a cat", "a dog"]}
    train(straight, policy=make_painter(), **given)
    config = replace(config, run_dir=at_home / "halves")
    with pytest.raises(Interrupted, match="SIGTERM"):
        train(config, policy=make_painter(), **given)
    train(config, policy=make_painter(), **given)

    def said(run_dir: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if "asked" not in k} for line in lines(run_dir)]

    assert said(at_home / "halves") == said(at_home / "straight")
    ends = [at_home / name / "checkpoints" / "step_000004" for name in ("halves", "straight")]
    weights = [load_file(end / "policy.safetensors") for end in ends]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    states = [json.loads((end / "state.json").read_text())["tasks"]["blue"] for end in ends]
    assert states[0]["algorithm"] == states[1]["algorithm"] and states[0]["algorithm"]["prompt_statistics"]


def test_a_checkpoint_is_of_its_tasks() -> None:
    config = joint()
    found = trainer_of(make_painter(), config, config.tasks).state.capture(1)
    assert isinstance(found, Checkpoint)
    with pytest.raises(UserError, match=r"began with other tasks \(further ones: blue; now none\)"):
        trainer_of(make_painter(), replace(config, tasks=())).state.restore(found)
    other = trainer_of(make_painter(), config, config.tasks)
    task = Task(config.tasks[0], [Prompt("a cow")], as_mixture(blue), make_algorithm(config), config)
    changed = Trainer(make_painter(), bright, [Prompt("a cat")], make_algorithm(config), config, further=[task])
    with pytest.raises(UserError, match="task blue: the prompts are not those"):
        changed.state.restore(found)
    other.state.restore(found)


def test_too_many_invalid_samples_are_judged_by_task(at_home: Path) -> None:
    task = TaskConfig("blue", ("joint_rewards:failing",), "articles.txt", 4)
    config = joint(tasks=(task,), rewards=RewardsConfig(invalid_window=2), run_dir=at_home / "run")
    with pytest.raises(RunStopped, match="task blue: 8 of 8 samples of the last 2 steps have no valid score"):
        train(config, policy=make_painter(), reward=bright, prompts=["a cat"])
    assert len(lines(at_home / "run")) == 2


def counted(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, object]]) -> Tensor:
    return images.mean((1, 2, 3))


counted.counts = {"asked": 3}  # type: ignore[attr-defined]


def first_task(prompts: Sequence[Prompt] = (Prompt("a cat"),)) -> Task:
    config = joint(tasks=())
    return Task(config.all_tasks[0], prompts, as_mixture(counted), make_algorithm(config), config)


def test_counts_are_those_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the metrics of every step as in the state, which the main process goes on from."""
    task = first_task()
    monkeypatch.setattr("diffusionrl.processes.ask", lambda said: [said, said])
    (name, count), *_ = task.capture()["counts"].items()
    assert (name.endswith("asked"), count) == (True, 6)
    scores = Scores(torch.zeros(1), torch.ones(1).bool())
    rollout = Rollout(None, [Prompt("a cat")], *[torch.zeros(1)] * 3, scores, {})  # type: ignore[arg-type]
    assert task.metrics(rollout, torch.ones(1))[f"reward/{name}"] == 6


def test_broken_prompts_of_another_file_are_not_counted(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{}\n')
    task = first_task(load_prompts(str(file), max_broken=5))
    state = task.capture()
    task.restore(state | {"broken": [(1, "as it was"), (8, "and one more")]})
    assert task.capture()["broken"] == [(1, "as it was"), (8, "and one more")]
    task.restore(state | {"prompts": "another file's", "broken": [(7, "elsewhere")]})
    assert task.capture()["broken"] == [(1, "as it was"), (8, "and one more")]
