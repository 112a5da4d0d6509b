"""Rewards that look at all the samples of a prompt together: whole groups, nothing but whole groups, and every one of them."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusionrl import TrainConfig, diagnose, train
from diffusionrl.cli import main
from diffusionrl.config import DDPOConfig, EvaluationConfig, GuardConfig, RWRConfig, SamplingConfig
from diffusionrl.config.rewards import RewardsConfig, ServeConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import UserError
from diffusionrl.evaluation.assessment import report, score_model
from diffusionrl.evaluation.fixed_seed import by_group, evaluate
from diffusionrl.rewards import Mixture, RewardQueue
from diffusionrl.sampling.rollout import collect
from diffusionrl.serving.server import RewardServer
from diffusionrl.training.monitor import paired

IMAGES = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CONFIG = TrainConfig(
    steps=1,
    prompts_per_step=2,
    samples_per_prompt=3,
    sampling=SamplingConfig(num_steps=2, guidance=1.0, batch_size=4),
    algorithm=DDPOConfig(updates_per_step=1, normalisation="batch", micro_batch_size=8),
    evaluation=EvaluationConfig(num_samples=4, samples_per_prompt=2, every=0),
)


class Spread:
    """How far each image's brightness is from its group's mean, and what it was called with."""

    whole_groups = True

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.images: list[Tensor] = []

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        assert len(set(prompts)) == 1 and len(images) == len(prompts) == len(metadata)
        self.sizes.append(len(images))
        self.images.append(images)
        brightness = images.mean((1, 2, 3))
        return (brightness - brightness.mean()).abs()


def shared(images: Tensor, prompts: Sequence[str], metadata: Any) -> list[float]:
    """One score for all of a group."""
    return [images.mean().item()] * len(images)


shared.whole_groups = True  # type: ignore[attr-defined]


class Brightness:
    """Of each image; remembers how many images a call had."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        self.sizes.append(len(images))
        return images.mean((1, 2, 3))


def in_groups(images: Tensor, size: int) -> Tensor:
    return torch.cat([Spread()(group, ["a"] * size, [{}] * size) for group in images.split(size)])


@given(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), st.integers(1, 24))
def test_whatever_the_chunks_every_group_is_seen_once_and_whole(size: int, chunk: int) -> None:
    spread, brightness = Spread(), Brightness()
    queue = RewardQueue(Mixture({"spread": spread, "brightness": brightness}), size)
    prompts = [f"prompt {i // size}" for i in range(24)]
    for first in range(0, 24, chunk):
        part = slice(first, first + chunk)
        queue.add(IMAGES[part], prompts[part], [{}] * len(prompts[part]))
        begun = sum(call.count for call in queue.calls)
        assert begun == min(first + chunk, 24) // size * size, "a call is made as soon as groups are whole"
    scores = queue.result(10)
    assert spread.sizes == [size] * (24 // size)
    assert torch.equal(torch.cat(spread.images), IMAGES)
    assert sum(brightness.sizes) == 24 and len(brightness.sizes) == len(queue.calls), "the others still get the whole call"
    torch.testing.assert_close(scores.parts["spread"].float(), in_groups(IMAGES, size))
    torch.testing.assert_close(scores.values.float(), in_groups(IMAGES, size) + IMAGES.mean((1, 2, 3)))


def test_without_such_a_reward_a_call_is_a_chunk() -> None:
    brightness = Brightness()
    queue = RewardQueue(Mixture({"brightness": brightness}), 6)
    for part in IMAGES.split(5):
        queue.add(part, ["a"] * len(part), [{}] * len(part))
    assert torch.equal(queue.result(10).values, IMAGES.mean((1, 2, 3)))
    assert brightness.sizes == [5, 5, 5, 5, 4]


def test_a_rollout_scores_the_groups_of_its_prompts(make_policy: Any) -> None:
    """Chunks of 4 and groups of 3 do not align; the samples are those of any other reward."""
    spread = Spread()
    prompts = [Prompt(text) for text in ("a cat", "a dog", "a cat") for _ in range(3)]  # one prompt may have two slots
    rollout = collect(make_policy(), spread, prompts, CONFIG.sampling, 0, "test", 1, group_size=3)
    plain = collect(make_policy(), Brightness(), prompts, CONFIG.sampling, 0, "test", 1)
    assert torch.equal(rollout.latents, plain.latents) and torch.equal(rollout.images, plain.images)
    assert spread.sizes == [3, 3, 3]
    torch.testing.assert_close(rollout.scores.values.float(), in_groups(rollout.images, 3))
    for size, said in [(1, "set group_size to 2 or more, not 1"), (4, "must be a multiple of group_size, 8 say, not 9")]:
        with pytest.raises(UserError, match=said):
            collect(make_policy(), spread, prompts, CONFIG.sampling, 0, "test", 1, group_size=size)


def test_a_group_that_fails_is_invalid_alone() -> None:
    def fails_on_dogs(images: Tensor, prompts: Sequence[str], metadata: Any) -> Any:
        if prompts[0] == "a dog":
            raise OSError("no dogs")
        return [1.0] * (len(images) - (prompts[0] == "an owl"))

    fails_on_dogs.whole_groups = True  # type: ignore[attr-defined]
    mixture = Mixture({"dogs": fails_on_dogs, "brightness": Brightness()})
    texts = [text for text in ("a cat", "a dog", "an owl", "a fox") for _ in range(2)]
    scores = mixture.score(IMAGES[:8], texts, [{}] * 8, 2)
    assert scores.valid.tolist() == [True, True, False, False, False, False, True, True]
    assert scores.error is not None and "a reward returns one number a sample, here 2" in scores.error
    assert scores.parts["brightness"].isfinite().all()


# Runs


def test_a_run_trains_evaluates_and_tries_with_groups_of_its_own_sizes(make_policy: Any, tmp_path: Path) -> None:
    spread = Spread()
    train(replace(CONFIG, run_dir=tmp_path / "run"), policy=make_policy(), reward=spread, prompts=["a cat", "a dog"])
    assert spread.sizes == [3, 2, 2, 2, 3, 3, 2, 2], "tried with both, evaluated, trained, evaluated"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    groups = in_groups(torch.cat(spread.images[2:4]), 2).view(2, 2).mean(1)
    assert lines[0]["eval/reward"] == pytest.approx(groups.mean().item())
    assert lines[0]["eval/reward_se"] == pytest.approx((groups.std() / math.sqrt(2)).item()), "over groups, not samples"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples_per_prompt": 1}, r"set samples_per_prompt to 2 or more, not 1"),
        ({"evaluation": EvaluationConfig(num_samples=4)}, r"set evaluation\.samples_per_prompt to 2 or more, not 1"),
        (
            {"evaluation": EvaluationConfig(num_samples=7, samples_per_prompt=3)},
            r"evaluation\.num_samples must be a multiple of evaluation\.samples_per_prompt, 6 say, not 7",
        ),
    ],
)
def test_groups_that_there_are_not(make_policy: Any, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"looks at all the samples of a prompt together: {said}"):
        train(replace(CONFIG, run_dir=tmp_path / "run", **changes), policy=make_policy(), reward=shared, prompts=["a cat"])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_held_out_groups_are_those_of_the_evaluation(make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training needs none for them; the guard needs enough."""
    (tmp_path / "grouping.py").write_text(
        "sizes = []\n"
        "def alike(images, prompts, metadata):\n"
        "    sizes.append(len(images))\n"
        "    return [float(images.mean())] * len(images)\n"
        "alike.whole_groups = True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    evaluation = replace(CONFIG.evaluation, held_out=("grouping:alike",))
    config = replace(CONFIG, samples_per_prompt=1, run_dir=tmp_path / "run", evaluation=evaluation)
    train(config, policy=make_policy(), reward=Brightness(), prompts=["a cat", "a dog"])
    import grouping  # type: ignore[import-not-found]

    assert set(grouping.sizes) == {2}
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["eval/grouping:alike"] > 0
    enough = replace(evaluation, num_samples=18, every=1)
    stopping = replace(config, run_dir=tmp_path / "other", evaluation=enough, guard=GuardConfig(stop=True))
    with pytest.raises(UserError, match=r"10 groups of evaluation\.samples_per_prompt, 20"):
        train(stopping, policy=make_policy(), reward=Brightness(), prompts=["a cat", "a dog"])


def test_groups_count_once_in_a_difference() -> None:
    """Twelve groups of four, whose samples share a score: the standard error is that of twelve numbers."""
    gaps = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    now = gaps.repeat_interleave(4)
    mean, error = paired(now, torch.zeros(48), 4)
    assert mean == pytest.approx(gaps.mean().item()) and error == pytest.approx((gaps.std() / math.sqrt(12)).item())
    assert math.isnan(paired(now[:36], torch.zeros(36), 4)[0]), "nine groups are fewer than ten pairs"
    holes = torch.tensor([1.0, math.nan, math.nan, math.nan])
    assert by_group(holes, 2)[0] == 1 and by_group(holes, 2)[1].isnan()


def test_a_model_is_assessed_by_its_groups(make_policy: Any) -> None:
    prompts, mixture = [Prompt("a cat"), Prompt("a dog"), Prompt("an owl")], Mixture({"shared": shared, "own": Brightness()})
    sampling = SamplingConfig(num_steps=2)
    sheet = score_model("m", make_policy(), mixture, prompts, 4, sampling, 0)
    assert sheet.prompts == [prompt.text for prompt in prompts for _ in range(4)]
    assert all(len(set(sheet.scores["shared"][i : i + 4])) == 1 for i in (0, 4, 8))
    found = report(sheet, sheet)["rewards"]
    assert (found["shared"]["model"]["units"], found["shared"]["model"]["unit"]) == (3, "groups")
    assert (found["shared"]["win_rate"]["units"], found["own"]["win_rate"]["units"]) == (3, 12)
    assert found["shared"]["model"]["value"] == pytest.approx(found["own"]["model"]["value"])
    run = evaluate(make_policy(), mixture, prompts, 12, sampling, 0, samples_per_prompt=4)
    assert run.rollout.scores.parts["shared"].tolist() == sheet.scores["shared"], "as a run with such groups evaluates itself"


def test_bad_input_on_the_command_line(tiny_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / "grouped_reward.py").write_text("def alike(images, prompts, metadata):\n    return [1.0] * len(images)\n")
    with (tmp_path / "grouped_reward.py").open("a") as file:
        file.write("alike.whole_groups = True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for command, said in [
        (
            ["evaluate"],
            "grouped_reward:alike looks at all the samples of a prompt together: set samples_per_prompt to 2 or more",
        ),
        (["train", "--run-dir", "run"], "set evaluation.samples_per_prompt to 2 or more"),
        (["serve-reward", "grouped_reward:alike"], "a request may hold a part of them: name it in the run itself (--reward"),
    ]:
        options = [] if command[0] == "serve-reward" else ["--reward", "grouped_reward:alike", "--model", str(tiny_folder)]
        assert main([*command, *options]) == 2
        heard = " ".join(capsys.readouterr().err.split())
        assert said in heard and "Traceback" not in heard


def test_such_a_reward_is_not_served() -> None:
    with pytest.raises(UserError, match="tested looks at all the samples of a prompt together"):
        RewardServer(shared, ServeConfig("tested", port=0))


# The doctor


@pytest.mark.parametrize(
    ("reward", "algorithm", "verdict"),
    [
        (Spread, {}, "pass"),
        (lambda: shared, {}, "pass"),
        (lambda: shared, {"normalisation": "prompt"}, "pass"),
        (lambda: shared, {"normalisation": "group"}, "warn"),
    ],
)
def test_the_doctor_looks_at_whole_groups(
    make_policy: Callable[..., Any], reward: Callable[[], Any], algorithm: dict[str, Any], verdict: str
) -> None:
    config = replace(CONFIG, samples_per_prompt=5, algorithm=replace(CONFIG.algorithm, **algorithm))
    asked = reward()
    found = {}
    for finding in diagnose(config, make_policy(), asked, ["a cat", "a dog"]):
        found[finding.check] = finding
        if finding.check == "variation":
            break
    assert found["scores"].verdict == found["repeatable"].verdict == "pass", found
    assert found["variation"].verdict == verdict, found
    assert "needs algorithm.normalisation batch" in found["variation"].remedy or verdict == "pass"
    if isinstance(asked, Spread):
        assert asked.sizes == [5, 2] + [5, 5] * 2


def test_the_doctor_does_not_call_equal_groups_a_constant_reward(make_policy: Any) -> None:
    def alike(images: Tensor, prompts: Sequence[str], metadata: Any) -> list[float]:
        return [0.5] * len(images)

    alike.whole_groups = True  # type: ignore[attr-defined]
    config = replace(CONFIG, algorithm=RWRConfig(updates_per_step=1, batch_size=4), rewards=RewardsConfig())
    finding = next(each for each in diagnose(config, make_policy(), alike, ["a cat"]) if each.check == "variation")
    assert finding.verdict == "warn" and "larger groups" in finding.remedy
