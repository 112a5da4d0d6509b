"""The reward gradients' promises: the gradient is that of a part of the chain, as a paper says, and of the reward's score."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from objectives import REWARD_GRADIENT, flow_policy, lightness
from torch import Tensor

from diffusionrl.algorithms.reward_gradient import Chain, RewardGradient
from diffusionrl.api import train
from diffusionrl.config import (
    AlignPropConfig,
    DRaFTConfig,
    DRTuneConfig,
    EvaluationConfig,
    FlowBPConfig,
    OptimizerConfig,
    ReFLConfig,
    SamplingConfig,
    TrainConfig,
)
from diffusionrl.config.rewards import DIFFERENTIABLE_REWARDS, RewardsConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import UserError
from diffusionrl.policies.pipeline import PipelinePolicy
from diffusionrl.rewards import REGISTRY, Mixture, Scores, differentiable, load_reward, try_gradient
from diffusionrl.rewards.base import is_differentiable, score
from diffusionrl.runs.folder import read_metrics
from diffusionrl.sampling.rollout import Rollout, collect, draw_noise, make_table
from diffusionrl.training.optimization import accumulate_gradient
from diffusionrl.transitions import Grid, SamplerTable, cps, ddim, flow_grid, ode, variance_preserving_grid

SAMPLING = SamplingConfig(num_steps=4, guidance=1.0, sampler="ode", eta=0.0, batch_size=4)


# A toy in float64: a network of one layer, a curved decoder, a curved reward


class Toy:
    """A policy on three numbers, whose network gives the velocity of a linear flow, or the noise."""

    device = torch.device("cpu")
    sampling_rate = None

    def __init__(self, grid: Grid, weight: Tensor) -> None:
        self.noise_levels, self.weight = grid.levels, weight
        self.inputs: list[Tensor] = []

    def network(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.inputs.append(x)
        return 1.5 * torch.tanh(x @ self.weight.double() + sigma)

    def denoise(self, x: Tensor, levels: Any, prompts: Any, guidance: Any) -> tuple[Tensor, Tensor]:
        alpha, sigma = (each.double()[:, None] for each in (levels.alpha, levels.sigma))
        output = self.network(x, sigma)
        if self.noise_levels.linear:
            return x - sigma * output, x + alpha * output
        return (x - sigma * output) / alpha, output

    def decode(self, latents: Tensor, prompts: Any, gradient: bool = False) -> Tensor:
        return torch.sigmoid(latents.roll(1, 1) + 0.5 * latents**2)

    def trainable(self) -> dict[str, Tensor]:
        return {"weight": self.weight}


@differentiable
def curved(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    return (images.flatten(1) ** 3).sum(1) + images.flatten(1).prod(1)


def vp_grid(steps: int) -> Grid:
    return variance_preserving_grid(torch.linspace(0.999, 0.98, 200).cumprod(0), steps, final_alpha_cumprod=1.0)


TABLES: dict[str, Callable[[int], SamplerTable]] = {
    "flow-ode": lambda steps: ode(flow_grid(steps)),
    "flow-cps": lambda steps: cps(flow_grid(steps), 0.7),
    "vp-ode": lambda steps: ode(vp_grid(steps)),
    "vp-ddim": lambda steps: ddim(vp_grid(steps), 1.0),
}


def toy(table: SamplerTable, count: int = 5) -> tuple[Toy, Rollout, Tensor]:
    """A policy, samples of it, and the fresh noise of their steps."""
    generator = torch.Generator().manual_seed(1)
    policy = Toy(table.grid, torch.randn(3, 3, generator=generator).requires_grad_())
    drawn = torch.randn(count, len(table) + 1, 3, dtype=torch.float64, generator=generator)
    latents = [drawn[:, 0]]
    for step in range(len(table)):
        with torch.no_grad():
            latents.append(walk(policy, table, latents[-1], step, drawn[:, step + 1]))
    prompts = [Prompt("a cat")] * count
    images = policy.decode(latents[-1], prompts).float()
    stored = torch.stack(latents, 1)
    scores = score(curved, images, ["a cat"] * count, [{}] * count)
    policy.inputs.clear()
    return policy, Rollout(table, prompts, stored, stored[:, 1:, 0], images, scores, {}, reward=Mixture({"c": curved})), drawn


def walk(policy: Toy, table: SamplerTable, x: Tensor, step: int, z: Tensor, given: Tensor | None = None) -> Tensor:
    """One step, written out; ``given`` takes the place of the network's input."""
    alpha, sigma, alpha_next = (float(each[step]) for each in (table.grid.alpha, table.grid.sigma, table.alpha_next))
    output = policy.network(x if given is None else given, torch.tensor([[sigma]], dtype=torch.float64))
    if policy.noise_levels.linear:
        x0, noise = x - sigma * output, x + alpha * output
    else:
        x0, noise = (x - sigma * output) / alpha, output
    return alpha_next * x0 + float(table.kept[step]) * noise + float(table.fresh[step]) * z


def plain_reward(policy: Toy, latents: Tensor) -> Tensor:
    return curved(policy.decode(latents, []), [], [])


def found_gradient(algorithm: RewardGradient, policy: Any, rollout: Rollout, step: int = 1) -> Tensor:
    """By the trainer's own road."""
    advantages = algorithm.advantages(rollout)
    for weight in policy.trainable().values():
        weight.grad = None
    accumulate_gradient(algorithm, policy, rollout, next(algorithm.updates(rollout, advantages, 0, step)), advantages)
    found = torch.cat([w.grad.flatten() for w in policy.trainable().values() if w.grad is not None])
    for weight in policy.trainable().values():
        weight.grad = None
    return found


def plan_of(algorithm: RewardGradient, rollout: Rollout, step: int = 1) -> list[int]:
    return next(algorithm.updates(rollout, rollout.scores.values, 0, step))[0, 1:].tolist()


@pytest.mark.parametrize("name", TABLES)
def test_all_steps_of_draft_are_the_derivative_of_the_chain(name: str) -> None:
    """Against finite differences, the fresh noise held fixed."""
    table = TABLES[name](4)
    policy, rollout, drawn = toy(table)

    def value(weight: Tensor) -> float:
        moved, x = Toy(table.grid, weight), drawn[:, 0]
        for step in range(4):
            x = walk(moved, table, x, step, drawn[:, step + 1])
        return -plain_reward(moved, x).mean().item()

    expected = torch.zeros(9, dtype=torch.float64)
    for index in range(9):
        change = torch.zeros(9, dtype=torch.float64)
        change[index] = 1e-5
        up, down = (value(policy.weight.detach().double() + sign * change.view(3, 3)) for sign in (1, -1))
        expected[index] = (up - down) / 2e-5
    found = found_gradient(REWARD_GRADIENT["draft"](last_steps=4), policy, rollout)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert expected.norm() > 1e-2


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("last", [1, 3])
def test_the_chain_is_cut_before_the_last_steps(name: str, last: int) -> None:
    table = TABLES[name](4)
    policy, rollout, drawn = toy(table)
    x = rollout.latents[:, 4 - last]
    for step in range(4 - last, 4):
        x = walk(policy, table, x, step, drawn[:, step + 1])
    (expected,) = torch.autograd.grad(-plain_reward(policy, x).mean(), policy.weight)
    policy.inputs.clear()
    found = found_gradient(REWARD_GRADIENT["draft"](last_steps=last, micro_batch_size=64), policy, rollout)
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-5, atol=1e-8)
    assert len(policy.inputs) == last
    assert torch.equal(policy.inputs[0], rollout.latents[:, 4 - last])


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_drtune_cuts_the_networks_input_and_scores_what_is_seen_at_its_last_step(name: str, step: int) -> None:
    table = TABLES[name](6)
    policy, rollout, drawn = toy(table)
    algorithm = REWARD_GRADIENT["drtune"]()
    *trained, stop = plan_of(algorithm, rollout, step)
    x = rollout.latents[:, 0]
    for i in range(stop):
        with torch.set_grad_enabled(i in trained):
            output = policy.network(x.detach(), table.grid.sigma[i].double())
        x = additive(table, policy, x, output, i, drawn[:, i + 1])
    with torch.set_grad_enabled(stop in trained):
        output = policy.network(x.detach(), table.grid.sigma[stop].double())
    alpha, sigma = float(table.grid.alpha[stop]), float(table.grid.sigma[stop])
    seen = x - sigma * output if policy.noise_levels.linear else (x - sigma * output) / alpha
    (expected,) = torch.autograd.grad(-plain_reward(policy, seen).mean(), policy.weight)
    found = found_gradient(algorithm, policy, rollout, step)
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-5, atol=1e-8)
    assert not any(each.requires_grad for each in policy.inputs)


def additive(table: SamplerTable, policy: Toy, x: Tensor, output: Tensor, i: int, z: Tensor) -> Tensor:
    alpha, sigma = float(table.grid.alpha[i]), float(table.grid.sigma[i])
    if policy.noise_levels.linear:
        x0, noise = x - sigma * output, x + alpha * output
    else:
        x0, noise = (x - sigma * output) / alpha, output
    return float(table.alpha_next[i]) * x0 + float(table.kept[i]) * noise + float(table.fresh[i]) * z


def test_flowbp_is_the_sum_of_its_steps_direct_terms() -> None:
    """x0 = x_init + sum dt_i v_i on the cached trajectory, as in the paper."""
    table = TABLES["flow-ode"](6)
    policy, rollout, _ = toy(table)
    algorithm = REWARD_GRADIENT["flowbp"](rescale=0.5)
    active = plan_of(algorithm, rollout)
    dt = (table.grid.sigma_next - table.grid.sigma).double()
    factor = 1 + 0.5 * (dt.abs().sum() / dt[active].abs().sum() - 1)
    x = rollout.latents[:, 0]
    for i in range(6):
        v = policy.network(rollout.latents[:, i], table.grid.sigma[i].double())
        x = x + dt[i] * (v.detach() + (factor * (v - v.detach()) if i in active else 0))
    torch.testing.assert_close(x.detach(), rollout.latents[:, -1], rtol=1e-5, atol=1e-6)
    x = rollout.latents[:, -1] + (x - x.detach())
    (expected,) = torch.autograd.grad(-plain_reward(policy, x).mean(), policy.weight)
    policy.inputs.clear()
    found = found_gradient(algorithm, policy, rollout)
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-4, atol=1e-7)
    assert len(active) == 2 and not any(each.requires_grad for each in policy.inputs)


def test_refl_scores_one_late_step_and_alignprop_truncates_at_random() -> None:
    table = TABLES["vp-ode"](8)
    policy, rollout, _ = toy(table)
    for step in range(1, 5):
        algorithm = REWARD_GRADIENT["refl"](late=0.25)
        (late,) = plan_of(algorithm, rollout, step)
        assert late in (6, 7)
        x, alpha, sigma = rollout.latents[:, late], float(table.grid.alpha[late]), float(table.grid.sigma[late])
        seen = (x - sigma * policy.network(x, torch.tensor(sigma).double())) / alpha
        (expected,) = torch.autograd.grad(-plain_reward(policy, seen).mean(), policy.weight)
        torch.testing.assert_close(found_gradient(algorithm, policy, rollout, step), expected.flatten(), rtol=1e-5, atol=1e-8)
        (first,) = plan_of(REWARD_GRADIENT["alignprop"](), rollout, step)
        one, other = (
            found_gradient(REWARD_GRADIENT[name](**more), policy, rollout, step)
            for name, more in (("alignprop", {}), ("draft", {"last_steps": 8 - first}))
        )
        assert torch.equal(one, other)
    firsts = {plan_of(REWARD_GRADIENT["alignprop"](most_steps=3), rollout, step)[0] for step in range(40)}
    assert firsts == {5, 6, 7}


def test_draft_lv_noises_the_sample_to_the_last_steps_level() -> None:
    table = TABLES["flow-ode"](4)
    policy, rollout, _ = toy(table)
    algorithm = REWARD_GRADIENT["draft-lv"](renoisings=3, micro_batch_size=64)
    rows = next(algorithm.updates(rollout, rollout.scores.values, 0, 1))
    assert len(rows) == 4 * 5 and len(set(rows[:, 2].tolist())) == 4
    found = found_gradient(algorithm, policy, rollout)
    (inputs,) = policy.inputs
    assert not inputs.requires_grad and torch.equal(inputs[:5], rollout.latents[:, -2])
    sigma = table.grid.sigma[-1].double()
    noise = (inputs[5:] - (1 - sigma) * rollout.latents[:, -1].repeat(3, 1)) / sigma
    assert len(torch.unique(noise.round(decimals=3))) > 40 and 0.5 < noise.std() < 1.5
    x0 = inputs - sigma * policy.network(inputs, sigma)
    (expected,) = torch.autograd.grad(-plain_reward(policy, x0).mean(), policy.weight)
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-5, atol=1e-8)


def test_what_is_drawn_follows_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    drtune, flowbp = REWARD_GRADIENT["drtune"](trained_steps=3), REWARD_GRADIENT["flowbp"](trained_steps=4)
    stops, places = set(), []
    for _ in range(300):
        ((*steps, stop),) = drtune.plan(10, generator)
        stops.add(stop)
        assert steps[0] >= 0 and steps[-1] <= stop and len({after - before for before, after in pairwise(steps)}) == 1
        ((*active,),) = flowbp.plan(10, generator)
        assert sorted(set(active)) == active and len(active) == 4
        places += active
    assert stops == {6, 7, 8, 9}
    assert places.count(9) > 3 * places.count(0) > 0


# Real policies, tiny


@pytest.fixture(scope="module")
def flow() -> PipelinePolicy:
    policy = flow_policy(4)
    for index, weight in enumerate(policy.trainable().values()):
        weight.data.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)))
    return policy


@pytest.fixture(params=["flow", "unet"])
def policy(request: Any, make_policy: Any, flow: PipelinePolicy) -> Any:
    return flow if request.param == "flow" else make_policy(lora_rank=2)


def sampled(policy: Any, invalid: Sequence[int] = (), sampling: SamplingConfig = SAMPLING) -> Rollout:
    prompts = [Prompt("a cat"), Prompt("a dog")] * 3
    found = collect(policy, lightness, prompts, sampling, 0, "test", 1)
    valid = torch.tensor([i not in invalid for i in range(len(prompts))])
    return replace(found, scores=Scores(found.scores.values.where(valid, torch.tensor(math.nan)), valid))


def alike(one: Tensor, other: Tensor, within: float) -> bool:
    return bool((one - other).norm() <= within * max(one.norm(), other.norm())) and bool(other.norm() > 0)


def test_all_steps_of_draft_are_autograd_of_the_whole_chain(policy: Any) -> None:
    """Through the policy's own network, its decoder and all, with a sampler that draws fresh noise."""
    sampling = replace(SAMPLING, sampler="cps", eta=0.5)
    rollout = sampled(policy, sampling=sampling)
    table, indices = make_table(policy, sampling), range(6)
    x, noise = draw_noise(policy, table, rollout.prompts, 0, "test", 1, indices)
    for step in range(len(table)):
        levels = table.grid.levels[torch.full((6,), step)]
        x0, eps = policy.denoise(x, levels, rollout.prompts, 1.0)
        x = table.alpha_next[step] * x0 + table.kept[step] * eps + table.fresh[step] * noise[:, step]
    images = policy.decode(x, rollout.prompts, gradient=True)
    torch.testing.assert_close(images.detach(), rollout.images, rtol=1e-4, atol=1e-5)
    weights = list(policy.trainable().values())
    grads = torch.autograd.grad(-lightness(images, [], []).mean(), weights, allow_unused=True)
    expected = torch.cat([each.flatten() for each in grads if each is not None])
    found = found_gradient(REWARD_GRADIENT["draft"](last_steps=len(table)), policy, rollout)
    assert alike(found, expected, 1e-3)


def test_the_second_pass_has_the_stored_values_exactly(policy: Any) -> None:
    rollout = sampled(policy)
    chain = Chain(policy, rollout.table, rollout.latents, rollout.prompts, 1.0, range(6))
    for again in (chain.through(1), chain.direct([0, 2], 4, 1.3)):
        assert torch.equal(again, rollout.latents[:, -1]) and again.requires_grad
    assert torch.equal(chain.direct([0, 1], 3), rollout.latents[:, 3])


@pytest.mark.parametrize("name", REWARD_GRADIENT)
def test_cutting_the_update_changes_no_gradient(policy: Any, name: str) -> None:
    rollout = sampled(policy)
    whole, cut = (
        found_gradient(REWARD_GRADIENT[name](micro_batch_size=size, reference_weight=0.1), policy, rollout) for size in (64, 3)
    )
    assert alike(cut, whole, 1e-4)


@pytest.mark.parametrize("name", REWARD_GRADIENT)
def test_invalid_samples_leave_the_loss_exactly(flow: PipelinePolicy, name: str) -> None:
    rollout = sampled(flow, invalid=[1, 4])
    spoilt = rollout.latents.clone()
    spoilt[[1, 4]] = math.inf
    algorithm = REWARD_GRADIENT[name]()
    one, other = (found_gradient(algorithm, flow, each) for each in (rollout, replace(rollout, latents=spoilt)))
    assert torch.equal(one, other) and one.any()


def test_a_target_that_is_reached_teaches_nothing_and_the_reference_holds(flow: PipelinePolicy) -> None:
    rollout = sampled(flow)
    assert not found_gradient(REWARD_GRADIENT["draft"](target=-1.0), flow, rollout).any()
    anchored = REWARD_GRADIENT["draft"](target=-1.0, reference_weight=1.0)
    assert anchored.needs_reference and found_gradient(anchored, flow, rollout).any()
    rows = next(anchored.updates(rollout, rollout.scores.values, 0, 1))
    losses, figures = anchored.losses(flow, rollout, rows, torch.ones(len(rows)))
    torch.testing.assert_close(losses.detach(), 1.0 + figures["policy/distance_from_reference"].double())
    assert (figures["policy/distance_from_reference"] > 0).all()
    assert (figures["reward/differentiated_gap"] < 1e-5).all()


def test_checkpointing_changes_no_gradient_and_reaches_the_decoder(make_policy: Any) -> None:
    plain, saving = make_policy(lora_rank=2), make_policy(lora_rank=2, gradient_checkpointing=True)
    rollout, algorithm = sampled(plain), REWARD_GRADIENT["draft"]()
    assert saving.pipeline.vae.decoder.gradient_checkpointing and not plain.pipeline.vae.decoder.gradient_checkpointing
    assert alike(found_gradient(algorithm, saving, rollout), found_gradient(algorithm, plain, rollout), 1e-4)
    assert not any(weight.requires_grad for weight in saving.pipeline.vae.parameters())
    latents = rollout.latents[:2, -1].clone().requires_grad_()
    assert not plain.decode(latents, rollout.prompts[:2]).requires_grad


def test_it_learns(make_policy: Any, tmp_path: Path) -> None:
    config = TrainConfig(
        steps=4,
        prompts_per_step=4,
        run_dir=tmp_path / "run",
        sampling=replace(SAMPLING, batch_size=8),
        algorithm=DRaFTConfig(),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        evaluation=EvaluationConfig(every=0, num_samples=16),
    )
    train(config, policy=make_policy(lora_rank=None), reward=lightness, prompts=["a cat", "a dog"])
    last = read_metrics(tmp_path / "run")[-1]
    assert last["eval/reward_change"] > 3 * last["eval/reward_change_se"] > 0
    assert last["reward/differentiated_gap"] < 1e-5 and last["grad_norm"] > 0


# Rewards


def test_the_list_of_differentiable_rewards_is_true() -> None:
    """Of those that need no more than their name."""
    cheap = [name for name in REGISTRY if not name.startswith(("vlm", "parity", "smooth", "diffusion-classifier"))]
    found = [name for name in cheap if is_differentiable(load_reward(name, RewardsConfig()))]
    assert sorted(found) == sorted(DIFFERENTIABLE_REWARDS)


@pytest.mark.parametrize("name", DIFFERENTIABLE_REWARDS)
def test_a_built_in_rewards_gradient_is_that_of_its_score(name: str) -> None:
    """Along a random direction, against the reward's own scores without gradient."""
    reward, generator = load_reward(name), torch.Generator().manual_seed(0)
    targets = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    prompts, metadata = ["a cat", "a dog"], [{"target": target} for target in targets]
    images = 0.25 + 0.5 * torch.rand(2, 3, 8, 8, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    direction = torch.randn(images.shape, generator=generator).sign()
    images.requires_grad_()
    scores = Mixture({name: reward}).differentiate(images, prompts, metadata)
    torch.testing.assert_close(scores.values.detach(), score(reward, images.detach(), prompts, metadata).values)
    (gradient,) = torch.autograd.grad(scores.values.sum(), images)
    up, down = (score(reward, images.detach() + sign * 2e-3 * direction, prompts, metadata).values for sign in (1, -1))
    expected = (up - down) / 4e-3
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1).double(), expected, rtol=0.05, atol=1e-3)
    assert gradient.flatten(1).any(1).all()


def test_a_mixture_adds_gradients_and_frames_of_videos_share_one() -> None:
    mixture = Mixture({"light": lightness, "curved": curved}, {"light": 2.0, "curved": -0.5})
    mixture.statistics["light"] = (0.3, 0.2)
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = mixture.differentiate(images, ["a", "b"], [{}, {}]).values
    expected = 2 * (lightness(images, [], []) - 0.3) / 0.2 - 0.5 * curved(images, [], [])
    torch.testing.assert_close(values, expected.double())
    one, other = (torch.autograd.grad(each.sum(), images, retain_graph=True)[0] for each in (values, expected))
    torch.testing.assert_close(one, other)
    video = torch.rand(1, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    seen = Mixture({"aesthetic": load_reward("aesthetic")}).differentiate(video, ["a cat"], [{}])
    (gradient,) = torch.autograd.grad(seen.values.sum(), video)
    assert gradient[0].flatten(1).any(1).all()


def ranged(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return images.mean((1, 2, 3))


ranged.range = (0.0, 0.4)  # type: ignore[attr-defined]


def test_a_score_out_of_range_in_the_second_pass_teaches_nothing() -> None:
    images = torch.stack([torch.full((3, 4, 4), 0.3), torch.full((3, 4, 4), 0.6)]).requires_grad_()
    scores = Mixture({"r": ranged}).differentiate(images, ["a", "b"], [{}, {}])
    assert scores.valid.tolist() == [True, False]
    (gradient,) = torch.autograd.grad(scores.values.sum(), images)
    assert gradient[0].all() and not gradient[1].any()


def small(run_dir: Path, algorithm: Any) -> TrainConfig:
    return TrainConfig(steps=1, prompts_per_step=2, run_dir=run_dir, sampling=SAMPLING, algorithm=algorithm)


@pytest.mark.parametrize("name", ["compressibility", "emoji-judge"])
def test_a_black_box_is_refused_with_the_names_of_those_that_are_none(make_policy: Any, tmp_path: Path, name: str) -> None:
    config = small(tmp_path / "run", DRaFTConfig())
    box = Mixture({"light": lightness, name: load_reward(name)})
    with pytest.raises(UserError) as refused:
        train(config, policy=make_policy(), reward=box, prompts=["a cat"])
    told = str(refused.value)
    assert f"draft follows the reward's gradient, and {name} has none" in told and "differentiable = True" in told
    assert all(each in told for each in DIFFERENTIABLE_REWARDS)
    assert not (tmp_path / "run").exists()


@differentiable
def detached(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return images.mean((1, 2, 3)).detach()


@differentiable
def numbers(images: Tensor, prompts: Any, metadata: Any) -> Any:
    return images.numpy().mean((1, 2, 3))


@differentiable
def two_faced(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return images.mean((1, 2, 3)) + (1.0 if images.requires_grad else 0.0)


@differentiable
def sharp(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return (images - 0.5).abs().sqrt().mean((1, 2, 3))


@differentiable
def of_groups(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return images.mean((1, 2, 3))


of_groups.whole_groups = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (detached, "its scores carry none"),
        (numbers, "cannot be called with one: RuntimeError"),
        (two_faced, "scores the same images"),
        (sharp, "it is not finite on a grey image"),
    ],
)
def test_a_reward_that_does_not_keep_its_word_is_found_at_once(reward: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        try_gradient(Mixture({"mine": reward}), (3, 8, 8), ["a cat", "a dog"], [{}, {}])
    try_gradient(Mixture({"light": lightness}), (3, 8, 8), ["a cat", "a dog"], [{}, {}])


def test_rewards_of_groups_are_refused(make_policy: Any, tmp_path: Path) -> None:
    config = replace(small(tmp_path / "run", DRaFTConfig()), samples_per_prompt=2)
    config = replace(config, evaluation=EvaluationConfig(num_samples=4, samples_per_prompt=2))
    with pytest.raises(UserError, match="looks at whole groups"):
        train(config, policy=make_policy(), reward=of_groups, prompts=["a cat"])


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        (DRaFTConfig(last_steps=5), "last_steps is 5, and the sampler takes 4 steps"),
        (AlignPropConfig(most_steps=9), "most_steps is 9"),
        (DRTuneConfig(trained_steps=4), "trained_steps is 4, and the shortest chain"),
        (FlowBPConfig(trained_steps=5), "trained_steps is 5"),
    ],
)
def test_a_window_outside_the_sampler_is_refused(make_policy: Any, tmp_path: Path, algorithm: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(small(tmp_path / "run", algorithm), policy=make_policy(), reward=lightness, prompts=["a cat"])
    assert not (tmp_path / "run").exists()


def test_pipelines_without_a_gradient_are_refused(make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    monkeypatch.setattr(policy, "decode", lambda latents, prompts, gradient=False: torch.zeros(len(latents), 3, 32, 32))
    with pytest.raises(UserError, match="decoder passes none on"):
        train(small(tmp_path / "run", DRaFTConfig()), policy=policy, reward=lightness, prompts=["a cat"])
    policy.edits = True
    with pytest.raises(UserError, match="edits its latents after each step"):
        train(small(tmp_path / "run", DRaFTConfig()), policy=policy, reward=lightness, prompts=["a cat"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: DRaFTConfig(last_steps=0),
        lambda: DRaFTConfig(renoisings=0),
        lambda: DRaFTConfig(target=math.nan),
        lambda: DRaFTConfig(reference_weight=-1.0),
        lambda: AlignPropConfig(most_steps=0),
        lambda: ReFLConfig(late=0.0),
        lambda: DRTuneConfig(trained_steps=0),
        lambda: DRTuneConfig(early_stop=1.5),
        lambda: FlowBPConfig(trained_steps=0),
        lambda: FlowBPConfig(late_bias=-1.0),
        lambda: FlowBPConfig(rescale=-1.0),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UserError):
        make()
