"""DiffusionRL's promises: a few denoising steps, the same for all samples, one optimizer step each over the whole batch."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusionrl import UserError, train
from diffusionrl.algorithms import DDPO, DiffusionRL, make_algorithm
from diffusionrl.cli import parse_train
from diffusionrl.config import DDPOConfig, DiffusionRLConfig, EvaluationConfig, OptimizerConfig, SamplingConfig, TrainConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.rewards import Scores
from diffusionrl.sampling.rollout import Rollout, collect
from diffusionrl.training.optimization import accumulate_gradient
from diffusionrl.training.trainer import Trainer

SAMPLING = SamplingConfig(num_steps=6, guidance=3.0, batch_size=6)
SETTINGS = DiffusionRLConfig(timesteps_per_step=3)


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, object]]) -> Tensor:
    return images.mean((1, 2, 3))


def rollout_of(policy: Any) -> Rollout:
    prompts = [Prompt(text) for text in ("a cat", "a dog", "an ant")] * 2
    return collect(policy, brightness, prompts, SAMPLING, 0, "test", 1)


def with_scores(rollout: Rollout, values: list[float], valid: list[bool] | None = None) -> Rollout:
    return replace(rollout, scores=Scores(torch.tensor(values), torch.tensor(valid or [True] * len(values))))


def test_each_update_is_one_denoising_step_of_all_valid_samples(make_policy: Any) -> None:
    rollout = with_scores(rollout_of(make_policy()), [1.0, 2, 3, 4, 5, math.nan], [True] * 5 + [False])
    algorithm = DiffusionRL(SETTINGS, 3.0)
    updates = list(algorithm.updates(rollout, torch.ones(6), 0, 1))
    assert len(updates) == 3
    for rows in updates:
        assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]
        assert len(rows[:, 1].unique()) == 1
    assert len({int(rows[0, 1]) for rows in updates}) == 3, "without replacement"
    again = list(algorithm.updates(rollout, torch.ones(6), 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(updates, again, strict=True))
    drawn = [tuple(int(rows[0, 1]) for rows in algorithm.updates(rollout, torch.ones(6), 0, step)) for step in range(200)]
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=6)
    assert (counts > 60).all(), "each step is drawn half of the time"


def test_steps_without_noise_are_never_drawn_and_too_many_are_refused(make_policy: Any) -> None:
    rollout = rollout_of(make_policy({"steps_offset": 0, "set_alpha_to_one": True}))
    assert rollout.table.fresh[-1] == 0
    rows = torch.cat(list(DiffusionRL(DiffusionRLConfig(), 3.0).updates(rollout, torch.ones(6), 0, 1)))
    assert sorted(rows[:, 1].unique().tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="timesteps_per_step is 6, but only 5 steps"):
        next(DiffusionRL(DiffusionRLConfig(timesteps_per_step=6), 3.0).updates(rollout, torch.ones(6), 0, 1))


def test_too_many_steps_are_found_before_anything_slow(make_policy: Any, tmp_path: Any) -> None:
    config = TrainConfig(sampling=SAMPLING, algorithm=DiffusionRLConfig(timesteps_per_step=7), run_dir=tmp_path / "run")
    with pytest.raises(UserError, match=r"timesteps_per_step is 7, but only 6 steps .* raise sampling.num_steps"):
        train(config, policy=make_policy(), reward=brightness, prompts=["a cat"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_ratio_is_exactly_one_where_cut_alike(make_policy: Any, targets: str) -> None:
    policy = make_policy(lora_targets=targets)
    rollout, algorithm = rollout_of(policy), DiffusionRL(SETTINGS, 3.0)
    for rows in algorithm.updates(rollout, torch.ones(6), 0, 1):
        _, figures = algorithm.losses(policy, rollout, rows, torch.ones(len(rows)))
        assert figures["ratio_gap"].max() == 0


@pytest.mark.parametrize("size", [1, 4, 6])
def test_cutting_the_batch_changes_no_gradient(make_policy: Any, size: int) -> None:
    policy = make_policy(lora_targets="all")
    rollout = rollout_of(policy)

    def gradient(micro_batch_size: int) -> Tensor:
        algorithm = DiffusionRL(replace(SETTINGS, micro_batch_size=micro_batch_size), 3.0)
        rows = next(algorithm.updates(rollout, torch.ones(6), 0, 1))
        for weight in policy.trainable().values():
            weight.grad = None
        accumulate_gradient(algorithm, policy, rollout, rows, torch.linspace(-1, 1, 6))
        return torch.cat([weight.grad.flatten() for weight in policy.trainable().values() if weight.grad is not None])

    whole = gradient(32)
    assert whole.abs().max() > 0
    assert (gradient(size) - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_the_loss_of_a_pair_is_ddpos(make_policy: Any) -> None:
    policy = make_policy()
    rollout, advantages = rollout_of(policy), torch.linspace(-1, 1, 6)
    settings = {"clip_range": 1e-3, "step_weight_power": 2.0}
    algorithm = DiffusionRL(DiffusionRLConfig(**settings), 3.0)  # type: ignore[arg-type]
    rows = next(algorithm.updates(rollout, advantages, 0, 1))
    weights = algorithm.weights(policy, rollout, rows, advantages)
    found, _ = algorithm.losses(policy, rollout, rows, weights)
    expected, _ = DDPO(DDPOConfig(**settings), 3.0).losses(policy, rollout, rows, weights)  # type: ignore[arg-type]
    assert torch.equal(found, expected)


def test_advantages_are_relative_to_the_whole_step_and_clamped(make_policy: Any) -> None:
    rollout = rollout_of(make_policy())
    found = DiffusionRL(SETTINGS, 3.0).advantages(with_scores(rollout, [1.0, 2, 3, 4, 5, 99], [True] * 5 + [False]))
    torch.testing.assert_close(found, torch.tensor([-2.0, -1, 0, 1, 2, 0]) / math.sqrt(2))
    many = replace(
        rollout, prompts=rollout.prompts * 200, scores=Scores(torch.eye(1200)[0], torch.ones(1200, dtype=torch.bool))
    )
    assert DiffusionRL(SETTINGS, 3.0).advantages(many).max() == 10
    by_group = DiffusionRL(replace(SETTINGS, normalisation="group"), 3.0)
    found = by_group.advantages(with_scores(rollout, [0.0, 10, 100, 1, 20, 300]))
    torch.testing.assert_close(found, torch.tensor([-1.0, -1, -1, 1, 1, 1]))


@pytest.mark.parametrize("limit", [1.0, math.inf])
def test_optimizer_steps_of_a_training_step(make_policy: Any, limit: float) -> None:
    optimizer = OptimizerConfig(max_grad_norm=limit)
    config = TrainConfig(prompts_per_step=7, sampling=SAMPLING, algorithm=SETTINGS, optimizer=optimizer)
    trainer = Trainer(make_policy(), brightness, [Prompt("a cat")], make_algorithm(config), config)
    counted: list[int] = []
    trainer.state.optimization.adamw.register_step_post_hook(lambda *_: counted.append(1))
    metrics = trainer.step(1)
    assert len(counted) == 3
    assert metrics["ratio/max_gap"] < 1e-5
    assert metrics["policy/approx_kl"] > 0, "the policy has moved by the second update"
    assert metrics["advantage/prompts"] == 1 and metrics["advantage/idle_prompts"] == 0


def test_a_run_and_its_state(make_policy: Any, tmp_path: Any) -> None:
    settings = DiffusionRLConfig(timesteps_per_step=2, normalisation="prompt", min_count=2)
    config = TrainConfig(
        steps=2,
        prompts_per_step=4,
        sampling=SAMPLING,
        algorithm=settings,
        evaluation=EvaluationConfig(num_samples=2),
        run_dir=tmp_path / "run",
    )
    assert train(config, policy=make_policy(), reward=brightness, prompts=["a cat"]).run_dir == tmp_path / "run"
    algorithm = DiffusionRL(settings, 3.0)
    algorithm.advantages(rollout_of(make_policy()))
    other = DiffusionRL(settings, 3.0)
    other.load_state_dict(algorithm.state_dict())
    assert other.state_dict() == algorithm.state_dict() != DiffusionRL(settings, 3.0).state_dict()


def test_defaults_are_the_papers() -> None:
    config = parse_train(["--preset", "diffusionrl-paper"])
    settings = config.algorithm
    assert isinstance(settings, DiffusionRLConfig)
    assert (settings.timesteps_per_step, settings.clip_range, settings.advantage_clip) == (5, 1e-4, 10)
    assert (config.samples_per_step, config.sampling.num_steps, config.sampling.guidance) == (2048, 50, 7)
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (2e-6, 1e-2)
    assert config.optimizer.max_grad_norm == math.inf
    with pytest.raises(UserError, match="timesteps_per_step must be at least 1"):
        DiffusionRLConfig(timesteps_per_step=0)
    with pytest.raises(UserError, match="needs fresh noise"):
        TrainConfig(algorithm=SETTINGS, sampling=SamplingConfig(eta=0.0))
    with pytest.raises(UserError, match="set samples_per_prompt above 1"):
        TrainConfig(algorithm=replace(SETTINGS, normalisation="group"))
