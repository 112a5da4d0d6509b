"""Options of the trainer that belong to no paper's objective: queries, groups drawn anew, advantages by reward, kept scores."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from own_points import make_painter
from torch import Tensor

from diffusionrl.algorithms import EPG
from diffusionrl.algorithms.advantages import Advantages, group_advantages
from diffusionrl.api import train
from diffusionrl.config import (
    DDPOConfig,
    EPGConfig,
    EvaluationConfig,
    NFTConfig,
    OptimizerConfig,
    RewardsConfig,
    SamplingConfig,
    TrainConfig,
)
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import UserError
from diffusionrl.interruption import Interrupted
from diffusionrl.rewards import Mixture, Scores, load_mixture
from diffusionrl.rewards.noise import noise
from diffusionrl.runs.alarms import Watch
from diffusionrl.runs.checkpoint import complete_steps, load_newest
from diffusionrl.runs.folder import read_metrics
from diffusionrl.sampling.rollout import Rollout
from diffusionrl.training.optimization import scheduled
from diffusionrl.training.trainer import Trainer

SAMPLING = SamplingConfig(num_steps=2, guidance=1.0, sampler="ode", eta=0.0, batch_size=4)


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, object]]) -> Tensor:
    return images.mean((1, 2, 3))


def only_dogs_differ(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, object]]) -> Tensor:
    dogs = torch.tensor([prompt == "a dog" for prompt in prompts])
    return torch.where(dogs, images.mean((1, 2, 3)), 1.0)


def small(run_dir: Path, **more: Any) -> TrainConfig:
    settings: dict[str, Any] = {"steps": 2, "prompts_per_step": 4, "samples_per_prompt": 2, "run_dir": run_dir}
    settings |= {
        "sampling": SAMPLING,
        "algorithm": EPGConfig(noisings=1),
        "evaluation": EvaluationConfig(every=0, num_samples=2),
    }
    return TrainConfig(**settings | more)


# Queries


def test_a_run_ends_before_it_would_score_more_than_it_may(tmp_path: Path) -> None:
    config = small(tmp_path / "run", steps=9, max_queries=23)
    train(config, policy=make_painter(), reward=brightness, prompts=["a cat"])
    lines = read_metrics(tmp_path / "run")
    assert [line["queries"] for line in lines] == [0, 8, 16] and "eval/reward" in lines[-1]
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["steps"] == 2
    train(replace(config, max_queries=24), policy=make_painter(), reward=brightness, prompts=["a cat"])
    assert [line["queries"] for line in read_metrics(tmp_path / "run")] == [0, 8, 16, 24]
    with pytest.raises(UserError, match="max_queries is 7, and a step takes 8"):
        small(tmp_path, max_queries=7)


# The learning rate


@pytest.mark.parametrize(("schedule", "middle", "end"), [("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("constant", 1.0, 1.0)])
def test_a_schedule_falls_to_its_end(schedule: Any, middle: float, end: float) -> None:
    optimizer = OptimizerConfig(learning_rate=1.0, schedule=schedule, schedule_end=0.1, warmup=4)
    rates = [scheduled(optimizer, step / 8, 4 + step) for step in range(9)]
    assert rates == sorted(rates, reverse=True)
    assert [rates[0], rates[4], rates[8]] == pytest.approx([1.0, middle, end])
    assert schedule != "cosine" or rates[1] > 0.96, "half a cosine begins flat"
    assert scheduled(optimizer, 0, 1) == 0.25, "the warm-up comes on top"


def test_a_run_with_a_schedule_goes_on_exactly_and_keeps_its_length(tmp_path: Path) -> None:
    optimizer, calls = OptimizerConfig(schedule="linear"), []

    def killing(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 7:  # the trial, the evaluation, two batches of each step: in the third
            os.kill(os.getpid(), signal.SIGTERM)
        return brightness(images, prompts, metadata)

    rates, final = {}, []
    for name in ("whole", "halves"):
        config = small(tmp_path / name, steps=3, optimizer=optimizer)
        given = {"prompts": ["a cat", "a dog"]}
        if name == "halves":
            with pytest.raises(Interrupted):
                train(config, policy=make_painter(), reward=killing, **given)
            assert complete_steps(tmp_path / name) in ([1], [2])
            with pytest.raises(UserError, match="these change its result: steps"):
                train(replace(config, steps=4), policy=make_painter(), reward=killing, **given)
        else:
            calls += 100 * [1]
        train(config, policy=make_painter(), reward=killing, **given)
        calls.clear()
        final.append(load_newest(tmp_path / name, True))
        rates[name] = [line["step"] for line in read_metrics(tmp_path / name)]
    whole, halves = final
    assert rates["whole"] == rates["halves"] == [0, 1, 2, 3]
    assert whole is not None and halves is not None
    for key, weight in whole.tensors["policy"].items():
        assert torch.equal(weight, halves.tensors["policy"][key])


# Groups drawn anew


def test_groups_that_score_alike_give_way_to_other_prompts_and_are_counted(tmp_path: Path) -> None:
    prompts, counts = [Prompt("a cat"), Prompt("a dog")], {}
    for budget in (0, 2, 40):
        config = small(tmp_path / str(budget), redraw_queries=budget)
        algorithm_seen: list[Rollout] = []
        trainer = Trainer(make_painter(), only_dogs_differ, prompts, Recorded(algorithm_seen), config)
        metrics = trainer.step(1)
        counts[budget] = [prompt.text for prompt in algorithm_seen[0].prompts].count("a cat")
        redrawn = trainer.tasks[0].redrawn
        assert metrics["queries"] == 8 + redrawn and redrawn <= budget
        assert metrics.get("advantage/redrawn", 0) == redrawn
        rollout = algorithm_seen[0]
        images = trainer.policy.decode(rollout.latents[:, -1], rollout.prompts)
        torch.testing.assert_close(rollout.images, images, rtol=1e-4, atol=1e-4)  # all of a sample came along
        expected = only_dogs_differ(images, [prompt.text for prompt in rollout.prompts], [])
        torch.testing.assert_close(rollout.scores.values, expected.double(), rtol=1e-4, atol=1e-4)
        groups = [rollout.prompts[i].text for i in range(0, 8, 2)]
        assert groups == [rollout.prompts[i].text for i in range(1, 8, 2)]
    assert counts[0] > counts[2] >= counts[40] == 0


class Recorded:
    """An algorithm that keeps what it is given."""

    def __init__(self, seen: list[Rollout]) -> None:
        self.inner, self.seen = EPG(EPGConfig(noisings=1), 1.0), seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def advantages(self, rollout: Rollout) -> Tensor:
        self.seen.append(rollout)
        return self.inner.advantages(rollout)


def test_a_run_that_draws_anew_goes_on_exactly(tmp_path: Path) -> None:
    final = []
    for name, halves in (("whole", (3,)), ("halves", (1, 3))):
        for steps in halves:
            config = small(tmp_path / name, steps=steps, redraw_queries=4)
            train(config, policy=make_painter(), reward=only_dogs_differ, prompts=["a cat", "a dog"])
        final.append(load_newest(tmp_path / name, True))
    whole, halves = final
    assert whole is not None and halves is not None
    for key, weight in whole.tensors["policy"].items():
        assert torch.equal(weight, halves.tensors["policy"][key])
    assert whole.state["tasks"][""]["redrawn"] == halves.state["tasks"][""]["redrawn"] > 0


def test_drawing_anew_needs_groups(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set samples_per_prompt above 1"):
        small(tmp_path, redraw_queries=4, samples_per_prompt=1, algorithm=DDPOConfig(updates_per_step=1))


# Advantages of several rewards


def scored(parts: dict[str, list[float]], weights: dict[str, float], prompts: Sequence[str]) -> Rollout:
    mixture = Mixture(dict.fromkeys(parts, brightness), weights)
    scores = mixture._combine({name: torch.tensor(values) for name, values in parts.items()}, None)
    nothing = torch.zeros(0)
    asked = [Prompt(text) for text in prompts]
    return Rollout(None, asked, nothing, nothing, nothing, scores, {}, reward_weights=mixture.weights)  # type: ignore[arg-type]


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4), st.floats(0.1, 1e4), st.floats(0.1, 3))
def test_a_rewards_scale_says_nothing_where_advantages_are_added_up(noise: list[float], scale: float, weight: float) -> None:
    """And a mixture of one kind of advantage is that of the formula: the sum of each, scaled to a deviation of 1."""
    first = [1.0, 2.0, 4.0, 3.0]
    second = [value + 2 * i for i, value in enumerate(noise)]
    settings = NFTConfig(combine="advantages", normalisation="group")
    prompts = ["a"] * 4
    found = Advantages(settings).of(scored({"a": first, "b": second}, {"b": weight}, prompts))
    larger = Advantages(settings).of(scored({"a": first, "b": [scale * value for value in second]}, {"b": weight}, prompts))
    torch.testing.assert_close(found, larger, rtol=1e-3, atol=1e-3)
    each = [
        group_advantages(Scores(torch.tensor(values), torch.ones(4, dtype=torch.bool)), prompts) for values in (first, second)
    ]
    total = each[0] + weight * each[1]
    torch.testing.assert_close(found, total / total.std(correction=0), rtol=1e-3, atol=1e-3)


def test_a_sample_that_one_reward_cannot_score_has_no_advantage() -> None:
    nan = float("nan")
    rollout = scored({"a": [1.0, 2.0, 3.0], "b": [5.0, nan, 4.0]}, {}, ["x"] * 3)
    found = Advantages(NFTConfig(combine="advantages", normalisation="batch")).of(rollout)
    assert found[1] == 0 and found.isfinite().all()
    with pytest.raises(UserError, match="compares within the step"):
        DDPOConfig(combine="advantages")


# Scores that are kept

COSTLY = """
calls = []


def bright(images, prompts, metadata):
    calls.append(len(images))
    return [float("nan") if image.mean() > 0.9 else image.mean() for image in images]
"""


@pytest.fixture
def costly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "costly", raising=False)
    (tmp_path / "costly.py").write_text(COSTLY)
    yield lambda **more: load_mixture(["costly:bright"], RewardsConfig(cache=tmp_path / "scores.sqlite", **more))
    sys.modules.pop("costly", None)


def test_a_reward_is_asked_once_about_a_sample(costly: Any) -> None:
    mixture, images = costly(), torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.8
    first = mixture.score(images[:3], ["a"] * 3, [{}] * 3)
    again = mixture.score(images, ["a"] * 4, [{}] * 4)
    assert torch.equal(first.values, again.values[:3]) and again.valid.all()
    assert mixture.counts() == {"costly:bright/asked": 4, "costly:bright/cached": 3}
    import costly as module  # type: ignore[import-not-found]

    assert module.calls == [3, 1]
    for prompts, metadata in ((["b"], [{}]), (["a"], [{"x": 1}])):  # another prompt, other metadata: another question
        mixture.score(images[:1], prompts, metadata)
    assert module.calls == [3, 1, 1, 1]
    assert costly().score(images, ["a"] * 4, [{}] * 4).valid.all() and module.calls == [3, 1, 1, 1]  # another run
    costly(frames=3).score(images[:1], ["a"], [{}])  # other settings
    assert module.calls == [3, 1, 1, 1, 1]


def test_what_is_not_valid_is_not_kept_and_code_that_changed_is_asked_again(costly: Any, tmp_path: Path) -> None:
    mixture, white = costly(), torch.ones(1, 3, 8, 8)
    for _ in range(2):
        assert not mixture.score(white, ["a"], [{}]).valid.any()
    assert mixture.counts()["costly:bright/asked"] == 2
    grey = torch.full((1, 3, 8, 8), 0.5)
    assert mixture.score(grey, ["a"], [{}]).values.item() == pytest.approx(0.5)
    sys.modules.pop("costly")
    (tmp_path / "costly.py").write_text(COSTLY.replace("else image.mean()", "else 2 * image.mean()"))
    assert costly().score(grey, ["a"], [{}]).values.item() == pytest.approx(1.0)


# Controls and alarms


def test_the_reward_of_noise_is_uniform_repeats_itself_and_knows_no_image() -> None:
    images = torch.rand(400, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = noise(images, [""] * 400, [{}] * 400)
    assert torch.equal(found, noise(images, [""] * 400, [{}] * 400))
    assert found.min() >= 0 and found.max() < 1
    assert abs(found.mean().item() - 0.5) < 4 * 12**-0.5 / 20
    assert abs(torch.corrcoef(torch.stack([found, images.mean((1, 2, 3))]))[0, 1].item()) < 4 / 20


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"policy/decay_of_older": 0.5, "policy/distance_from_older": 0.0}, "copy-older"),
        ({"eval/prediction_norm": 1.2}, "longer-predictions"),
        ({"eval/prediction_distance": 0.0}, "policy-still"),
        ({"policy/decay_of_older": 0.0, "policy/distance_from_older": 0.0, "eval/prediction_norm": 1.1}, None),
    ],
)
def test_alarms(changes: dict[str, float], kind: str | None, tmp_path: Path) -> None:
    watch, raised = Watch(small(tmp_path)), []
    for step in range(2, 6):
        raised += watch.see({"step": step, "reward/mean": 1.0, "reward/std": 1.0, "reward/invalid": 0, **changes})
    assert [alarm.kind for alarm in raised] == ([kind] if kind else [])


def test_a_run_stopped_in_a_step_goes_on_with_the_copies_as_the_step_began(tmp_path: Path) -> None:
    final = []
    for name, stop_at in (("whole", 0), ("stopped", 6)):
        calls = 0

        def bright(images: Tensor, prompts: Any, metadata: Any, stop_at: int = stop_at) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == stop_at:  # in the second step: a trial, an evaluation, and two calls a step before
                os.kill(os.getpid(), signal.SIGTERM)
            return images.mean((1, 2, 3))

        config = small(tmp_path / name, steps=3, algorithm=NFTConfig(noisings=1))
        if stop_at:
            with pytest.raises(Interrupted):
                train(config, policy=make_painter(), reward=bright, prompts=["a cat"])
        train(config, policy=make_painter(), reward=bright, prompts=["a cat"])
        final.append(load_newest(tmp_path / name, True))
    whole, stopped = final
    assert whole is not None and stopped is not None and "copies" in whole.tensors
    for kind, tensors in whole.tensors.items():
        assert all(torch.equal(tensor, stopped.tensors[kind][key]) for key, tensor in tensors.items())
