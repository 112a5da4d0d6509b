"""Signal and noise of updates: the estimate against a gradient that is known, and what a run says of it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusionrl import TrainConfig, train
from diffusionrl.config import DDPOConfig, EvaluationConfig, NFTConfig, SamplingConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.report.run_page import write_report
from diffusionrl.rewards import Scores
from diffusionrl.runs.alarms import Watch, fallen_score
from diffusionrl.runs.signal import COSINE, SAMPLES, UPDATES, Signal, signal_of
from diffusionrl.sampling.rollout import Rollout
from diffusionrl.training.optimization import Halves, accumulate_gradient
from diffusionrl.transitions import SamplerTable


class Given:
    """A policy whose gradient of row r is the r-th of some vectors."""

    def __init__(self, gradients: Tensor) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(gradients.shape[1]))
        self.gradients = gradients

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {"weight": self.weight}


class Linear:
    """An objective whose loss is linear in the weights of ``Given``."""

    micro_batch_size = 3

    def weights(self, policy: Any, rollout: Rollout, rows: Tensor, advantages: Tensor) -> Tensor:
        return advantages[rows[:, 0]]

    def losses(self, policy: Any, rollout: Rollout, rows: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (policy.gradients[rows[:, 0]] * policy.weight).sum(1), {}


def rollout_of(samples: int, group_size: int, batch_size: int) -> Rollout:
    nothing = torch.zeros(samples, dtype=torch.float64)
    table: SamplerTable = None  # type: ignore[assignment]  # no sampler is asked for anything
    prompts = [Prompt("a cat")] * samples
    empty, scores = torch.zeros(samples, 0), Scores(nothing, nothing == 0)
    return Rollout(table, prompts, empty, empty, empty, scores, {}, group_size=group_size, batch_size=batch_size)


def halves_of(gradients: Tensor, group_size: int = 1, batch_size: int = 8) -> Halves:
    policy, rollout = Given(gradients), rollout_of(len(gradients), group_size, batch_size)
    rows = torch.arange(len(gradients))[:, None]
    found = accumulate_gradient(Linear(), policy, rollout, rows, torch.ones(len(rows)))[1]  # type: ignore[arg-type]
    assert found is not None
    return found


@settings(max_examples=30)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(1, 9), st.integers(0, 1000))
def test_halves_are_those_of_whole_groups(groups: int, size: int, batch: int, seed: int) -> None:
    """However the samples were drawn in batches and are cut into micro-batches."""
    gradients = torch.randn(groups * size, 5, generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(len(gradients))[:, None]
    middle = rollout_of(len(gradients), size, batch).middle(rows, 3)
    if len(rows) <= min(3, batch):
        assert middle == 0, "a micro-batch is not cut"
        return
    assert 0 < middle < len(rows) and middle % size == 0
    found = halves_of(gradients, size, batch)
    first, second = (each.sum(0).double() / len(gradients) for each in (gradients[:middle], gradients[middle:]))
    expected = [(first @ second).item(), (first @ first).item(), (second @ second).item()]
    assert list(found) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_halves_are_whole_batches_where_they_can_be() -> None:
    """So that an update which is cut as the rollout was computes the same to the bit."""
    rows = torch.arange(64)[:, None]
    assert rollout_of(64, 4, 32).middle(rows, 32) == 32
    assert rollout_of(64, 4, 24).middle(rows, 64) in (24, 48)
    assert rollout_of(64, 4, 64).middle(rows, 63) == 32
    assert rollout_of(64, 4, 64).middle(rows, 64) == 0
    assert rollout_of(64, 4, 30).middle(rows, 8) == 60, "the batch that begins with a group"


def test_one_group_has_no_halves() -> None:
    rollout = rollout_of(4, 4, 4)
    rows = torch.arange(4)[:, None]
    assert accumulate_gradient(Linear(), Given(torch.ones(4, 2)), rollout, rows, torch.ones(4))[1] is None  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio", [0.1, 1.0, 5.0])
def test_the_ratio_of_a_gradient_that_is_known_is_found(ratio: float) -> None:
    """Gradients of a known signal and noise: the estimate over many updates is within four of its standard errors."""
    generator, size, groups = torch.Generator().manual_seed(0), 200, 16
    true = torch.full((size,), math.sqrt(ratio / groups))  # the noise of each group has unit variance
    lines = []
    for step in range(300):
        found = halves_of(true + torch.randn(groups, size, generator=generator))
        cosine = found.product / math.sqrt(found.first * found.second)
        lines.append({"step": step, COSINE: cosine, UPDATES: 1, SAMPLES: groups})
    signal = signal_of(lines)
    assert signal is not None
    assert abs(signal.cosine - ratio / (ratio + 2)) < 4 * signal.error
    assert signal.is_seen
    assert signal.needed == pytest.approx(groups / ratio, rel=0.2)
    assert signal.walk() == pytest.approx(1 / (1 + 300 * ratio), rel=0.2)


def test_noise_alone_has_no_signal() -> None:
    generator = torch.Generator().manual_seed(1)
    found = [halves_of(torch.randn(16, 500, generator=generator)) for _ in range(50)]
    cosines = [each.product / math.sqrt(each.first * each.second) for each in found]
    signal = signal_of([{COSINE: cosine, UPDATES: 2, SAMPLES: 32} for cosine in cosines])
    assert signal is not None and not signal.is_seen and signal.samples == 16
    assert signal.walk(-2) == 1


def test_a_trend_is_no_noise() -> None:
    signal = signal_of([{COSINE: 0.01 * step, UPDATES: 1, SAMPLES: 4} for step in range(10)])
    assert signal is not None and signal.is_seen and signal.error == pytest.approx(0.01 / math.sqrt(2 * 10))


def test_few_lines_say_nothing() -> None:
    line = {COSINE: 0.5, UPDATES: 1, SAMPLES: 4}
    assert signal_of([line, line, {"step": 3}]) is None
    assert signal_of([line, line, line]) == Signal(0.5, 0.0, 3, 4.0)


def brightness(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("algorithm", [DDPOConfig(normalisation="group", updates_per_step=2), NFTConfig()])
def test_every_step_of_a_run_tells(make_policy: Any, tmp_path: Path, algorithm: Any) -> None:
    """And the report draws it."""
    config = TrainConfig(
        run_dir=tmp_path / "run",
        steps=3,
        prompts_per_step=4,
        samples_per_prompt=2,
        sampling=SamplingConfig(num_steps=2, guidance=1.0, batch_size=4),
        algorithm=algorithm,
        evaluation=EvaluationConfig(num_samples=2),
    )
    train(config, make_policy(), brightness, ["a cat", "a dog on a chair"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line[UPDATES] for line in lines[1:]] == [getattr(algorithm, "updates_per_step", 1)] * 3
    assert all(-1 <= line[COSINE] <= 1 and line[SAMPLES] == 8 for line in lines[1:])
    assert "random walk" in write_report(tmp_path / "run").read_text()


CONFIG = TrainConfig(prompts_per_step=2, samples_per_prompt=4, algorithm=DDPOConfig(normalisation="group"))
TRAINED = {"reward/std": 1.0, "reward/mean": 0.5, "reward/invalid": 0}


@pytest.mark.parametrize(("cosine", "fallen", "alarmed"), [(0.001, -3.0, True), (0.001, -1.0, False), (0.4, -3.0, False)])
def test_a_run_that_drifts_while_scores_fall_is_told(cosine: float, fallen: float, alarmed: bool) -> None:
    watch = Watch(CONFIG)
    found = []
    for step in range(1, 9):
        line = TRAINED | {"step": step, COSINE: cosine + 0.01 * (-1) ** step, UPDATES: 2, SAMPLES: 64}
        if step == 8:
            line |= {"eval/judge_from_peak": fallen, "eval/judge_from_peak_se": 1.0}
        found += watch.see(line)
    assert [(alarm.step, alarm.kind) for alarm in found] == [(8, "drifting")] * alarmed
    assert not alarmed or ("judge falls" in found[0].message and "learning_rate" in found[0].message)


def test_of_several_scores_the_one_that_fell_most_is_named() -> None:
    line = {"eval/a_from_peak": -3.0, "eval/a_from_peak_se": 1.0, "eval/b_from_peak": -0.5, "eval/b_from_peak_se": 0.1}
    assert fallen_score(line) == "b"
    assert fallen_score({"eval/a_from_peak": None, "eval/a_from_peak_se": None, "eval/b_from_peak": 0.0}) is None
