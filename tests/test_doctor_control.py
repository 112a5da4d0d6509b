"""The doctor's control: a few steps on noise, at the run's own rate."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import own_points
import pytest
from torch import Tensor

from diffusionrl import Prompt, TrainConfig, UserError, diagnose
from diffusionrl.algorithms import make_algorithm
from diffusionrl.cli import main
from diffusionrl.config import DDPOConfig, DPOConfig, DRaFTConfig, EvaluationConfig, OptimizerConfig, SamplingConfig
from diffusionrl.doctor import Finding
from diffusionrl.doctor.control import check_control
from diffusionrl.rewards import Mixture
from diffusionrl.training.trainer import Trainer

CONFIG = TrainConfig(
    prompts_per_step=4,
    samples_per_prompt=4,
    sampling=SamplingConfig(num_steps=3, sampler="cps", eta=0.7, guidance=1.0, batch_size=32),
    algorithm=DDPOConfig(normalisation="group", clip_range=1e3),
    evaluation=EvaluationConfig(num_samples=24),
)


def height(points: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
    return points[:, 1]


def found_at(rate: float, warmup: int = 0, held_out: bool = True) -> Finding:
    config = replace(CONFIG, optimizer=OptimizerConfig(learning_rate=rate, warmup=warmup))
    judges = Mixture({"height": height}) if held_out else None
    prompts, reward = [Prompt("a", {"place": (1.0, 0.0)})], Mixture({"right": own_points.to_the_right})
    policy = own_points.make_policy(own_points.LORA, 0)
    return check_control(Trainer(policy, reward, prompts, make_algorithm(config), config, judges))


def test_a_rate_at_which_noise_moves_scores_is_told() -> None:
    """The rate as it is after the warm-up, and each score with its interval."""
    finding = found_at(0.3, warmup=1000)
    assert finding.verdict == "warn" and "learning_rate" in finding.remedy
    assert re.findall(r"(right|height) by [+-]\d+\.\d+ ± \d+\.\d+", finding.said) == ["right", "height"]
    calm = found_at(1e-5)
    assert (calm.verdict, calm.remedy) == ("pass", "") and "height by" in calm.said
    assert "height" not in found_at(1e-5, held_out=False).said, "the reward alone, where nothing is held out"


def test_a_rate_at_which_noise_breaks_the_model_fails() -> None:
    finding = found_at(1e38)
    assert finding.verdict == "fail" and "break the model" in finding.said


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"algorithm": DRaFTConfig()}, "noise has none"), ({"algorithm": DPOConfig(), "preferences": "pairs"}, "judged images")],
)
def test_what_has_no_control_is_refused_at_once(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        next(diagnose(replace(CONFIG, **settings), control=True))


def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("diffusionrl.api.diagnose", lambda config, control: asked.append(control) or ())
    assert main(["doctor"]) == 0 and main(["doctor", "--control", "--steps", "3"]) == 0
    assert asked == [False, True] and "0 failed" in capsys.readouterr().out
