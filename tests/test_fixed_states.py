"""Distance from the reference at states that stay the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import own_points
import pytest
import torch
from torch import Tensor

from diffusionrl import Prompt, TrainConfig, train
from diffusionrl.config import EvaluationConfig, NFTConfig, OptimizerConfig, PolicyConfig, SamplingConfig
from diffusionrl.evaluation.fixed_states import STATES, TRAJECTORIES, fix_states
from diffusionrl.runs.lines import read_metrics

PROMPTS = [Prompt(name, {"place": place}) for name, place in (("a", (1.0, 0.0)), ("b", (0.0, 1.0)), ("c", (0.0, 0.0)))]
ODE = SamplingConfig(num_steps=5, sampler="ode", eta=0.0, guidance=1.0, batch_size=4)
CPS = replace(ODE, sampler="cps", eta=0.7)


def shift(policy: Any, by: float) -> None:
    """The weights of its adapter."""
    for index, weight in enumerate(policy.trainable().values()):
        weight.data += by * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))


def test_states_are_the_references_and_every_step_has_as_many() -> None:
    """However far the policy has moved, and whatever samples; the policy as it began is no distance from the reference."""
    policy = own_points.make_policy(own_points.LORA, 0)
    states = fix_states(policy, PROMPTS, ODE, 3)
    assert states.distance(policy) == {"reference_kl": 0.0, "reference_distance": 0.0}
    counts = torch.bincount(states.rows)
    assert counts.tolist() == [len(PROMPTS)] * ODE.num_steps
    assert len(torch.unique(states.x, dim=0)) == len(PROMPTS) * ODE.num_steps
    many = fix_states(policy, [PROMPTS[i % len(PROMPTS)] for i in range(TRAJECTORIES)], ODE, 3)
    counts = torch.bincount(many.rows)
    assert len(many.rows) == STATES and len(counts) == ODE.num_steps and counts.max() - counts.min() <= 1
    assert len(torch.unique(many.x, dim=0)) == STATES
    shift(policy, 0.3)
    again = fix_states(policy, PROMPTS, CPS, 3)
    assert torch.equal(again.x, states.x) and torch.equal(again.said, states.said)
    assert not torch.equal(fix_states(policy, PROMPTS, ODE, 4).x, states.x)


def test_the_distance_is_that_of_the_predictions() -> None:
    policy = own_points.make_policy(own_points.LORA, 0)
    states = fix_states(policy, PROMPTS, CPS, 0)
    shift(policy, 0.3)
    found = states.distance(policy)
    levels, gaps, sizes = states.table.grid.levels, [], []
    for i in range(len(states.rows)):  # one by one
        at: Any = (states.x[i : i + 1], levels[states.rows[i : i + 1]], [states.prompts[i]], 1.0)
        with torch.no_grad():
            own = policy.denoise(*at)
            with policy.reference():
                other = policy.denoise(*at)
        gaps.append(sum((a - b).square().sum().item() for a, b in zip(own, other, strict=True)))
        sizes.append(sum(each.square().sum().item() for each in other))
    assert found["reference_kl"] == pytest.approx(sum(gaps) / len(gaps) / 2, rel=1e-4)
    relative = sum((gap / size) ** 0.5 for gap, size in zip(gaps, sizes, strict=True)) / len(gaps)
    assert found["reference_distance"] == pytest.approx(relative, rel=1e-4)
    first = states.rows == 0
    assert states.table.grid.alpha[0] < 1e-3, "all is noise there, whatever the network says: the difference is in x0"
    noise, x0 = states.said[first, 2:], states.said[first, :2]
    assert torch.allclose(noise, states.x[first], atol=1e-3) and x0.std() > 1e-3


def tall(points: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return points[:, 1]


def test_a_run_measures_it_and_goes_on_exactly(tmp_path: Path) -> None:
    """On an ODE too, and in two parts as in one."""
    config = TrainConfig(
        steps=4,
        prompts_per_step=2,
        samples_per_prompt=4,
        sampling=ODE,
        algorithm=NFTConfig(noisings=2),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        evaluation=EvaluationConfig(every=2, num_samples=4),
        run_dir=tmp_path / "whole",
    )

    def run(config: TrainConfig) -> list[dict[str, Any]]:
        train(config, own_points.make_policy(own_points.LORA, 0), tall, PROMPTS)
        assert config.run_dir is not None
        lines = [line for line in read_metrics(config.run_dir) if "eval/reward" in line]
        return [{key: line[key] for key in line if key.startswith("eval/reference")} for line in lines]

    whole = run(config)
    assert [set(line) for line in whole] == [{"eval/reference_kl", "eval/reference_distance"}] * 3
    kls = [line["eval/reference_kl"] for line in whole]
    assert kls[0] == 0 < kls[1] < kls[2]
    halves = replace(config, run_dir=tmp_path / "halves")
    run(replace(halves, steps=2))
    assert run(halves) == whole
    assert "reference_kl" in (tmp_path / "halves" / "report.html").read_text()


def test_full_fine_tuning_has_no_reference(tmp_path: Path) -> None:
    few = EvaluationConfig(num_samples=2)
    config = TrainConfig(steps=1, prompts_per_step=4, sampling=CPS, evaluation=few, run_dir=tmp_path / "run")
    train(config, own_points.make_policy(PolicyConfig(training="full"), 0), tall, PROMPTS)
    assert not any("reference" in key for line in read_metrics(tmp_path / "run") for key in line)
