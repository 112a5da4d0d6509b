"""The forward-process objectives' promises: the papers' formulas, special cases in which they meet, and the trainer's part."""

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
from objectives import FORWARD, flow_policy
from torch import Tensor

from diffusionrl.algorithms import NFT, ORW, RWR
from diffusionrl.algorithms.forward_process import BEHAVIOUR, ForwardProcess, noised
from diffusionrl.api import train
from diffusionrl.config import (
    DGPOConfig,
    EPGConfig,
    EvaluationConfig,
    NFTConfig,
    OptimizerConfig,
    ORWConfig,
    PolicyConfig,
    RAMConfig,
    RWRConfig,
    SamplingConfig,
    TrainConfig,
)
from diffusionrl.config.algorithms import CopySchedule
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import UserError
from diffusionrl.policies.pipeline import PipelinePolicy
from diffusionrl.rewards import Scores
from diffusionrl.runs.checkpoint import folder_of
from diffusionrl.runs.folder import read_metrics
from diffusionrl.sampling.rollout import Rollout, collect
from diffusionrl.training.optimization import accumulate_gradient

SAMPLING = SamplingConfig(num_steps=3, guidance=1.0, sampler="ode", eta=0.0, batch_size=4)


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, object]]) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def flow() -> PipelinePolicy:
    return flow_policy(3)


def moved(policy: Any, by: float, seed: int) -> None:
    for index, weight in enumerate(policy.trainable().values()):
        weight.data.add_(by * torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * seed + index)))


@contextmanager
def learned(policy: Any, copies: Sequence[str]) -> Iterator[None]:
    """The policy, away from its reference and, by another step, from its older copies; afterwards as it was."""
    before = {name: weight.detach().clone() for name, weight in policy.trainable().items()}
    moved(policy, 0.05, 1)
    for name in copies:
        policy.copies.follow(name)
        moved(policy, 0.02, 2)
    yield
    policy.copies.load({}, lambda like, tensor: tensor)
    for name, weight in policy.trainable().items():
        weight.data.copy_(before[name])


@pytest.fixture(params=["velocity", "noise"])
def policy(request: Any, make_policy: Any, flow: PipelinePolicy) -> Any:
    """A linear flow, whose velocity is regressed; and a model whose noise is."""
    return flow if request.param == "velocity" else make_policy(lora_rank=2)


def endpoints(policy: Any, groups: int = 2, size: int = 4, invalid: Sequence[int] = ()) -> Rollout:
    prompts = [Prompt(text) for text in ("a cat", "a dog") * groups][:groups]
    asked = [prompt for prompt in prompts for _ in range(size)]
    found = collect(policy, brightness, asked, SAMPLING, 0, "test", 1, needs="endpoints", group_size=size)
    valid = torch.tensor([i not in invalid for i in range(len(asked))])
    values = torch.randn(len(asked), generator=torch.Generator().manual_seed(3))
    return replace(found, scores=Scores(values.where(valid, torch.tensor(float("nan"))), valid))


def gradient(algorithm: Any, policy: Any, rollout: Rollout) -> Tensor:
    advantages = algorithm.advantages(rollout)
    for weight in policy.trainable().values():
        weight.grad = None
    accumulate_gradient(algorithm, policy, rollout, next(algorithm.updates(rollout, advantages, 0, 1)), advantages)
    found = torch.cat([weight.grad.flatten() for weight in policy.trainable().values() if weight.grad is not None])
    for weight in policy.trainable().values():
        weight.grad = None
    return found


def alike(one: Tensor, other: Tensor, within: float) -> bool:
    """Two gradients, relative to the longer one."""
    return bool((one - other).norm() <= within * max(one.norm(), other.norm())) and bool(other.norm() > 0)


# Fresh noise levels


def test_noisy_samples_are_those_of_the_pipelines_own_schedulers(make_policy: Any, flow: PipelinePolicy) -> None:
    for policy in (make_policy(), flow):
        clean = torch.randn(6, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        at = noised(policy, clean, [Prompt("a cat")] * 6, range(6), [0, 1, 2] * 2, 3)
        if policy is flow:
            assert at.linear
            sigma = (at.levels.timesteps / 1000).view(-1, *[1] * (clean.ndim - 1))
            expected, target = sigma * at.true.noise + (1 - sigma) * clean, at.true.noise - clean
        else:
            assert not at.linear
            expected = policy.pipeline.scheduler.add_noise(clean, at.true.noise, at.levels.timesteps.long())
            target = at.true.noise
        torch.testing.assert_close(at.x, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(at.output(at.true), target)


@given(st.integers(1, 6), st.tuples(st.floats(0, 0.4), st.floats(0.6, 1)), st.integers(0, 2**40))
def test_levels_are_stratified_and_0_is_the_noisy_end(count: int, within: tuple[float, float], draw: int) -> None:
    policy = tiny_levels()
    at = noised(policy, torch.zeros(count, 1), [Prompt("")] * count, [draw] * count, range(count), count, within)
    places = ((1 - at.levels.sigma) * 200).round() / 200
    for part, place in enumerate(places.tolist()):
        low, high = (within[0] + (within[1] - within[0]) * (part + edge) / count for edge in (0, 1))
        assert low - 1 / 200 <= place <= high


def tiny_levels() -> Any:
    from types import SimpleNamespace

    from diffusionrl.transitions import NoiseLevels

    sigma = 1 - torch.arange(200) / 200
    return SimpleNamespace(noise_levels=NoiseLevels(1000 * sigma, 1 - sigma, sigma))


def test_a_group_shares_its_noise_and_an_update_takes_whole_groups() -> None:
    algorithm = NFT(NFTConfig(noisings=3, updates_per_step=2), 1.0)
    scores = Scores(torch.zeros(20), torch.arange(20) != 7)
    nothing = torch.zeros(0)
    rollout = Rollout(None, [Prompt("")] * 20, nothing, nothing, nothing, scores, {}, group_size=4)  # type: ignore[arg-type]
    updates = list(algorithm.updates(rollout, nothing, 0, 1))
    groups = [set((rows[:, 0] // 4).tolist()) for rows in updates]
    assert sorted(map(len, groups)) == [2, 3] and not groups[0] & groups[1]
    rows = torch.cat(updates)
    assert len(rows) == 3 * 19 and 7 not in rows[:, 0]
    for group in range(5):
        draws = rows[rows[:, 0] // 4 == group]
        assert len(set(draws[:, 2].tolist())) == 3  # one a part, the same for all
    assert torch.equal(rows, torch.cat(list(algorithm.updates(rollout, nothing, 0, 1))))
    assert not torch.equal(rows, torch.cat(list(algorithm.updates(rollout, nothing, 0, 2))))


# The papers' formulas, by independent code in float64


def parts_of(policy: Any, algorithm: ForwardProcess, rollout: Rollout, rows: Tensor) -> dict[str, Tensor]:
    """x0 and what is regressed, of the truth and of all who are asked, row by row, float64."""
    at = algorithm.noised(policy, rollout, rows)

    def asked() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            x0, noise = policy.denoise(at.x, at.levels, at.prompts, None)
        return x0.double(), (noise - x0 if at.linear else noise).double()

    clean, noise = at.true.x0.double(), at.true.noise.double()
    found = {"clean": clean, "v": noise - clean if at.linear else noise, "s": at.levels.sigma.double()}
    found["own_x0"], found["own"] = asked()
    for name in algorithm.copies:
        with policy.copies.used(name):
            found[f"{name}_x0"], found[name] = asked()
    with policy.reference():
        found["reference_x0"], found["reference"] = asked()
    return found


def square(values: Tensor) -> Tensor:
    return (values**2).flatten(1).mean(1)


def absolute(values: Tensor) -> Tensor:
    return values.abs().flatten(1).mean(1)


def wide(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.view(-1, *[1] * (like.ndim - 1))


def nft(p: dict[str, Tensor], a: Tensor) -> Tensor:
    good = (a / 5 / 2 + 0.5).clamp(0, 1)
    plus = (1 - 0.5) * p["older_x0"] + 0.5 * p["own_x0"] - p["clean"]
    minus = (1 + 0.5) * p["older_x0"] - 0.5 * p["own_x0"] - p["clean"]
    losses = good * square(plus) / absolute(plus) + (1 - good) * square(minus) / absolute(minus)
    return losses * 5 / 0.5 + 1e-4 * square(p["own"] - p["reference"])


def awm(p: dict[str, Tensor], a: Tensor) -> Tensor:
    def log_likelihood(v: Tensor) -> Tensor:
        return -p["s"] * 4 * ((square(v - p["v"]) + 1e-10) ** 0.25 - 1e-10**0.25)

    ratio = (log_likelihood(p["own"]) - log_likelihood(p["behaviour"])).exp()
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.999, 1.001))
    return loss + square(p["own"] - p["older"]) + 1e-3 * square(p["own"] - p["reference"])


def ram(p: dict[str, Tensor], a: Tensor) -> Tensor:
    return square(p["own"] - p["reference"] - 100 * wide(a, p["v"]) * (p["v"] - p["older"]))


def flow_awr(p: dict[str, Tensor], a: Tensor) -> Tensor:
    target = p["older"] + wide(a, p["v"]) * (p["v"] - p["older"])
    return square(p["own"] - target) + 1e-4 * square(p["own"] - p["reference"])


def v_grpo(p: dict[str, Tensor], a: Tensor) -> Tensor:
    def bound(x0: Tensor) -> Tensor:
        return square(x0 - p["clean"]) / absolute(x0 - p["clean"])

    ratio = (bound(p["behaviour_x0"]) - bound(p["own_x0"])).exp()
    return torch.maximum(-a * ratio, -a * ratio.clamp(0.99, 1.01)) + 0.5 * square(p["own_x0"] - p["behaviour_x0"])


def epg(p: dict[str, Tensor], a: Tensor) -> Tensor:
    own, old = -square(p["own"] - p["v"]), -square(p["behaviour"] - p["v"])
    return -(own - old).exp() * a * own


FORMULAS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "nft": (nft, {"mixing": 0.5}),
    "awm": (awm, {"updates_per_step": 2, "clip_range": 1e-3}),
    "ram": (ram, {}),
    "flow-awr": (flow_awr, {}),
    "v-grpo": (v_grpo, {"updates_per_step": 2, "clip_range": 0.01, "behaviour_weight": 0.5}),
    "epg": (epg, {"updates_per_step": 2}),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_is_the_papers(policy: Any, name: str) -> None:
    formula, settings = FORMULAS[name]
    algorithm = FORWARD[name](**settings)
    with learned(policy, list(algorithm.copies)):
        rollout = endpoints(policy)
        advantages = algorithm.advantages(rollout)
        rows = next(algorithm.updates(rollout, advantages, 0, 1))
        weights = algorithm.weights(policy, rollout, rows, advantages)
        found, figures = algorithm.losses(policy, rollout, rows, weights)
        parts = parts_of(policy, algorithm, rollout, rows)
        expected = formula(parts, weights.double())
        torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(
            figures["policy/denoising_loss"].double(), square(parts["own"] - parts["v"]), rtol=1e-4, atol=1e-6
        )
        assert set(algorithm.copies) == {key.removeprefix("policy/distance_from_") for key in figures} - {
            "policy/denoising_loss",
            "reference",
        }


def test_flow_awr_weighs_by_a_softmax_over_the_group(flow: PipelinePolicy) -> None:
    rollout = endpoints(flow, invalid=[1])
    found, rewards = FORWARD["flow-awr"]().advantages(rollout), rollout.scores.values.double()
    spread = rewards[rollout.scores.valid].std(correction=0)
    expected = 3 * (rewards[[0, 2, 3]] / spread).softmax(0) - 1
    torch.testing.assert_close(found[[0, 2, 3]].double(), expected, rtol=1e-5, atol=1e-6)
    assert found[1] == 0
    torch.testing.assert_close(found[4:].sum(), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_v_grpo_bends_advantages_and_epg_only_centres_them(flow: PipelinePolicy) -> None:
    rollout = endpoints(flow)
    rewards = rollout.scores.values.view(2, 4)
    centred = (rewards - rewards.mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(FORWARD["epg"]().advantages(rollout), centred, rtol=1e-5, atol=1e-6)
    plain = centred / rewards.std(correction=0)
    torch.testing.assert_close(FORWARD["v-grpo"]().advantages(rollout), 3 * (plain / 3).tanh(), rtol=1e-4, atol=1e-5)


# Where they meet


def whole_loss(algorithm: ForwardProcess, policy: Any, rollout: Rollout, of: Callable[..., Tensor]) -> Tensor:
    """The gradient of a loss of all errors of an update at once, by autograd alone."""
    advantages = algorithm.advantages(rollout)
    rows = next(algorithm.updates(rollout, advantages, 0, 1))
    at = algorithm.noised(policy, rollout, rows)
    own = at.error(at.ask(policy, None)).double()
    parts = parts_of(policy, algorithm, rollout, rows)
    loss = of(own, {name: square(parts[name] - parts["v"]) for name in parts if parts[name].shape == parts["v"].shape}, rows)
    found = torch.autograd.grad(loss, list(policy.trainable().values()), allow_unused=True)
    return torch.cat([each.flatten() for each in found if each is not None])


def test_nft_begins_as_a_regression_weighted_by_reward(policy: Any) -> None:
    """At the copy, its gradient is that of (2r - 1) times the relative error: good samples attract, bad ones repel."""
    algorithm = FORWARD["nft"](reference_weight=0.0)
    with learned(policy, []):
        policy.copies.follow("older")
        rollout = endpoints(policy)
        found = gradient(algorithm, policy, rollout)
        advantages = algorithm.advantages(rollout)

        def regression(own: Tensor, others: dict[str, Tensor], rows: Tensor) -> Tensor:
            at = algorithm.noised(policy, rollout, rows)
            gap = at.ask(policy, None).x0 - rollout.latents[rows[:, 0], -1]
            return (advantages[rows[:, 0]] * square(gap) / absolute(gap).detach()).mean()

        assert alike(found, whole_loss(algorithm, policy, rollout, regression), 1e-4)


def test_dgpo_of_two_samples_is_diffusion_dpo(policy: Any) -> None:
    """Eq. 14 of arXiv 2311.12908, at one level and noise: -log sigmoid(-beta / 2 * (gain of the winner - of the loser))."""
    beta = 40.0
    algorithm = FORWARD["dgpo"](beta=beta)
    with learned(policy, []):
        rollout = endpoints(policy, groups=1, size=2)
        rollout = replace(rollout, scores=Scores(torch.tensor([-1.0, 1.0]), torch.tensor([True, True])))
        advantages = algorithm.advantages(rollout)
        torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0]), rtol=1e-5, atol=0)

        def dpo(own: Tensor, others: dict[str, Tensor], rows: Tensor) -> Tensor:
            gain = own - others["reference"]
            return -torch.nn.functional.logsigmoid(-beta / 2 * (gain[1::2] - gain[::2])).mean()

        found, expected = gradient(algorithm, policy, rollout), whole_loss(algorithm, policy, rollout, dpo)
        assert alike(found * beta, expected, 1e-4)  # DGPO's loss is not multiplied by beta; of two rows, the mean is half


def test_crd_has_the_gradient_of_the_centred_regression(policy: Any) -> None:
    algorithm = FORWARD["crd"](reference_weight=0.0, beta=30.0)
    with learned(policy, ["sampler", "older"]):
        rollout = endpoints(policy, invalid=[2])
        advantages = algorithm.advantages(rollout)

        def squares(own: Tensor, others: dict[str, Tensor], rows: Tensor) -> Tensor:
            implied, total = others["older"] - own, own.new_zeros(())
            for draw in set(rows[:, 2].tolist()):
                members = rows[:, 2] == draw
                centre = implied[members] - implied[members].mean()
                total = total + ((30.0 * centre - advantages[rows[members, 0]]) ** 2).sum()
            return total / len(rows)

        assert alike(gradient(algorithm, policy, rollout), whole_loss(algorithm, policy, rollout, squares), 1e-4)


@pytest.mark.parametrize("name", ["v-grpo", "epg"])
def test_with_one_update_the_ratio_is_1_and_the_policy_gradient_is_reinforces(policy: Any, name: str) -> None:
    algorithm = FORWARD[name]()
    with learned(policy, []):
        rollout = endpoints(policy)
        advantages = algorithm.advantages(rollout)

        def reinforce(own: Tensor, others: dict[str, Tensor], rows: Tensor) -> Tensor:
            if name == "epg":
                return (advantages[rows[:, 0]] * own).mean()
            gap = algorithm.noised(policy, rollout, rows).ask(policy, None).x0 - rollout.latents[rows[:, 0], -1]
            return (advantages[rows[:, 0]] * square(gap) / absolute(gap).detach()).mean()

        assert alike(gradient(algorithm, policy, rollout), whole_loss(algorithm, policy, rollout, reinforce), 1e-4)


def test_orw_without_its_anchor_is_reward_weighted_regression(policy: Any) -> None:
    orw = ORW(ORWConfig(noisings=1, reference_weight=0.0, inverse_temperature=0.7), 1.0)
    rwr = RWR(RWRConfig(normalisation="batch", inverse_temperature=0.7), 1.0)
    rollout = endpoints(policy, invalid=[5])
    weights = orw.advantages(rollout)
    torch.testing.assert_close(weights, rwr.advantages(rollout))
    rows = next(orw.updates(rollout, weights, 0, 1))
    given = orw.weights(policy, rollout, rows, weights)
    found, _ = orw.losses(policy, rollout, rows, given)
    expected, _ = rwr.losses(policy, rollout, rows[:, [0, 2]], given)
    torch.testing.assert_close(found, expected)


# Updates


@pytest.mark.parametrize("name", FORWARD)
def test_cutting_the_update_changes_no_gradient(policy: Any, name: str) -> None:
    with learned(policy, list(FORWARD[name]().copies)):
        rollout = endpoints(policy)
        whole, cut = (gradient(FORWARD[name](micro_batch_size=size), policy, rollout) for size in (64, 3))
        assert alike(cut, whole, 1e-5)


@pytest.mark.parametrize("name", FORWARD)
def test_invalid_samples_leave_the_loss_exactly(flow: PipelinePolicy, name: str) -> None:
    """Whatever an invalid sample is: the gradient is the same to the bit."""
    algorithm = FORWARD[name]()
    with learned(flow, list(algorithm.copies)):
        rollout = endpoints(flow, invalid=[1, 6])
        spoilt = rollout.latents.clone()
        spoilt[[1, 6]] = float("inf")
        assert torch.equal(gradient(algorithm, flow, rollout), gradient(algorithm, flow, replace(rollout, latents=spoilt)))


# The trainer's part


def small(run_dir: Path, algorithm: Any, **more: Any) -> TrainConfig:
    settings: dict[str, Any] = {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 2, "run_dir": run_dir}
    evaluation = EvaluationConfig(every=1, num_samples=2)
    return TrainConfig(**settings | {"sampling": SAMPLING, "algorithm": algorithm, "evaluation": evaluation} | more)


def test_the_copy_samples_and_follows_by_its_schedule(make_policy: Any, tmp_path: Path) -> None:
    """Step 2 is drawn by the weights that the copy has then: all of step 1's at decay 0, none of them at a decay near 1."""
    scored: dict[float, list[Tensor]] = {}
    for decay in (0.0, 0.999):
        images = scored.setdefault(decay, [])

        def look(seen: Tensor, prompts: Any, metadata: Any, images: list[Tensor] = images) -> Tensor:
            images.append(seen.clone())
            return torch.arange(len(seen)) % 2 + 0.0

        older = CopySchedule(start=decay, growth=0.0, limit=decay)
        config = small(tmp_path / str(decay), NFTConfig(noisings=1, older=older), optimizer=OptimizerConfig(learning_rate=0.1))
        config = replace(config, evaluation=EvaluationConfig(every=0, num_samples=2))
        train(config, policy=make_policy(), reward=look, prompts=["a cat"])
        assert [line["policy/decay_of_older"] for line in read_metrics(config.run_dir)[1:]] == [decay, decay]  # type: ignore[arg-type]
    moved, still = ([each for each in images if len(each) == 4] for images in scored.values())  # the two steps
    assert torch.equal(moved[0], still[0]) and not torch.equal(moved[1], still[1])
    assert not torch.equal(moved[0], moved[1])


@pytest.mark.parametrize(
    ("schedule", "decays"),
    [
        (CopySchedule(), [0, 0.001, 0.5]),
        (CopySchedule(0, 75, 0.0075, 0.999), [0, 0, 0.999]),
        (CopySchedule(0.25, 0, 0.005, 0.999), [0.25, 0.255, 0.999]),
    ],
)
def test_copies_decay_as_published(schedule: CopySchedule, decays: list[float]) -> None:
    assert [schedule(done) for done in (0, 1, 700)] == pytest.approx(decays)


def test_the_average_is_what_is_evaluated_and_exported(make_policy: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    algorithm = EPGConfig(noisings=1, updates_per_step=2)
    config = small(tmp_path / "run", algorithm, optimizer=OptimizerConfig(learning_rate=0.1, average=0.9))
    policy = make_policy()
    beginning = {name: weight.detach().clone() for name, weight in policy.trainable().items()}
    train(config, policy=policy, reward=brightness, prompts=["a cat"])
    checkpoint = folder_of(tmp_path / "run", 2)
    weights, average = load_file(checkpoint / "policy.safetensors"), load_file(checkpoint / "copies.safetensors")
    exported = load_file(tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors")
    for name, tensor in exported.items():
        key = next(key for key in beginning if key.replace(".default", "") == name.removeprefix("unet."))
        assert torch.equal(tensor, average[f"average/{key}"])
        assert not torch.equal(tensor, weights[key])
    assert set(average) == {f"average/{key}" for key in beginning} | {f"{BEHAVIOUR}/{key}" for key in beginning}
    assert math.isfinite(read_metrics(tmp_path / "run")[-1]["eval/reward"])


# Bad input


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"algorithm": NFTConfig(), "samples_per_prompt": 1}, "set samples_per_prompt above 1"),
        ({"algorithm": NFTConfig(updates_per_step=3), "samples_per_prompt": 2, "prompts_per_step": 2}, "belong to one update"),
    ],
)
def test_groups_that_cannot_be_compared_or_would_be_cut_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NFTConfig(noisings=0),
        lambda: NFTConfig(levels=(0.5, 0.5)),
        lambda: NFTConfig(mixing=0.0),
        lambda: NFTConfig(reference_weight=-1.0),
        lambda: CopySchedule(limit=1.0),
        lambda: DGPOConfig(beta=0.0),
        lambda: RAMConfig(reward_scale=0.0),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(UserError):
        make()


def test_a_reference_that_full_fine_tuning_does_not_keep_is_named_at_once(make_policy: Any, tmp_path: Path) -> None:
    config = small(tmp_path / "run", RAMConfig(), policy=PolicyConfig(training="full"))
    with pytest.raises(UserError, match="algorithm ram leans on the reference model: full fine-tuning keeps no reference"):
        train(config, policy=make_policy(lora_rank=None), reward=brightness, prompts=["a cat"])
    assert not (tmp_path / "run").exists()
