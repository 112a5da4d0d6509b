"""DDPO's promises: exact ratios, right gradients, however the work is cut."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.algorithms import DDPO
from diffusionrl.algorithms.policy_gradient import clipped_loss
from diffusionrl.config import DDPOConfig, OptimizerConfig, SamplingConfig, TrainConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.policies import StableDiffusionPolicy
from diffusionrl.policies.base import chunks
from diffusionrl.rewards import Scores
from diffusionrl.sampling.rollout import Rollout, collect, sample_trajectories
from diffusionrl.training.optimization import accumulate_gradient
from diffusionrl.training.trainer import Trainer
from diffusionrl.transitions import Grid, SamplerTable, log_density

SAMPLING = SamplingConfig(num_steps=4, guidance=3.0, batch_size=6)


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, object]]) -> Tensor:
    return images.mean((1, 2, 3))


def rollout_of(policy: StableDiffusionPolicy, count: int = 6, sampling: SamplingConfig = SAMPLING) -> Rollout:
    prompts = [Prompt(text) for text in ("a cat", "a dog", "an ant")] * count
    return collect(policy, brightness, prompts[:count], sampling, 0, "test", 1)


def all_pairs(algorithm: DDPO, rollout: Rollout) -> Tensor:
    return algorithm.pairs(rollout, torch.arange(len(rollout.prompts)), 0, 1)


def gradient(policy: StableDiffusionPolicy, algorithm: DDPO, rollout: Rollout, pairs: Tensor, advantages: Tensor) -> Tensor:
    for weight in policy.trainable().values():
        weight.grad = None
    accumulate_gradient(algorithm, policy, rollout, pairs, advantages)
    return torch.cat([weight.grad.flatten() for weight in policy.trainable().values() if weight.grad is not None])


# Ratio


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_ratio_is_exactly_one_where_cut_alike(make_policy, targets: str) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy(lora_targets=targets)
    rollout, algorithm = rollout_of(policy), DDPO(DDPOConfig(), 3.0)
    for i in range(4):
        pairs = torch.stack([torch.arange(6), torch.full((6,), i)], 1)
        _, figures = algorithm.losses(policy, rollout, pairs, torch.ones(len(pairs)))
        assert figures["ratio_gap"].max() == 0


@pytest.mark.parametrize("size", [1, 5, 24])
def test_ratio_is_one_to_rounding_however_cut(make_policy, size: int) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy()
    rollout, algorithm = rollout_of(policy), DDPO(DDPOConfig(), 3.0)
    pairs = all_pairs(algorithm, rollout)
    for part in chunks(len(pairs), size):
        _, figures = algorithm.losses(policy, rollout, pairs[part], torch.ones(len(pairs[part])))
        assert figures["ratio_gap"].max() < 1e-5


def test_ratio_is_near_one_in_bfloat16(make_policy) -> None:  # type: ignore[no-untyped-def]
    """The stored latents are float32, so only the network's own rounding is left, here with batches cut alike."""
    policy = make_policy(dtype=torch.bfloat16)
    rollout, algorithm = rollout_of(policy), DDPO(DDPOConfig(), 3.0)
    pairs = torch.stack([torch.arange(6), torch.full((6,), 2)], 1)
    _, figures = algorithm.losses(policy, rollout, pairs, torch.ones(len(pairs)))
    assert figures["ratio_gap"].max() < 1e-6


# Gradient


def test_is_gradient_is_sf_gradient_at_the_old_parameters(make_policy) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy()
    rollout = rollout_of(policy)
    advantages = torch.linspace(-1, 1, 6)
    importance = DDPO(DDPOConfig(), 3.0)
    score = DDPO(DDPOConfig(variant="sf", updates_per_step=1), 3.0)
    pairs = all_pairs(importance, rollout)
    found = [gradient(policy, algorithm, rollout, pairs, advantages) for algorithm in (importance, score)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4 * found[1].abs().max().item())


@pytest.mark.parametrize("size", [1, 7, 24])
def test_cutting_the_batch_changes_no_gradient(make_policy, size: int) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy(lora_targets="all")
    rollout, algorithm = rollout_of(policy), DDPO(DDPOConfig(), 3.0)
    pairs, advantages = all_pairs(algorithm, rollout), torch.linspace(-1, 1, 6)
    whole = gradient(policy, algorithm, rollout, pairs, advantages)
    cut = gradient(policy, DDPO(DDPOConfig(micro_batch_size=size), 3.0), rollout, pairs, advantages)
    assert (cut - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_down_the_loss_moves_the_log_probability_with_the_advantage(make_policy, sign: float) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy()
    rollout, algorithm = rollout_of(policy), DDPO(DDPOConfig(clip_range=1e3), 3.0)
    pairs = all_pairs(algorithm, rollout)
    advantages = torch.full((6,), sign)
    before, _ = algorithm.losses(policy, rollout, pairs, advantages[pairs[:, 0]])
    gradient(policy, algorithm, rollout, pairs, advantages)
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight -= 1e-3 * weight.grad / weight.grad.norm()
        after, _ = algorithm.losses(policy, rollout, pairs, advantages[pairs[:, 0]])
    # The loss is -advantage * ratio, so the mean ratio rises where the advantage is positive and falls where it is not.
    assert after.mean() < before.mean()


class GaussianChain:
    """x' ~ N(alpha' * theta + kept * x, fresh^2) in one dimension: a policy whose objective is known in closed form."""

    device, latent_shape, edits = torch.device("cpu"), (1, 1, 1), False

    def __init__(self, theta: float) -> None:
        self.theta = torch.nn.Parameter(torch.tensor(theta))

    def denoise(self, x: Tensor, *unused: object) -> tuple[Tensor, Tensor]:
        return self.theta.expand_as(x), x


def test_policy_gradient_of_a_gaussian_chain_matches_its_closed_form() -> None:
    """For the reward x_T, J = sum_i alpha'_i theta prod_{j>i} kept_j + const, so dJ/dtheta needs no sampling."""
    alpha_next, kept, fresh = torch.tensor([0.5, 0.8, 1.0]), torch.tensor([0.7, 0.4, 0.3]), torch.tensor([0.5, 0.4, 0.2])
    table = SamplerTable(Grid(torch.zeros(3), torch.ones(3), torch.ones(3), alpha_next, torch.ones(3)), kept, fresh)
    exact = sum(alpha_next[i] * kept[i + 1 :].prod() for i in range(3)).item()
    policy, count = GaussianChain(0.3), 40_000
    noise = torch.randn(count, 4, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    prompts = [Prompt("")] * count
    drawn = sample_trajectories(policy, table, prompts, noise[:, 0], noise[:, 1:], 1.0)  # type: ignore[arg-type]
    latents, log_probs = drawn.latents, drawn.log_probs
    reward = latents[:, -1].flatten()
    scores = Scores(reward, torch.ones(count, dtype=torch.bool))
    rollout = Rollout(table, prompts, latents, log_probs, latents[:, -1], scores, {})
    pairs = torch.cartesian_prod(torch.arange(count), torch.arange(3))
    for config in (DDPOConfig(variant="sf", updates_per_step=1), DDPOConfig()):
        policy.theta.grad = None
        losses, _ = DDPO(config, 1.0).losses(policy, rollout, pairs, (reward - reward.mean())[pairs[:, 0]])  # type: ignore[arg-type]
        losses.mean().backward()
        estimate = -3 * policy.theta.grad.item()  # the loss averages over the three steps, J sums
        score = (latents[:, 1:] - alpha_next.view(3, 1, 1, 1) * 0.3 - kept.view(3, 1, 1, 1) * latents[:, :-1]).flatten(1)
        terms = (score * alpha_next / fresh**2).sum(1) * (reward - reward.mean())
        assert abs(estimate - exact) < 4 * terms.std().item() / math.sqrt(count)


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 99))
def test_each_update_takes_one_of_so_many_samples_in_a_row(count: int, total: int, seed: int) -> None:
    grid = Grid(*[torch.ones(2)] * 5)
    scores = Scores(torch.zeros(total), torch.arange(total) % 5 > 0)
    none = torch.zeros(0)
    rollout = Rollout(SamplerTable(grid, *[torch.ones(2)] * 2), [Prompt("")] * total, none, none, none, scores, {})
    updates = list(DDPO(DDPOConfig(updates_per_step=count), 1.0).updates(rollout, none, seed, 1))
    samples = [set(rows[:, 0].tolist()) for rows in updates]
    assert len(updates) == count
    assert sorted(i for taken in samples for i in taken) == scores.valid.nonzero().flatten().tolist()
    for first in range(0, total - count + 1, count):
        block = range(first, first + count)
        assert all(len(taken.intersection(block)) <= 1 for taken in samples)


# Clip


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [(1.0, 1.5, -1.2, 0.0), (1.0, 0.5, -0.5, -1.0), (-1.0, 1.5, 1.5, 1.0), (-1.0, 0.5, 0.8, 0.0)],
)
def test_clip_is_pessimistic(advantage: float, ratio: float, loss: float, slope: float) -> None:
    """Beyond the clip a ratio earns nothing more, but a ratio on the wrong side is charged in full."""
    value = torch.tensor(ratio, requires_grad=True)
    found = clipped_loss(torch.tensor(advantage), value, 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert value.grad is not None and value.grad.item() == pytest.approx(slope)


# Steps


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 4), (0.5, 2), (0.01, 1)])
def test_trained_steps_are_drawn_without_replacement(make_policy, fraction: float, expected: int) -> None:  # type: ignore[no-untyped-def]
    rollout, algorithm = rollout_of(make_policy()), DDPO(DDPOConfig(train_fraction=fraction), 3.0)
    pairs = all_pairs(algorithm, rollout)
    assert len(pairs) == 6 * expected
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)
    assert torch.equal(pairs, all_pairs(algorithm, rollout))


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_a_denoising_step_counts_by_a_power_of_its_fresh_noise(make_policy, power: float) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy({"steps_offset": 0, "set_alpha_to_one": True})
    rollout = rollout_of(policy)
    pairs = all_pairs(DDPO(DDPOConfig(), 3.0), rollout)
    plain, _ = DDPO(DDPOConfig(), 3.0).losses(policy, rollout, pairs, torch.ones(len(pairs)))
    weighted, _ = DDPO(DDPOConfig(step_weight_power=power), 3.0).losses(policy, rollout, pairs, torch.ones(len(pairs)))
    fresh = rollout.table.fresh[:3]  # the last row has none
    torch.testing.assert_close(weighted / plain, (fresh**power / (fresh**power).mean())[pairs[:, 1]])


def test_last_step_without_noise_is_left_out_and_the_loss_is_finite(make_policy) -> None:  # type: ignore[no-untyped-def]
    """With steps_offset 0 the last sigma is 0: log sigma would be minus infinity."""
    policy = make_policy({"steps_offset": 0, "set_alpha_to_one": True})
    rollout, algorithm = rollout_of(policy), DDPO(DDPOConfig(), 3.0)
    assert rollout.table.fresh[-1] == 0
    assert (rollout.log_probs[:, -1] == 0).all()
    pairs = all_pairs(algorithm, rollout)
    assert pairs[:, 1].max() == 2
    found = gradient(policy, algorithm, rollout, pairs, torch.ones(len(pairs)))
    assert found.isfinite().all()
    assert found.abs().max() > 0


def test_old_log_probability_is_that_of_the_stored_latent(make_policy) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy()
    rollout = rollout_of(policy)
    noise = seeds.normal(0, "test", 1, list(range(6)), (5, *policy.latent_shape))
    assert torch.equal(rollout.latents[:, 0], noise[:, 0])
    residual = rollout.table.fresh.view(1, 4, 1, 1, 1) * noise[:, 1:]
    zero, std = torch.zeros(6, *policy.latent_shape), rollout.table.fresh
    for i in range(4):
        expected = log_density(residual[:, i], zero, std[i])
        torch.testing.assert_close(rollout.log_probs[:, i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("variant", "updates"), [("is", 4), ("sf", 1)])
def test_optimizer_steps_of_a_training_step(make_policy, tmp_path: Path, variant: Any, updates: int) -> None:  # type: ignore[no-untyped-def]
    """The paper's arithmetic at a smaller size: 4 updates on a quarter each (IS), 1 on everything (SF)."""
    algorithm = DDPOConfig(variant=variant, updates_per_step=updates)
    config = TrainConfig(prompts_per_step=8, sampling=SAMPLING, algorithm=algorithm)
    trainer = Trainer(make_policy(), brightness, [Prompt("a cat")], DDPO(algorithm, 3.0), config)
    counted: list[int] = []
    trainer.state.optimization.adamw.register_step_post_hook(lambda *_: counted.append(1))
    metrics = trainer.step(1)
    assert len(counted) == updates
    assert metrics["ratio/max_gap"] < 1e-5
    assert metrics["policy/approx_kl"] > 0 if updates > 1 else metrics["policy/approx_kl"] < 1e-10


def test_warmup_scales_the_first_updates(make_policy, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    algorithm = DDPOConfig()
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup=4, weight_decay=0.0)
    config = TrainConfig(prompts_per_step=8, sampling=SAMPLING, algorithm=algorithm, optimizer=optimizer)
    trainer = Trainer(make_policy(), brightness, [Prompt("a cat")], DDPO(algorithm, 3.0), config)
    rates: list[float] = []
    trainer.state.optimization.adamw.register_step_pre_hook(lambda found, *_: rates.append(found.param_groups[0]["lr"]))
    trainer.step(1)
    trainer.step(2)
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3] + [1e-3] * 5)


def test_defaults_are_the_papers() -> None:
    config = TrainConfig()
    assert (config.samples_per_step, config.algorithm.updates_per_step, config.algorithm.clip_range) == (256, 4, 1e-4)
    with pytest.raises(ValueError, match="on-policy"):
        DDPOConfig(variant="sf")
    with pytest.raises(ValueError, match="equal updates"):
        TrainConfig(prompts_per_step=6)
