"""PSO's promises: the authors' losses, on the levels and steps of a short chain."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from objectives import FORWARD, flow_policy, pso
from test_forward_process import alike, brightness, endpoints, gradient, learned
from torch import Tensor

from diffusionrl import TrainConfig, UserError
from diffusionrl.algorithms.groups import both
from diffusionrl.config import OfflinePSOConfig, PSOConfig, SamplingConfig, WindowConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.policies.pipeline import PipelinePolicy
from diffusionrl.rewards import Scores
from diffusionrl.sampling.rollout import Rollout, collect, make_table

CHAIN = SamplingConfig(num_steps=4, guidance=2.0, sampler="renoise", batch_size=4)


@pytest.fixture(scope="module")
def flow() -> PipelinePolicy:
    return flow_policy(4)


@pytest.fixture(params=["flow", "stable diffusion"])
def policy(request: Any, make_policy: Any, flow: PipelinePolicy) -> Any:
    return flow if request.param == "flow" else make_policy(lora_rank=2)


def chains(policy: Any, invalid: tuple[int, ...] = ()) -> Rollout:
    prompts = [Prompt(text) for text in ("a cat", "a dog") for _ in range(4)]
    table = pso().table(make_table(policy, CHAIN), 0, 1)
    found = collect(policy, brightness, prompts, CHAIN, 0, "test", 1, group_size=4, table=table)
    valid = torch.tensor([i not in invalid for i in range(8)])
    return replace(found, scores=Scores(torch.randn(8, generator=torch.Generator().manual_seed(3)), valid))


def test_online_pso_is_the_authors_loss_on_all_steps_but_the_last(make_policy: Any) -> None:
    """Of re-noised chains, whose steps are N(sqrt(abar') * x0, 1 - abar')."""
    policy, algorithm = make_policy(lora_rank=2), pso(beta=3.0, clip_range=0.01, pairs_per_group=2)
    assert make_table(policy, CHAIN).fresh[-1] > 0, "this scheduler ends before there is no noise"
    signal = policy.pipeline.scheduler.alphas_cumprod.double()
    with learned(policy, []):
        rollout = chains(policy)
        assert rollout.table.fresh[-1] == 0
        advantages = algorithm.advantages(rollout)
        (rows,) = algorithm.updates(rollout, advantages, 0, 1)
        assert sorted(set(rows[:, 2].tolist())) == [0, 1, 2] and len(rows) == 2 * 2 * 3
        found, figures = algorithm.losses(policy, rollout, rows, advantages[rows[:, 0]])
        times = rollout.table.grid.timesteps.long().tolist()

        def log_prob(sample: int, step: int) -> Tensor:
            x, now = rollout.latents[sample : sample + 1, step], rollout.table.grid.levels[torch.tensor([step])]
            with torch.no_grad():
                x0, _ = policy.denoise(x, now, [rollout.prompts[sample]], 2.0)
            after = signal[times[step + 1]]
            gaussian = torch.distributions.Normal(after.sqrt() * x0[0].double(), (1 - after).sqrt())
            return gaussian.log_prob(rollout.latents[sample, step + 1].double()).mean()

        clipped = 0
        for (target, distance, step), loss in zip(rows.tolist(), found.tolist(), strict=True):
            logs = []
            for sample in (target, target + distance):
                own = log_prob(sample, step)
                with policy.reference():
                    ratio = (own - log_prob(sample, step)).exp()
                clipped += int((ratio - 1).abs() > 0.01)
                logs.append(ratio.clamp(0.99, 1.01).log())
            assert loss == pytest.approx(-torch.nn.functional.logsigmoid(3.0 * (logs[0] - logs[1])).item(), rel=1e-4)
        assert 0 < clipped < 2 * len(rows) and figures["ratio_gap"].max() < 1e-5


def test_offline_pso_is_the_authors_loss_at_the_levels_of_the_chain(policy: Any) -> None:
    """By errors of x0, weighed by the noise: in units of the signal, or of a flow's share."""
    algorithm = FORWARD["pso-offline"](beta=500.0, retain=0.3, pairs_per_group=2, noisings=3)
    with learned(policy, []):
        rollout = endpoints(policy)
        advantages = algorithm.advantages(rollout)
        (rows,) = algorithm.updates(rollout, advantages, 0, 1)
        found, _ = algorithm.losses(policy, rollout, rows, advantages[rows[:, 0]])
        at = algorithm.noised(policy, rollout, both(rows))
        assert set(at.levels.timesteps.tolist()) == set(rollout.table.grid.timesteps.tolist()), "three levels, each a part"
        alpha, sigma = at.levels.alpha.double(), at.levels.sigma.double()
        noise = sigma if policy.noise_levels.linear else sigma / alpha

        @torch.no_grad()
        def error() -> Tensor:
            x0, _ = policy.denoise(at.x, at.levels, at.prompts, None)
            return (x0.double() - at.true.x0.double()).square().flatten(1).mean(1) / noise**2

        own = error()
        with policy.reference():
            gain = error() - own
        targets, references = gain.chunk(2)
        expected = -torch.nn.functional.logsigmoid(500.0 * (targets - references)) + 0.3 * own.chunk(2)[1]
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
        assert (500.0 * (targets - references)).std() > 0.1, "there is something to tell apart"


def test_updates_are_cut_freely_and_invalid_samples_leave_exactly(make_policy: Any) -> None:
    """Of online PSO; of offline PSO, with the other forward-process objectives."""
    policy = make_policy(lora_rank=2)
    with learned(policy, []):
        rollout = chains(policy, invalid=(1, 6))
        whole, cut = (gradient(pso(micro_batch_size=size), policy, rollout) for size in (64, 3))
        assert alike(cut, whole, 1e-5)
        spoilt = rollout.latents.clone()
        spoilt[[1, 6]] = float("inf")
        assert torch.equal(cut, gradient(pso(), policy, replace(rollout, latents=spoilt)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: OfflinePSOConfig(retain=-1.0), "retain must not be negative"),
        (lambda: PSOConfig(window=WindowConfig(2)), "window is not for pso"),
        (lambda: PSOConfig(kl_weight=0.1), "kl_weight is not for pso"),
        (lambda: TrainConfig(algorithm=PSOConfig(), samples_per_prompt=2, sampling=SamplingConfig(1)), "num_steps above 1"),
        (lambda: TrainConfig(algorithm=PSOConfig(), samples_per_prompt=2, sampling=SamplingConfig(4, sampler="ode")), "fresh"),
        (lambda: TrainConfig(algorithm=PSOConfig(), samples_per_prompt=1), "set samples_per_prompt above 1"),
        (lambda: TrainConfig(algorithm=PSOConfig(), preferences="judged"), "pso-offline, not by pso"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()
