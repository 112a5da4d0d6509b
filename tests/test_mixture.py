"""Several rewards as one: the weighted sum, its normalisation, and whose failure is whose."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusionrl import train
from diffusionrl.config import DDPOConfig, EvaluationConfig, SamplingConfig, TrainConfig
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.errors import UserError
from diffusionrl.rewards import Mixture, load_mixture, try_mixture

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NAMES, NOTHING = [str(i) for i in range(6)], [{}] * 6


def red(images: Any, prompts: Any, metadata: Any) -> Any:
    return images[:, 0].mean((1, 2))


def blue(images: Any, prompts: Any, metadata: Any) -> Any:
    return 100 * images[:, 2].mean((1, 2))


def blind_to_three(images: Any, prompts: Any, metadata: Any) -> list[float | None]:
    return [None if prompt == "3" else 1.0 for prompt in prompts]


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_the_sum_is_weighted_and_the_parts_stay_as_they_came(a: float, b: float) -> None:
    scores = Mixture({"red": red, "blue": blue}, {"red": a, "blue": b}).score(IMAGES, NAMES, NOTHING)
    expected = a * red(IMAGES, 0, 0) + b * blue(IMAGES, 0, 0)
    torch.testing.assert_close(scores.values.float(), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(scores.parts["blue"].float(), blue(IMAGES, 0, 0))


def test_a_sample_needs_every_reward_and_the_error_names_the_one_that_failed() -> None:
    scores = Mixture({"red": red, "blind": blind_to_three}).score(IMAGES, NAMES, NOTHING)
    assert scores.valid.tolist() == [True, True, True, False, True, True]
    assert scores.error == "blind: it returned nan for '3'"
    assert scores.parts["red"].isfinite().all() and scores.parts["blind"].isnan().tolist() == [False] * 3 + [True, False, False]


def test_normalised_rewards_have_mean_0_and_deviation_1_where_they_were_calibrated() -> None:
    mixture = Mixture({"red": red, "blue": blue}, {"blue": 2.0})
    calibrated = mixture.calibrate(mixture.score(IMAGES, NAMES, NOTHING))
    parts = [(part - part.mean()) / part.std(correction=0) for part in calibrated.parts.values()]
    torch.testing.assert_close(calibrated.values, parts[0] + 2 * parts[1], atol=1e-4, rtol=1e-4)
    brighter = mixture.score(IMAGES + 0.1, NAMES, NOTHING)  # the statistics stay those of the calibration
    gain = 0.1 / red(IMAGES, 0, 0).std(correction=0) + 2 * 10 / blue(IMAGES, 0, 0).std(correction=0)
    torch.testing.assert_close(brighter.values, calibrated.values + gain, atol=1e-3, rtol=1e-4)


def test_a_constant_reward_cannot_be_normalised() -> None:
    mixture = Mixture({"red": red, "one": lambda images, prompts, metadata: [1.0] * len(images)})
    with pytest.raises(UserError, match="the reward one gave all 6 samples the same score"):
        mixture.calibrate(mixture.score(IMAGES, NAMES, NOTHING))


def test_names_with_weights() -> None:
    mixture = load_mixture(["compressibility=0.5", "emoji-gold"])
    assert mixture.weights == {"compressibility": 0.5, "emoji-gold": 1.0}
    for names, said in [
        (["compressibility=much"], "the weight 'much' is not a finite number"),
        (["compressibility=nan"], "the weight 'nan' is not a finite number"),
        (["compressibility=-inf"], "the weight '-inf' is not a finite number"),
        (["emoji-gold", "emoji-gold=2"], "named twice"),
        (["emoji-gild=2"], "unknown reward 'emoji-gild'"),
        ([], "there is no reward"),
    ]:
        with pytest.raises(UserError, match=said):
            load_mixture(names)


def test_a_weight_is_a_finite_number_of_a_reward_that_is_there() -> None:
    assert Mixture({"red": red, "blue": blue}, {"blue": 2}).weights == {"red": 1.0, "blue": 2.0}
    for weights, said in [
        ({"bleu": 0.5}, "unknown reward 'bleu'; did you mean 'blue'"),
        ({"red": float("nan")}, "weight nan is not"),
    ]:
        with pytest.raises(UserError, match=said):
            Mixture({"red": red, "blue": blue}, weights)


def test_the_reward_that_cannot_work_is_named() -> None:
    def broken(images: Any, prompts: Any, metadata: Any) -> Any:
        raise OSError("no disk")

    with pytest.raises(UserError, match=r"^broken: .*OSError: no disk"):
        try_mixture(Mixture({"red": red, "broken": broken}), (3, 8, 8), ["a"], [{}])


def test_a_run_logs_every_reward_and_the_held_out_ones(make_policy: Any, tmp_path: Path) -> None:
    config = TrainConfig(
        steps=1,
        prompts_per_step=4,
        run_dir=tmp_path / "run",
        sampling=SamplingConfig(num_steps=2, guidance=1.0, batch_size=4),
        algorithm=DDPOConfig(updates_per_step=1),
        evaluation=EvaluationConfig(num_samples=4, held_out=("emoji-gold",)),
        rewards=RewardsConfig(normalise=True),
    )
    mixture = Mixture({"red": red, "blue": blue}, {"blue": 2.0})
    train(config, policy=make_policy(), reward=mixture, prompts=["a cat"])
    first, last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert first["eval/reward"] == pytest.approx(0, abs=1e-5)  # normalised by this very evaluation
    assert 0 < first["eval/red"] < 1 < first["eval/blue"] and first["eval/emoji-gold"] >= 1
    assert {"reward/red", "reward/blue", "eval/emoji-gold"} <= set(last)
    sample = json.loads((tmp_path / "run" / "samples" / "step_000001" / "samples.jsonl").read_text().splitlines()[0])
    assert {"red", "blue", "emoji-gold", "reward"} <= set(sample)
    assert "red=1" in (tmp_path / "run" / "config.yaml").read_text()
