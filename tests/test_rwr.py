"""RWR's promises: the paper's weights, the denoising loss they multiply, and the trainer that takes it as it takes DDPO."""

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusionrl.algorithms import RWR
from diffusionrl.cli import parse_train
from diffusionrl.config import RWRConfig, SamplingConfig, TrainConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.policies import StableDiffusionPolicy
from diffusionrl.rewards import Scores
from diffusionrl.sampling.rollout import Rollout, collect
from diffusionrl.training.optimization import accumulate_gradient
from diffusionrl.training.trainer import Trainer

SAMPLING = SamplingConfig(num_steps=3, guidance=3.0, batch_size=8)


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, object]]) -> Tensor:
    return images.mean((1, 2, 3))


def scored(values: list[float], prompts: list[str] | None = None, valid: list[bool] | None = None) -> Rollout:
    """A rollout of which only the prompts and scores are looked at."""
    empty = torch.zeros(0)
    scores = Scores(torch.tensor(values), torch.tensor(valid or [True] * len(values)))
    asked = [Prompt(text) for text in prompts or [""] * len(values)]
    return Rollout(None, asked, empty, empty, empty, scores, {})  # type: ignore[arg-type]


def endpoints(policy: StableDiffusionPolicy, count: int = 8) -> Rollout:
    prompts = [Prompt(text) for text in ("a cat", "a dog")] * (count // 2)
    return collect(policy, brightness, prompts, SAMPLING, 0, "test", 1, needs="endpoints")


@given(st.lists(st.floats(-100, 0), min_size=1, max_size=20), st.floats(0.01, 2))
def test_weights_are_a_softmax_of_mean_1(rewards: list[float], beta: float) -> None:
    weights = RWR(RWRConfig(inverse_temperature=beta, normalisation="batch"), 1.0).advantages(scored(rewards))
    assert weights.mean().item() == pytest.approx(1, rel=1e-4)
    for i in range(1, len(rewards)):  # ratios are those of exp(beta * r)
        expected = beta * (rewards[i] - rewards[0])
        if weights[i] > 1e-30 and weights[0] > 1e-30:
            assert math.log(weights[i] / weights[0]) == pytest.approx(expected, abs=1e-3)


def test_the_conditional_prediction_alone_can_be_trained(make_policy) -> None:  # type: ignore[no-untyped-def]
    """Figure 10: samples are drawn with guidance, the loss is that of a policy without."""
    policy = make_policy()
    rollout = endpoints(policy)
    weights = torch.ones(2)
    rows = torch.tensor([[0, 11], [3, 12]])
    conditional, _ = RWR(RWRConfig(train_guided=False), SAMPLING.guidance).losses(policy, rollout, rows, weights)
    unguided, _ = RWR(RWRConfig(), 1.0).losses(policy, rollout, rows, weights)
    guided, _ = RWR(RWRConfig(), SAMPLING.guidance).losses(policy, rollout, rows, weights)
    assert torch.equal(conditional, unguided)
    assert not torch.equal(conditional, guided)


def test_weights_are_per_prompt_and_leave_invalid_samples_out() -> None:
    rollout = scored([1.0, 2.0, 50.0, 60.0, math.nan], ["a", "a", "b", "b", "b"], [True] * 4 + [False])
    weights = RWR(RWRConfig(), 1.0).advantages(rollout)
    pair = 2 * torch.softmax(0.2 * torch.tensor([1.0, 2.0]), 0)
    torch.testing.assert_close(weights[:2], pair)
    torch.testing.assert_close(weights[2:4], 2 * torch.softmax(0.2 * torch.tensor([50.0, 60.0]), 0))
    assert weights[4] == 0


def test_sparse_keeps_the_best_tenth_of_each_prompt() -> None:
    rollout = scored([float(i) for i in range(20)] + [100.0 + i for i in range(10)], ["a"] * 20 + ["b"] * 10)
    weights = RWR(RWRConfig(variant="sparse"), 1.0).advantages(rollout)
    assert weights.nonzero().flatten().tolist() == [18, 19, 29]
    assert weights.max() == 1


def test_updates_pass_over_every_sample_equally_often_and_repeat_to_the_bit() -> None:
    rollout = scored([float(i) for i in range(10)], valid=[True] * 9 + [False])
    algorithm = RWR(RWRConfig(updates_per_step=6, batch_size=6), 1.0)
    weights = algorithm.advantages(rollout)
    batches = list(algorithm.updates(rollout, weights, 0, 1))
    assert [len(batch) for batch in batches] == [6] * 6
    rows = torch.cat(batches)
    assert torch.bincount(rows[:, 0], minlength=10).tolist() == [4] * 9 + [0]  # 36 rows over 9 samples
    assert len(set(rows[:, 1].tolist())) == 36
    assert torch.equal(rows, torch.cat(list(algorithm.updates(rollout, weights, 0, 1))))
    assert not torch.equal(rows, torch.cat(list(algorithm.updates(rollout, weights, 0, 2))))


def test_a_step_without_a_valid_sample_has_no_update() -> None:
    rollout = scored([0.0, 0.0], valid=[False, False])
    algorithm = RWR(RWRConfig(), 1.0)
    assert list(algorithm.updates(rollout, algorithm.advantages(rollout), 0, 1)) == []


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_weighted_denoising_loss_of_diffusers(make_policy, prediction: str) -> None:  # type: ignore[no-untyped-def]
    """The noisy samples and the noise prediction, with guidance, are made again with the pipeline's own parts."""
    policy = make_policy({"prediction_type": prediction}, lora_rank=None)
    rollout = endpoints(policy)
    assert (rollout.latents.shape[1], rollout.log_probs.shape[1]) == (1, 0)
    algorithm = RWR(RWRConfig(), 3.0)
    weights = algorithm.advantages(rollout)
    rows = next(algorithm.updates(rollout, weights, 0, 1))[:5]
    losses, _ = algorithm.losses(policy, rollout, rows, weights[rows[:, 0]])
    scheduler, unet = policy.pipeline.scheduler, policy.unet
    for row, found in zip(rows.tolist(), losses, strict=True):
        generator = torch.Generator().manual_seed(row[1])
        t = 999 - (1000 * torch.rand((), generator=generator)).long().view(1)  # 0 is the noisy end
        noise = torch.randn(1, *policy.latent_shape, generator=generator)
        x = scheduler.add_noise(rollout.latents[row[0], -1][None], noise, t)
        with torch.no_grad():
            without = unet(x, t, policy.embed([""])).sample
            asked = unet(x, t, policy.embed([rollout.prompts[row[0]].text])).sample
        output = without + 3.0 * (asked - without)
        if prediction == "v_prediction":
            alpha = scheduler.alphas_cumprod[t].view(1, 1, 1, 1)
            output = alpha.sqrt() * output + (1 - alpha).sqrt() * x
        expected = weights[row[0]] * (output - noise).square().mean()
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_cutting_the_batch_changes_no_gradient(make_policy, size: int) -> None:  # type: ignore[no-untyped-def]
    policy = make_policy()
    rollout = endpoints(policy)

    def gradient(micro_batch_size: int) -> Tensor:
        algorithm = RWR(RWRConfig(batch_size=8, micro_batch_size=micro_batch_size), 3.0)
        weights = algorithm.advantages(rollout)
        for parameter in policy.trainable().values():
            parameter.grad = None
        accumulate_gradient(algorithm, policy, rollout, next(algorithm.updates(rollout, weights, 0, 1)), weights)
        return torch.cat([p.grad.flatten() for p in policy.trainable().values() if p.grad is not None])

    whole = gradient(8)
    assert whole.abs().max() > 0
    assert (gradient(size) - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("variant", ["rwr", "sparse"])
def test_training_raises_the_likelihood_of_what_scored_well(make_policy, tmp_path: Path, variant: str) -> None:  # type: ignore[no-untyped-def]
    """The trainer makes RWR's updates, and the denoising loss of the samples that count falls."""
    settings = RWRConfig(variant=variant, updates_per_step=30, batch_size=8)  # type: ignore[arg-type]
    config = TrainConfig(prompts_per_step=8, sampling=SAMPLING, algorithm=settings)
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=1e-2))
    algorithm = RWR(settings, 3.0)
    policy = make_policy()
    trainer = Trainer(policy, brightness, [Prompt("a cat"), Prompt("a dog")], algorithm, config)
    rollout = collect(policy, brightness, trainer.tasks[0].prompts_of(1), SAMPLING, 0, "rollout", 1, needs="endpoints")
    weights = algorithm.advantages(rollout)
    rows = torch.cat(list(algorithm.updates(rollout, weights, 0, 99)))

    def loss() -> float:
        with torch.no_grad():
            return algorithm.losses(policy, rollout, rows, weights[rows[:, 0]])[0].mean().item()

    before = loss()
    metrics = trainer.step(1)
    assert loss() < 0.98 * before
    assert metrics["policy/denoising_loss"] > 0
    assert "ratio/max_gap" not in metrics
    assert metrics["queries"] == 8


def test_the_commands_of_the_docs_make_five_passes_as_in_the_paper() -> None:
    page = (Path(__file__).parent.parent / "docs" / "rwr.md").read_text()
    commands = re.findall(r"^    diffusionrl train (.*(?:\n        .*)*)$", page, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        config = parse_train(shlex.split(command.replace("\\\n", " ")))
        assert isinstance(config.algorithm, RWRConfig)
        assert config.algorithm.updates_per_step * config.algorithm.batch_size == 5 * config.samples_per_step
        assert config.samples_per_prompt > 1 and config.steps * config.samples_per_step == 1024
