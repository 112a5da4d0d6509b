"""Alarms: the silent failure that each is for is planted in a run and found, once; healthy runs raise none."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_points import make_painter
from torch import Tensor

from diffusionrl import TrainConfig, train
from diffusionrl.api import _try
from diffusionrl.config import (
    CheckpointConfig,
    DDPOConfig,
    EvaluationConfig,
    OptimizerConfig,
    PolicyConfig,
    RWRConfig,
    SamplingConfig,
)
from diffusionrl.data.prompts import Prompt
from diffusionrl.rewards import as_mixture
from diffusionrl.runs.alarms import PATIENCE, Alarm, Watch, ratio_tolerance
from diffusionrl.runs.folder import RunFolder
from diffusionrl.sampling import rollout

CONFIG = TrainConfig(
    steps=PATIENCE,
    prompts_per_step=2,
    samples_per_prompt=4,
    sampling=SamplingConfig(num_steps=2, guidance=1.0, batch_size=8),
    algorithm=DDPOConfig(updates_per_step=2, normalisation="group", clip_range=1e-2),
    evaluation=EvaluationConfig(num_samples=4),
)
HEALTHY = {
    "reward/mean": 0.5,
    "reward/std": 1.0,
    "reward/invalid": 0,
    "advantage/idle_prompts": 0,
    "advantage/prompts": 2,
    "ratio/max_gap": 1e-7,
    "policy/clip_fraction": 0.1,
    "policy/approx_kl": 1e-8,
    "grad_rms": 1e-5,
}


def brightness(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
    return images.mean((1, 2, 3))


def alarms_of(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "alarms.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def kinds(found: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(alarm["step"], alarm["kind"]) for alarm in found]


# Planted in a run


def constant(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
    return torch.full((len(images),), 0.7)


def length_of_the_prompt(images: Tensor, prompts: Sequence[str], metadata: Any) -> list[float]:
    return [float(len(prompt)) for prompt in prompts]


def run(policy: Any, run_dir: Path, config: TrainConfig = CONFIG, reward: Any = brightness) -> list[tuple[int, str]]:
    train(replace(config, run_dir=run_dir), policy, reward, ["a cat", "a dog on a chair"])
    return kinds(alarms_of(run_dir))


def test_a_healthy_run_raises_none(make_policy: Any, tmp_path: Path, capsys: Any) -> None:
    assert run(make_policy(), tmp_path / "run") == []
    assert "warning" not in capsys.readouterr().err
    assert not (tmp_path / "run" / "alarms.jsonl").exists()


def test_a_constant_reward(tmp_path: Path, capsys: Any) -> None:
    """Named at the first evaluation, and alone: that there is no advantage and no gradient follows from it."""
    assert run(make_painter(), tmp_path / "run", reward=constant) == [(0, "constant-reward")]
    assert "warning: step 0: the reward gave every image of the first evaluation the same score" in capsys.readouterr().err


def test_prompts_without_advantage(tmp_path: Path) -> None:
    assert (PATIENCE, "idle-prompts") in run(make_painter(), tmp_path / "run", reward=length_of_the_prompt)


def test_a_vanishing_gradient(tmp_path: Path) -> None:
    policy = make_painter()
    for weight in policy.trainable().values():
        weight.register_hook(lambda gradient: gradient * 1e-12)
    assert (PATIENCE, "small-gradient") in run(policy, tmp_path / "run")


def test_a_ratio_that_is_off(make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = rollout.sample_trajectories

    def planted(*arguments: Any) -> rollout.Trajectories:
        drawn = honest(*arguments)
        return replace(drawn, log_probs=drawn.log_probs + 3e-5)

    monkeypatch.setattr(rollout, "sample_trajectories", planted)
    assert run(make_policy(), tmp_path / "run") == [(1, "ratio")]


def test_a_policy_that_stands_still(tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer=OptimizerConfig(learning_rate=1e-30))
    assert run(make_painter(), tmp_path / "run", config) == [(PATIENCE, "policy-still")]


ON_POLICY = DDPOConfig(variant="sf", updates_per_step=1, normalisation="group")


@pytest.mark.parametrize("algorithm", [ON_POLICY, RWRConfig(updates_per_step=2, batch_size=4)], ids=["sf", "rwr"])
def test_a_policy_that_stands_still_is_seen_without_ratios_too(tmp_path: Path, algorithm: Any) -> None:
    """At the evaluations, once; the adapter is moved off zero by the first of many steps where it learns."""
    config = replace(CONFIG, steps=3, algorithm=algorithm, evaluation=EvaluationConfig(every=1, num_samples=4))
    still = replace(config, optimizer=OptimizerConfig(learning_rate=1e-30, weight_decay=0.0))
    assert run(untrained(), tmp_path / "still", still) == [(1, "policy-still")]
    assert run(untrained(), tmp_path / "moving", config) == []


def untrained() -> Any:
    """Whose adapter changes nothing yet."""
    policy = make_painter()
    for name, weight in policy.trainable().items():
        if "lora_B" in name:
            weight.data.zero_()
    return policy


def test_updates_beyond_the_clip(make_policy: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, algorithm=replace(CONFIG.algorithm, clip_range=1e-9, updates_per_step=4))
    assert run(make_policy(), tmp_path / "run", config) == [(PATIENCE, "clip-fraction")]


# The rules


def see_all(config: TrainConfig, lines: list[dict[str, Any]]) -> list[Alarm]:
    watch = Watch(config)
    return [alarm for line in lines for alarm in watch.see(line)]


def lines_with(**changes: list[Any]) -> list[dict[str, Any]]:
    """Healthy lines from step 1 on, but for what changes."""
    length = len(next(iter(changes.values())))
    named = {key.replace("__", "/"): values for key, values in changes.items()}
    return [{"step": i + 1, **HEALTHY, **{key: values[i] for key, values in named.items()}} for i in range(length)]


def test_an_alarm_is_raised_again_only_after_it_went_away() -> None:
    lines = lines_with(grad_rms=[0.0] * 6 + [1e-5] + [0.0] * 5)
    assert [(alarm.step, alarm.kind) for alarm in see_all(CONFIG, lines)] == [(3, "small-gradient"), (10, "small-gradient")]


def test_one_bad_batch_is_no_alarm() -> None:
    assert see_all(CONFIG, lines_with(grad_rms=[1e-5, 0.0, 0.0, 1e-5, 0.0, 0.0, 1e-5])) == []


def test_a_reward_that_stops_varying() -> None:
    lines = lines_with(reward__std=[0.5, 2.0, 0.03, 0.01, 0.01, 0.01])
    assert [(alarm.step, alarm.kind) for alarm in see_all(CONFIG, lines)] == [(6, "constant-reward")]


def test_rounding_is_no_variation() -> None:
    lines = lines_with(reward__std=[6e-8] * 3, reward__mean=[0.7] * 3)
    assert [(alarm.step, alarm.kind) for alarm in see_all(CONFIG, lines)] == [(3, "constant-reward")]


BEST_ALONE = replace(CONFIG, algorithm=RWRConfig(variant="sparse"))
COARSE = replace(CONFIG, policy=PolicyConfig(dtype="bfloat16"))
PAIR = replace(CONFIG, prompts_per_step=1, samples_per_prompt=2, algorithm=RWRConfig())


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (BEST_ALONE, {"advantage__idle_prompts": [2] * 5, "ratio__max_gap": [None] * 5}),
        (replace(CONFIG, algorithm=DDPOConfig(updates_per_step=1)), {"policy__approx_kl": [0.0] * 5}),
        (COARSE, {"ratio__max_gap": [5e-4] * 5, "policy__approx_kl": [1e-6] * 5}),
        (PAIR, {"reward__std": [0.0] * 5, "reward__invalid": [1] * 5}),
        (CONFIG, {"reward__std": [None] * 5, "grad_rms": [0.0] * 5, "reward__invalid": [8] * 5}),
    ],
    ids=["the best samples alone", "one update a step", "bfloat16", "one valid sample", "no valid sample"],
)
def test_what_is_meant_to_be_so_is_no_alarm(config: TrainConfig, changes: dict[str, list[Any]]) -> None:
    lines = [{key: value for key, value in line.items() if key != "ratio/max_gap" or value} for line in lines_with(**changes)]
    assert see_all(config, lines) == []


def test_lines_of_older_runs_are_read() -> None:
    """Without the metrics that the rules are on, the rules say nothing."""
    lines = lines_with(reward__std=[1.0] * 5)
    for line in lines:
        del line["grad_rms"], line["advantage/prompts"], line["advantage/idle_prompts"]
    assert see_all(CONFIG, lines) == []


def test_the_tolerance_of_the_ratio() -> None:
    assert ratio_tolerance(CONFIG) == 1e-5
    assert ratio_tolerance(replace(CONFIG, policy=PolicyConfig(dtype="bfloat16"))) == pytest.approx(1e-3)
    summed = replace(CONFIG.algorithm, logprob_reduction="sum", clip_range=0.2)
    assert ratio_tolerance(replace(CONFIG, algorithm=summed)) == pytest.approx(0.02)


# Once, however often the run is taken up


def test_a_run_taken_up_again_raises_no_alarm_twice_and_none_too_few(tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer=OptimizerConfig(learning_rate=1e-30), checkpoint=CheckpointConfig(every=1))
    straight = replace(config, steps=5)
    assert run(make_painter(), tmp_path / "straight", straight) == [(3, "policy-still")]
    for steps in (2, 4, 5):
        run(make_painter(), tmp_path / "parts", replace(config, steps=steps))
    assert alarms_of(tmp_path / "parts") == alarms_of(tmp_path / "straight")


def write(folder: RunFolder, lines: list[dict[str, Any]], step: int | None) -> None:
    folder.begin(step, torch.device("cpu"))
    for line in lines:
        folder.log({"queries": 0, **line})


@pytest.mark.parametrize("back_to", [None, 1, 2, 3, 4, 5])
def test_what_is_made_again_is_alarmed_again(
    tmp_path: Path, back_to: int | None, make_folder: Callable[[Path], RunFolder]
) -> None:
    """A run is killed after step 5, in the middle of a line, and goes on from an older checkpoint."""
    lines = lines_with(grad_rms=[1e-5, 0.0, 0.0, 0.0, 0.0, 0.0, 1e-5])
    with make_folder(tmp_path / "straight") as folder:
        write(folder, lines, None)
        folder.alarm(7, "guard", "another watcher's")
    with make_folder(tmp_path / "killed") as folder:
        write(folder, lines[:5], None)
    with (tmp_path / "killed" / "alarms.jsonl").open("a") as file:
        file.write('{"step": 5, "ki')
    with make_folder(tmp_path / "killed") as folder:
        write(folder, lines[back_to or 0 :], back_to)
        folder.alarm(7, "guard", "another watcher's")
    assert alarms_of(tmp_path / "killed") == alarms_of(tmp_path / "straight")
    assert kinds(alarms_of(tmp_path / "killed")) == [(4, "small-gradient"), (7, "guard")]


@pytest.fixture
def make_folder() -> Callable[[Path], RunFolder]:
    return lambda run_dir: RunFolder(run_dir, CONFIG)


def test_a_reward_that_does_not_repeat_itself_is_told_when_a_run_begins(
    capsys: Any,
) -> None:
    generator = torch.Generator().manual_seed(0)

    def rolling(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        return images.mean((1, 2, 3)) + torch.rand(len(images), generator=generator)

    def by_prompt(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        return images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])

    def nothing_on_grey(images: Tensor, prompts: Sequence[str], metadata: Any) -> list[float | None]:
        return [None, *[1.0] * (len(images) - 1)]

    for name, reward in (("steady", by_prompt), ("unseen", nothing_on_grey), ("rolling", rolling)):
        _try(as_mixture(reward), [Prompt("a cat"), Prompt("a dog on a chair")], (3, 8, 8), TrainConfig(), (2,))
        said = capsys.readouterr().err
        assert ("rolling: the same grey image twice gets different scores" in said) == (name == "rolling"), name


def test_alarms_are_told_before_the_run_begins_too(tmp_path: Path, capsys: Any) -> None:
    """What costs nothing is looked at when a run begins: here, statistics that hardly ever fill."""
    config = replace(CONFIG, steps=1, algorithm=replace(CONFIG.algorithm, normalisation="prompt", min_count=16))
    run(make_painter(), tmp_path / "run", config)
    assert "warning: 2 prompts x 4 a step; 0% of the samples" in capsys.readouterr().err
