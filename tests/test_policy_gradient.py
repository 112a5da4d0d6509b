"""The policy gradients' promises: the papers' formulas, special cases in which they meet, the trained window, the anchor."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objectives import GUIDANCE, REVERSE, flow_policy
from torch import Tensor

from diffusionrl.algorithms import DDPO, GRPO, DiffusionRL
from diffusionrl.api import diagnose, train
from diffusionrl.config import (
    DDPOConfig,
    DiffusionRLConfig,
    EvaluationConfig,
    FlowDPPOConfig,
    GRPOConfig,
    GRPOFastConfig,
    MixGRPOConfig,
    OptimizerConfig,
    PolicyConfig,
    SamplingConfig,
    TempFlowConfig,
    TrainConfig,
    WindowConfig,
)
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import UserError
from diffusionrl.policies.pipeline import PipelinePolicy
from diffusionrl.rewards import Scores
from diffusionrl.sampling.rollout import Rollout, collect, make_table
from diffusionrl.training.optimization import accumulate_gradient
from diffusionrl.transitions import SamplerTable, cps, flow_grid, gaussian_kl, ode

STEPS = 4
SAMPLERS = {
    "flow": SamplingConfig(STEPS, GUIDANCE, "flow_grpo", 0.7, batch_size=4),
    "unet": SamplingConfig(STEPS, GUIDANCE, "ddim", 1.0, batch_size=4),
}


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, object]]) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def flow() -> PipelinePolicy:
    return flow_policy(STEPS, GUIDANCE)


@contextmanager
def moved(policy: Any, by: float, seed: int) -> Iterator[None]:
    """The policy, somewhere else; afterwards as it was."""
    before = {name: weight.detach().clone() for name, weight in policy.trainable().items()}
    for index, weight in enumerate(policy.trainable().values()):
        weight.data.add_(by * torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * seed + index)))
    yield
    for name, weight in policy.trainable().items():
        weight.data.copy_(before[name])


def drawn(policy: Any, algorithm: Any, world: str = "flow", invalid: Sequence[int] = (), step: int = 1) -> Rollout:
    """Two groups of four of one prompt, with scores at random."""
    prompts, sampling = [Prompt("a cat")] * 8, SAMPLERS[world]
    found = collect(
        policy,
        brightness,
        prompts,
        sampling,
        0,
        "test",
        step,
        algorithm.logprob_reduction,
        algorithm.needs,
        group_size=4,
        table=algorithm.table(make_table(policy, sampling), 0, step),
        shared_start=algorithm.shared_start,
    )
    valid = torch.tensor([i not in invalid for i in range(8)])
    values = torch.randn(8, generator=torch.Generator().manual_seed(3))
    return replace(found, scores=Scores(values.where(valid, torch.tensor(float("nan"))), valid))


def rows_of(algorithm: Any, rollout: Rollout) -> Tensor:
    return torch.cat(list(algorithm.updates(rollout, torch.zeros(8), 0, 1)))


def gradient(algorithm: Any, policy: Any, rollout: Rollout, rows: Tensor | None = None) -> Tensor:
    advantages = algorithm.advantages(rollout)
    for weight in policy.trainable().values():
        weight.grad = None
    accumulate_gradient(algorithm, policy, rollout, rows_of(algorithm, rollout) if rows is None else rows, advantages)
    found = torch.cat([weight.grad.flatten() for weight in policy.trainable().values() if weight.grad is not None])
    for weight in policy.trainable().values():
        weight.grad = None
    return found


def alike(one: Tensor, other: Tensor, within: float) -> bool:
    """Two gradients, relative to the longer one."""
    return bool((one - other).norm() <= within * max(one.norm(), other.norm())) and bool(other.norm() > 0)


# The papers' formulas, by independent code in float64


def means(policy: Any, rollout: Rollout, rows: Tensor) -> Tensor:
    """Of the steps of some rows, by the table in docs/transitions.md."""
    sample, step = rows.unbind(1)
    grid = rollout.table.grid
    with torch.no_grad():
        x0, noise = policy.denoise(
            rollout.latents[sample, step], grid.levels[step], [rollout.prompts[i] for i in sample.tolist()], GUIDANCE
        )
    return wide(grid.alpha_next[step], x0) * x0.double() + wide(rollout.table.kept[step], x0) * noise.double()


def wide(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.double().view(-1, *[1] * (like.ndim - 1))


def mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def clipped(a: Tensor, ratio: Tensor, clip: float) -> Tensor:
    return torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip))


def grpo(p: dict[str, Tensor], a: Tensor) -> Tensor:
    kl = mean((p["new"] - p["reference"]) ** 2 / (2 * wide(p["fresh"], p["new"]) ** 2))
    return clipped(a, p["ratio"], 3e-4) + 0.04 * kl


def plain(p: dict[str, Tensor], a: Tensor) -> Tensor:
    return clipped(a, p["ratio"], 3e-4)


def guard(p: dict[str, Tensor], a: Tensor) -> Tensor:
    """In the form without a log-probability: the drawn noise along the way that the mean moved."""
    return clipped(a, mean((p["new"] - p["old"]) * p["z"]).exp(), 1e-4) / p["dt"]


def dppo(p: dict[str, Tensor], a: Tensor) -> Tensor:
    divergence = mean((p["new"] - p["old"]) ** 2) / (2 * p["fresh"] ** 2 / p["dt"])
    worse = ((a > 0) & (p["ratio"] > 1)) | ((a < 0) & (p["ratio"] < 1))
    return -a * p["ratio"] * ~((divergence >= 1e-4) & worse)


def tempflow(p: dict[str, Tensor], a: Tensor) -> Tensor:
    return 2.25 * p["fresh"] * clipped(a, p["ratio"], 3e-3)


FORMULAS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "grpo": (grpo, {"clip_range": 3e-4}),
    "grpo-fast": (plain, {"clip_range": 3e-4}),
    "mixgrpo": (plain, {"clip_range": 3e-4}),
    "grpo-guard": (guard, {"clip_range": 1e-4}),
    "flow-dppo": (dppo, {"divergence": 1e-4}),
    "tempflow": (tempflow, {"clip_range": 3e-3}),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_is_the_papers(flow: PipelinePolicy, name: str) -> None:
    formula, settings = FORMULAS[name]
    algorithm = REVERSE[name](**settings)
    with moved(flow, 0.05, 1):
        rollout = drawn(flow, algorithm)
        rows, advantages = rows_of(algorithm, rollout), algorithm.advantages(rollout)
        sample, step = rows.unbind(1)
        old, table = means(flow, rollout, rows), rollout.table
        fresh, dt = table.fresh[step].double(), (table.grid.sigma - table.grid.sigma_next)[step].double()
        x = rollout.latents[sample, step + 1].double()
        with moved(flow, 0.1, 2):
            new = means(flow, rollout, rows)
            with flow.reference():
                reference = means(flow, rollout, rows)
            found, figures = algorithm.losses(flow, rollout, rows, advantages[sample])
    variance = 2 * wide(fresh, x) ** 2
    ratio = mean(((x - old) ** 2 - (x - new) ** 2) / variance).exp()
    parts = {"new": new, "old": old, "reference": reference, "z": (x - old) / wide(fresh, x)}
    expected = formula(parts | {"ratio": ratio, "fresh": fresh, "dt": dt}, advantages[sample].double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)
    assert 0 < figures["policy/clip_fraction"].mean() < 1, "on both sides of the clip, or nothing is shown"
    assert ("policy/kl_from_reference" in figures) == (name == "grpo")


class Chain:
    """x' ~ N(alpha' * theta + kept * x, fresh^2) in one dimension, with a reference of its own."""

    device, latent_shape, edits = torch.device("cpu"), (1,), False

    def __init__(self, theta: float, reference: float) -> None:
        self.theta, self.at_start = torch.nn.Parameter(torch.tensor(theta)), reference

    def denoise(self, x: Tensor, *unused: object) -> tuple[Tensor, Tensor]:
        return self.theta.expand_as(x), x

    @contextmanager
    def reference(self) -> Iterator[None]:
        kept = self.theta.data.clone()
        self.theta.data.fill_(self.at_start)
        yield
        self.theta.data.copy_(kept)


def test_the_anchor_of_a_gaussian_chain_has_its_closed_form() -> None:
    """Without advantages, the loss is weight * (alpha' * (theta - theta_ref))^2 / (2 * fresh^2), and its gradient follows."""
    table = cps(flow_grid(5), 0.8)
    policy = Chain(0.7, 0.2)
    latents = torch.randn(3, 6, 1, generator=torch.Generator().manual_seed(0))
    scores = Scores(torch.zeros(3), torch.ones(3, dtype=torch.bool))
    rollout = Rollout(table, [Prompt("")] * 3, latents, torch.zeros(3, 5), latents, scores, {})
    pairs = torch.cartesian_prod(torch.arange(3), table.stochastic)
    found, figures = GRPO(GRPOConfig(kl_weight=0.3), 1.0).losses(policy, rollout, pairs, torch.zeros(12))  # type: ignore[arg-type]
    alpha, fresh = table.alpha_next[pairs[:, 1]], table.fresh[pairs[:, 1]]
    kl = (alpha * 0.5) ** 2 / (2 * fresh**2)
    torch.testing.assert_close(figures["policy/kl_from_reference"], kl)
    torch.testing.assert_close(
        figures["policy/kl_from_reference"], gaussian_kl(alpha[:, None] * 0.7, alpha[:, None] * 0.2, fresh[:, None])
    )
    torch.testing.assert_close(found, 0.3 * kl)
    found.sum().backward()
    assert policy.theta.grad is not None
    torch.testing.assert_close(policy.theta.grad, (0.3 * alpha**2 * 0.5 / fresh**2).sum())
    assert policy.theta.item() == pytest.approx(0.7)


# Where they meet


@pytest.mark.parametrize("world", SAMPLERS)
@pytest.mark.parametrize("name", REVERSE)
def test_before_the_first_update_the_ratio_is_1_and_nothing_is_clipped(
    make_policy: Any, flow: PipelinePolicy, name: str, world: str
) -> None:
    """Exactly, where an update is cut as the rollout was; so the loss is -A, with the paper's weight of the step."""
    policy: Any = flow if world == "flow" else make_policy(lora_rank=2)
    algorithm = REVERSE[name](**{} if name == "tempflow" else {"kl_weight": 0.0})
    with moved(policy, 0.05, 1):
        rollout = drawn(policy, algorithm, world)
        for step in rollout.table.stochastic.tolist():
            rows = torch.stack([torch.arange(4), torch.full((4,), step)], 1)
            advantage = torch.tensor([1.0, -1.0, 0.5, 0.0])
            found, figures = algorithm.losses(policy, rollout, rows, advantage)
            assert figures["ratio_gap"].max() == 0 and not figures["policy/clip_fraction"].any()
            fall = rollout.table.grid.sigma[step] - rollout.table.grid.sigma_next[step]
            weight = {"grpo-guard": 1 / fall, "tempflow": 2.25 * rollout.table.fresh[step]}.get(name, torch.tensor(1.0))
            torch.testing.assert_close(found, -advantage * weight)


def test_grpo_with_one_update_is_reinforce(flow: PipelinePolicy) -> None:
    algorithm = REVERSE["grpo"](kl_weight=0.0, updates_per_step=1)
    score = DDPO(DDPOConfig(variant="sf", updates_per_step=1, normalisation="group-mean"), GUIDANCE)
    with moved(flow, 0.05, 1):
        rollout = drawn(flow, algorithm)
        assert alike(gradient(algorithm, flow, rollout), gradient(score, flow, rollout), 1e-5)


def test_grpo_without_anchor_is_ddpo(make_policy: Any) -> None:
    """The same rows in the same updates and the same gradient, to the bit, also where the ratio is not 1."""
    policy = make_policy(lora_rank=2)
    ours = REVERSE["grpo"](kl_weight=0.0, clip_range=1e-3)
    ddpo = DDPO(DDPOConfig(normalisation="group-mean", updates_per_step=2, clip_range=1e-3), GUIDANCE)
    rollout = drawn(policy, ours, "unet")
    assert torch.equal(rows_of(ours, rollout), rows_of(ddpo, rollout))
    with moved(policy, 0.02, 1):
        assert torch.equal(gradient(ours, policy, rollout), gradient(ddpo, policy, rollout))


def test_flow_dppo_without_a_threshold_is_importance_sampling(flow: PipelinePolicy) -> None:
    free, held = (REVERSE["flow-dppo"](divergence=divergence) for divergence in (math.inf, 1e-12))
    rollout = drawn(flow, free)
    advantages, rows = free.advantages(rollout), rows_of(free, rollout)
    with moved(flow, 0.05, 1):
        ratio = 1 + free.losses(flow, rollout, rows, torch.ones(len(rows)))[1]["ratio_gap"]
        losses, figures = free.losses(flow, rollout, rows, torch.ones(len(rows)))
        torch.testing.assert_close((-losses - 1).abs(), ratio - 1, rtol=1e-5, atol=1e-7)
        assert not figures["policy/clip_fraction"].any() and ratio.max() > 1
        unclipped = DDPO(DDPOConfig(normalisation="group-mean", clip_range=1e6), GUIDANCE)
        assert alike(gradient(free, flow, rollout), gradient(unclipped, flow, rollout, rows), 1e-5)
        masked = held.losses(flow, rollout, rows, advantages[rows[:, 0]])[1]["policy/clip_fraction"]
        assert 0 < masked.mean() < 1, "those that come back stay"


# The trained window


@given(
    st.integers(4, 12),
    st.integers(1, 4),
    st.sampled_from(["frozen", "random", "progressive"]),
    st.sampled_from([(0.0, 1.0), (0.0, 0.5), (0.4, 1.0)]),
    st.integers(1, 60),
)
def test_a_window_is_a_few_steps_in_a_row_inside_its_part(
    steps: int, size: int, moves: Any, within: tuple[float, float], step: int
) -> None:
    window = WindowConfig(size, moves, within, every=2)
    whole = cps(flow_grid(steps), 0.7)
    algorithm = GRPO(GRPOConfig(window=window), 1.0)
    rows = whole.stochastic
    assert len(rows) == steps - 1
    first, end = (round(edge * len(rows)) for edge in within)
    if size > end - first:
        with pytest.raises(UserError, match=r"algorithm\.window\.size is"):
            algorithm.table(whole, 0, step)
        return
    found = algorithm.table(whole, 0, step)
    trained = found.stochastic
    assert len(trained) == size and torch.equal(trained, trained[0] + torch.arange(size))
    assert set(trained.tolist()) <= set(rows[first:end].tolist())
    euler, outside = ode(whole.grid), torch.ones(steps, dtype=torch.bool).index_fill(0, trained, False)
    assert torch.equal(found.kept[outside], euler.kept[outside]) and not found.fresh[outside].any()
    assert torch.equal(found.kept[trained], whole.kept[trained]) and torch.equal(found.fresh[trained], whole.fresh[trained])
    assert torch.equal(algorithm.table(whole, 0, step).fresh, found.fresh)


def places(window: WindowConfig, steps: int = 12) -> list[int]:
    algorithm, whole = GRPO(GRPOConfig(window=window), 1.0), cps(flow_grid(7), 0.7)
    return [int(algorithm.table(whole, 0, step).stochastic[0]) for step in range(1, steps + 1)]


def test_windows_move_as_named() -> None:
    assert places(WindowConfig(3)) == [0] * 12
    assert places(WindowConfig(3, "progressive", every=2)) == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1]
    assert places(WindowConfig(3, "progressive", stride=2, every=3)) == [0, 0, 0, 2, 2, 2, 0, 0, 0, 2, 2, 2]
    drawn = places(WindowConfig(3, "random"), 60)
    assert set(drawn) == {0, 1, 2, 3} and drawn[:12] != sorted(drawn[:12])


def test_no_window_leaves_the_sampler_as_it_is() -> None:
    whole = cps(flow_grid(4), 0.7)
    assert GRPO(GRPOConfig(), 1.0).table(whole, 0, 1) is whole


def test_outside_the_window_samples_follow_the_ode(flow: PipelinePolicy) -> None:
    algorithm = REVERSE["mixgrpo"]()
    rollout = drawn(flow, algorithm, step=2)
    inside = rollout.table.stochastic.tolist()
    assert inside == [1, 2]
    euler = replace(rollout, table=ode(rollout.table.grid))
    for step in range(STEPS):
        rows = torch.stack([torch.arange(8), torch.full((8,), step)], 1)
        follows = torch.allclose(means(flow, euler, rows).float(), rollout.latents[:, step + 1], atol=1e-5)
        assert follows == (step not in inside)
        assert rollout.log_probs[:, step].any() == (step in inside)
    assert set(rows_of(algorithm, rollout)[:, 1].tolist()) == set(inside)


def test_branches_share_their_prefix_and_are_compared_with_each_other(flow: PipelinePolicy) -> None:
    algorithm = REVERSE["tempflow"]()
    rollout = drawn(flow, algorithm, step=2)
    (branch,) = rollout.table.stochastic.tolist()
    groups = rollout.latents.view(2, 4, *rollout.latents.shape[1:])
    for step in range(STEPS + 1):
        apart = (groups[:, 1:, step] - groups[:, :1, step]).flatten(2).abs().amax(2)
        assert apart.max() < 1e-5 if step <= branch else apart.min() > 1e-3, step
    assert (groups[0, 0, 0] - groups[1, 0, 0]).abs().max() > 1e-3
    rewards = rollout.scores.values.view(2, 4)  # of one prompt, in two groups
    expected = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(algorithm.advantages(rollout), expected.flatten(), rtol=1e-4, atol=1e-5)


def test_training_samples_with_the_window_and_evaluation_with_the_whole_sampler(
    make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusionrl.sampling import rollout as sampling

    seen: list[int] = []
    honest = sampling.sample_trajectories

    def look(policy: Any, table: SamplerTable, *arguments: Any) -> Any:
        seen.append(len(table.stochastic))
        return honest(policy, table, *arguments)

    monkeypatch.setattr(sampling, "sample_trajectories", look)
    algorithm = MixGRPOConfig(window=WindowConfig(1, "progressive", every=1))
    train(small(tmp_path / "run", algorithm), policy=make_policy(lora_rank=2), reward=brightness, prompts=["a cat"])
    assert seen == [STEPS, 1, 1, STEPS]  # before, two steps, after


@pytest.mark.parametrize("name", ["grpo-fast", "grpo-guard", "flow-dppo", "tempflow"])
def test_the_doctor_tries_them_as_they_train(make_policy: Any, tmp_path: Path, name: str) -> None:
    optimizer = OptimizerConfig(learning_rate=1e-3)
    config = small(tmp_path / "run", REVERSE[name]().settings, optimizer=optimizer, samples_per_prompt=4)
    found = {}
    for finding in diagnose(config, make_policy(lora_rank=2), brightness, ["a cat", "a dog"]):
        found[finding.check] = finding.verdict
        if finding.check == "reference":
            break
    assert {found[check] for check in ("ratio", "policy", "reference")} == {"pass"}, found


# Updates


@pytest.mark.parametrize("name", REVERSE)
def test_cutting_the_update_changes_no_gradient(flow: PipelinePolicy, name: str) -> None:
    rollout = drawn(flow, REVERSE[name]())
    with moved(flow, 0.001, 1):
        whole, cut = (gradient(REVERSE[name](micro_batch_size=size), flow, rollout) for size in (64, 3))
    assert alike(cut, whole, 1e-4)


@pytest.mark.parametrize("name", REVERSE)
def test_invalid_samples_leave_the_loss_exactly(flow: PipelinePolicy, name: str) -> None:
    """Whatever an invalid sample is: the gradient is the same to the bit."""
    algorithm = REVERSE[name]()
    rollout = drawn(flow, algorithm, invalid=[1, 6])
    spoilt = rollout.latents.clone()
    spoilt[[1, 6]] = float("inf")
    with moved(flow, 0.001, 1):
        assert torch.equal(gradient(algorithm, flow, rollout), gradient(algorithm, flow, replace(rollout, latents=spoilt)))


# Bad input


def small(run_dir: Path, algorithm: Any, **more: Any) -> TrainConfig:
    settings: dict[str, Any] = {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 2, "run_dir": run_dir}
    evaluation = EvaluationConfig(every=0, num_samples=2)
    return TrainConfig(**settings | {"sampling": SAMPLERS["unet"], "algorithm": algorithm, "evaluation": evaluation} | more)


def test_a_window_longer_than_the_sampler_is_refused_with_the_configuration() -> None:
    with pytest.raises(UserError, match=r"algorithm\.window\.size is 2, but algorithm\.window\.within leaves 1 of the 3 steps"):
        TrainConfig(
            samples_per_prompt=2,
            algorithm=GRPOFastConfig(window=WindowConfig(2, "random", (0.0, 0.4))),
            sampling=replace(SAMPLERS["flow"], num_steps=3),
        )


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        (MixGRPOConfig(window=WindowConfig(4)), r"leaves 3 of the 3 steps of the sampler that have fresh noise"),
        (
            DiffusionRLConfig(timesteps_per_step=2, window=WindowConfig(1)),
            r"timesteps_per_step is 2, but only 1 steps",
        ),
    ],
)
def test_a_window_of_steps_without_fresh_noise_is_refused_before_anything_is_written(
    make_policy: Any, tmp_path: Path, algorithm: Any, said: str
) -> None:
    """Of these 4 steps the last one has none."""
    policy = make_policy({"steps_offset": 0, "set_alpha_to_one": True}, lora_rank=2)
    with pytest.raises(UserError, match=said):
        train(small(tmp_path / "run", algorithm), policy=policy, reward=brightness, prompts=["a cat"])
    assert not (tmp_path / "run").exists()


def test_an_anchor_that_full_fine_tuning_does_not_keep_is_named_at_once(make_policy: Any, tmp_path: Path) -> None:
    config = small(tmp_path / "run", GRPOConfig(), policy=PolicyConfig(training="full"))
    with pytest.raises(UserError, match="algorithm grpo leans on the reference model: full fine-tuning keeps no reference"):
        train(config, policy=make_policy(lora_rank=None), reward=brightness, prompts=["a cat"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: WindowConfig(-1),
        lambda: WindowConfig(within=(0.6, 0.2)),
        lambda: WindowConfig(stride=0),
        lambda: WindowConfig(every=0),
        lambda: GRPOConfig(kl_weight=-0.1),
        lambda: FlowDPPOConfig(divergence=0.0),
        lambda: TempFlowConfig(normalisation="prompt"),
        lambda: TempFlowConfig(window=WindowConfig()),
        lambda: TempFlowConfig(noise_weight=0.0),
        lambda: TrainConfig(algorithm=GRPOConfig()),
        lambda: TrainConfig(algorithm=GRPOConfig(), samples_per_prompt=3, prompts_per_step=1),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UserError):
        make()


def test_diffusionrl_draws_its_steps_from_the_window() -> None:
    algorithm = DiffusionRL(DiffusionRLConfig(window=WindowConfig(3), timesteps_per_step=2), GUIDANCE)
    assert algorithm.table(cps(flow_grid(8), 0.7), 0, 1).stochastic.tolist() == [0, 1, 2]
