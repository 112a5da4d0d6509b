"""Rewards that see two images, and rewards that are smoothed."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import own_points
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusionrl import Prompt, TrainConfig, UserError, train
from diffusionrl.algorithms import make_algorithm
from diffusionrl.cli import main
from diffusionrl.config import AlignPropConfig, RewardsConfig, SamplingConfig
from diffusionrl.config.rewards import SmoothConfig
from diffusionrl.data.prompts import load_prompts
from diffusionrl.foreign.finding import code_of
from diffusionrl.rewards import Mixture, Scores, Smoothed, differentiable, load_reward, score, try_gradient
from diffusionrl.rewards.nearness import psnr, ssim
from diffusionrl.training.trainer import Trainer


def picture(seed: int, size: int = 16) -> Tensor:
    coarse = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return coarse.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)


def paper_ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Wang et al. 2004, Eq. 13 and 14 to 16, window by window; (H, W) in [0, 1]."""
    ramp = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(ramp, ramp) / ramp.sum() ** 2
    found = []
    for top in range(one.shape[0] - 10):
        for left in range(one.shape[1] - 10):
            x, y = one[top : top + 11, left : left + 11], other[top : top + 11, left : left + 11]
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy, cov = (
                (weights * (x - mx) ** 2).sum(),
                (weights * (y - my) ** 2).sum(),
                (weights * (x - mx) * (y - my)).sum(),
            )
            found.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return float(np.mean(found))


def test_they_are_what_the_papers_say() -> None:
    images, targets = torch.stack([picture(0), picture(1)]), torch.stack([picture(0) ** 2, picture(2)])
    metadata = [{"target": target} for target in targets]
    expected = [
        np.mean([paper_ssim(image[c].double().numpy(), target[c].double().numpy()) for c in range(3)])
        for image, target in zip(images, targets, strict=True)
    ]
    np.testing.assert_allclose(ssim(images, ["", ""], metadata).numpy(), expected, rtol=1e-4)
    errors = ((images - targets) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(psnr(images, ["", ""], metadata), 10 * torch.log10(1 / errors))
    same = [{"target": image} for image in images]
    assert torch.equal(psnr(images, ["", ""], same), torch.full((2,), 100.0)), "of images that are equal, it is still a number"
    torch.testing.assert_close(ssim(images, ["", ""], same), torch.ones(2))


def test_an_image_is_named_in_many_ways(tmp_path: Path) -> None:
    levels = (255 * picture(0)).round() / 255
    image = Image.fromarray((255 * levels).byte().permute(1, 2, 0).numpy())
    image.save(tmp_path / "a.png")
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "x", "target": "a.png"}\n{"prompt": "y", "image": "a.png"}\n{"prompt": "z", "target": "a cat"}\n'
    )
    written = load_prompts(str(tmp_path / "prompts.jsonl"))
    ways = [written[0].metadata, written[1].metadata, {"target": image}, {"target": levels.numpy()}, {"image": levels}]
    for metadata in ways:
        assert psnr(levels[None], [""], [metadata]).item() == pytest.approx(100.0)
    both = {"target": picture(1), "image": levels}
    assert psnr(levels[None], [""], [both]) < 50, "the target comes first"
    assert written[2].metadata["target"] == "a cat", "which names no file, and may be anything"


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, 'names no image to be near to: give it "target"'),
        ({"target": picture(0, 32)}, r"\(3, 32, 32\), and samples \(3, 16, 16\): give them one size, as nothing is resized"),
        ({"target": "nowhere.png"}, "image nowhere.png of a prompt cannot be read"),
        ({"target": 3}, "no int"),
    ],
)
def test_what_is_no_image_of_the_same_size(metadata: dict[str, Any], said: str) -> None:
    for reward in (psnr, ssim):
        with pytest.raises(UserError, match=said):
            reward(picture(0)[None], [""], [metadata])


def test_an_image_smaller_than_the_window() -> None:
    with pytest.raises(UserError, match="a window of 11 x 11 pixels, and the image has a side of 8"):
        ssim(picture(0, 8)[None], [""], [{"target": picture(0, 8)}])


def test_a_prompt_without_an_image_is_found_before_anything_slow(make_policy: Any, tmp_path: Path) -> None:
    config = TrainConfig(prompts_per_step=4, run_dir=tmp_path / "run")
    with pytest.raises(UserError, match="names no image"):
        train(config, policy=make_policy(), reward="psnr", prompts=["a cat"])
    assert not (tmp_path / "run").exists()


# Smoothed


@differentiable
def quadratic(points: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return points.square().sum(1)


def test_a_smoothed_reward_is_its_mean_over_noise() -> None:
    """Of a square, x^2 + sigma^2 a dimension, with the gradient 2 x, and as far off as so many draws are."""
    reward = Smoothed(quadratic, sigma=0.5, draws=400)
    points = torch.tensor([[1.0, 2.0], [0.0, -1.0]], requires_grad=True)
    found = reward(points, ["", ""], [{}, {}])
    torch.testing.assert_close(found.values, (points.square().sum(1) + 2 * 0.25).double(), rtol=0.1, atol=0.15)
    (gradient,) = torch.autograd.grad(found.values.sum(), points)
    torch.testing.assert_close(gradient, 2 * points.detach(), rtol=0.1, atol=0.15)
    assert not torch.equal(gradient, 2 * points.detach()), "there is noise in it"


def test_its_draws_are_addressed() -> None:
    """A score depends on the sample, not on its batch or on what was asked before; other samples and seeds have other noise."""
    images = 0.4 + 0.2 * torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    def noted(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        seen.append(images)
        return images.mean((1, 2, 3))

    torch.manual_seed(7)
    state, reward = torch.get_rng_state(), Smoothed(noted, sigma=0.2, draws=3)
    together = score(reward, images, ["", "", ""], [{}, {}, {}]).values
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(score(reward, images[[2, 0]], ["", ""], [{}, {}]).values, together[[2, 0]])
    assert all(each.min() >= 0 and each.max() <= 1 for each in seen)
    noise = [each[i] - images[i] for each in seen[:3] for i in range(3)]
    assert len({round(each.mean().item(), 7) for each in noise}) == 9, "of each sample and draw, another"
    assert not torch.equal(Smoothed(noted, 0.2, 3, seed=1)(images, ["", "", ""], [{}, {}, {}]).values, together)


def test_it_takes_after_what_it_is_around() -> None:
    def some(images: Tensor, prompts: Any, metadata: Any) -> Scores:
        return Scores(images.mean((1, 2, 3)), torch.tensor([True, False])[: len(images)], "not seen")

    found = score(Smoothed(some, draws=2), torch.rand(2, 3, 8, 8), ["", ""], [{}, {}])
    assert found.valid.tolist() == [True, False] and found.error == "not seen"
    some.whole_groups = True  # type: ignore[attr-defined]
    some.range = (0.0, 1.0)  # type: ignore[attr-defined]
    assert Mixture({"smooth": Smoothed(some)}).grouped == ("smooth",) and Smoothed(some).range == (0.0, 1.0)
    assert Mixture({"smooth": Smoothed(some)}).code() == {"smooth": code_of(some)}, "a run knows when it changes"
    config = RewardsConfig(smooth=SmoothConfig(reward="aesthetic", draws=2))
    mixture = Mixture({"smooth": load_reward("smooth", config)})
    try_gradient(mixture, (3, 64, 64), ["a cat"], [{}])
    with pytest.raises(UserError, match="needs another one in it"):
        load_reward("smooth")


def test_a_smoothed_reward_trains_by_its_gradient() -> None:
    policy = own_points.make_policy(own_points.LORA, 0)
    algorithm = AlignPropConfig(micro_batch_size=4)
    sampling = SamplingConfig(num_steps=4, sampler="ode", eta=0.0)
    config = TrainConfig(prompts_per_step=4, sampling=sampling, algorithm=algorithm)
    reward = Smoothed(own_points.to_the_right, sigma=0.1, draws=2)
    metrics = Trainer(policy, reward, [Prompt("a")], make_algorithm(config), config).step(1)
    assert metrics["reward/differentiated_gap"] < 0.1 and metrics["grad_norm"] > 0 and math.isfinite(metrics["grad_norm"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "the reward smooth needs another one in it: --rewards.smooth.reward"),
        (["--rewards.smooth.reward", "asthetic"], "did you mean 'aesthetic'"),
        (["--rewards.smooth.reward", "smooth"], "not smooth itself"),
        (["--rewards.smooth.reward", "noise", "--rewards.smooth.sigma", "0"], "rewards.smooth.sigma must be positive"),
    ],
)
def test_a_smooth_reward_of_nothing(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["train", "--reward", "smooth", *given])
    except SystemExit as error:  # tyro's, of a value out of range
        code = int(error.code or 0)
    heard = capsys.readouterr()
    assert code == 2 and said in " ".join((heard.err + heard.out).replace("│", " ").split())
