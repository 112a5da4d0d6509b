"""A diffusion model as its own judge: the error in denoising tells which prompt an image was made from."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines as tiny
import torch
from torch import Tensor

from diffusionrl.cli import main
from diffusionrl.config.judges import DiffusionClassifierConfig
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.emoji.scenes import draw_scene
from diffusionrl.errors import UserError
from diffusionrl.policies.pipeline import PipelinePolicy
from diffusionrl.rewards import load_reward, score
from diffusionrl.rewards.diffusion_classifier import DiffusionClassifier, load_classifier, spread
from diffusionrl.rewards.loading import require_world
from diffusionrl.training.disk import cropped
from diffusionrl.transitions import NoiseLevels, flow_grid, variance_preserving_grid

ABAR = torch.linspace(0.999, 0.9, 100).cumprod(0)
PROMPTS = [Prompt(text) for text in ("one", "two", "three", "four")]


class Modes:
    """A policy whose denoiser is exact: of each prompt, samples around one mean, with deviation 1/2."""

    device, sampling_rate, source, edits = torch.device("cpu"), None, "modes", False
    sample_shape = latent_shape = (6,)

    def __init__(self, linear: bool) -> None:
        grid = flow_grid(40) if linear else variance_preserving_grid(ABAR, 100, steps_offset=0)
        self.noise_levels = grid.levels
        self.asked: list[str] = []
        self.means = 0.5 * torch.randn(4, 6, generator=torch.Generator().manual_seed(2))

    def encode(self, images: Tensor) -> Tensor:
        return images

    def denoise(
        self, x: Tensor, levels: NoiseLevels, prompts: Sequence[Prompt], guidance: float | None
    ) -> tuple[Tensor, Tensor]:
        assert guidance is None
        self.asked += [prompt.text for prompt in prompts]
        means = self.means[[PROMPTS.index(prompt) for prompt in prompts]]
        alpha, sigma = levels.shaped(x)
        x0 = means + alpha / 4 / (alpha**2 / 4 + sigma**2) * (x - alpha * means)
        return x0, (x - alpha * x0) / sigma


def judge(linear: bool = True, **settings: Any) -> DiffusionClassifier:
    return DiffusionClassifier(Modes(linear), DiffusionClassifierConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 7, 16, 50])
def test_every_beginning_of_the_times_is_spread_evenly(count: int) -> None:
    order = spread(count)
    assert sorted(order) == list(range(count))
    for taken in range(1, count + 1):
        gaps = [after - before for before, after in pairwise(sorted(order[:taken]))]
        assert not gaps or max(gaps) <= 4 * count / taken


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_nearest_mode_is_named(linear: bool, norm: str) -> None:
    classifier = judge(linear, trials=(64,), keep=(), norm=norm)
    means: Tensor = classifier.policy.means  # type: ignore[attr-defined]
    images = means.repeat(5, 1) + 0.3 * torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    nearest = torch.cdist(images, means).argmin(1)
    found = torch.stack([classifier.log_probabilities(image, PROMPTS) for image in images])
    assert torch.allclose(found.exp().sum(1), torch.ones(20).double())
    assert (found.argmax(1) == nearest).float().mean() >= 0.9
    assert torch.equal(found[3], classifier.log_probabilities(images[3], PROMPTS)), "the same noise every time"
    cut = judge(linear, trials=(64,), keep=(), norm=norm, batch_size=7)
    assert torch.allclose(cut.log_probabilities(images[3], PROMPTS), found[3], atol=1e-4)


def test_the_rest_is_left_behind_and_counts_by_what_it_had_lost() -> None:
    classifier, whole = judge(trials=(4, 16, 32), keep=(3, 2)), judge(trials=(32,), keep=())
    image = classifier.policy.means[1] + 0.1  # type: ignore[attr-defined]
    errors, every = classifier.errors(image, PROMPTS), whole.errors(image, PROMPTS)
    asked = classifier.policy.asked  # type: ignore[attr-defined]
    assert len(asked) == 4 * 4 + 3 * 12 + 2 * 16
    assert sorted((~errors.isnan()).sum(1).tolist()) == [4, 16, 32, 32]
    assert torch.equal(errors[~errors.isnan()], every[~errors.isnan()])
    found = classifier.log_probabilities(image, PROMPTS)
    assert found.argmax() == 1 and found.exp().sum().item() == pytest.approx(1)
    kept = (~errors.isnan()).sum(1) == 32
    gaps = torch.where(kept, (errors - errors[1]).mean(1), (errors - errors[1]).nanmean(1))
    assert torch.allclose(found, (-gaps).log_softmax(0))


def test_the_embedded_model_judges_scenes_that_it_has_not_seen() -> None:
    names = ["cat", "owl", "butterfly", "shark"]
    prompts = ("a cat", "an owl", "a butterfly", "a shark")
    reward = load_reward(
        "diffusion-classifier",
        RewardsConfig(diffusion_classifier=DiffusionClassifierConfig(prompts=prompts, trials=(4, 8), keep=(2,))),
    )
    scenes = [draw_scene(10_000, index, "subject", names=[name]) for index, name in enumerate(names)]
    images = torch.stack([cropped(scene.image, (3, 64, 64)) for scene in scenes])
    right = score(reward, images, [scene.caption for scene in scenes], [{}] * 4)
    wrong = score(reward, images, ["a butterfly", "a cat", "an owl", "a duck"], [{}] * 4)  # one of them is not among the others
    assert right.valid.all() and wrong.valid.all() and (right.values > wrong.values + 1).all()
    assert (right.values > -0.7).all(), "more likely than all others together"
    small = score(reward, images[:, :, :32, :32], ["a cat"] * 4, [{}] * 4)
    assert not small.valid.any() and "sees samples of 3 x 64 x 64, not of 3 x 32 x 32" in str(small.error)


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_any_pipeline_that_encodes_can_judge(name: str) -> None:
    policy = PipelinePolicy(tiny.build(name), Prompt("a cat"), steps=4, guidance=4.0, arguments=tiny.call_of(name))
    classifier = DiffusionClassifier(policy, DiffusionClassifierConfig(trials=(3,), keep=()))
    image = torch.rand(policy.sample_shape, generator=torch.Generator().manual_seed(0))
    found = classifier.log_probabilities(image, [Prompt("a cat"), Prompt("a dog")])
    assert found.isfinite().all() and found.exp().sum().item() == pytest.approx(1)


def test_one_that_cannot_encode_is_refused() -> None:
    policy = PipelinePolicy(tiny.build("wan"), Prompt("a cat"), steps=2, guidance=4.0, arguments=tiny.call_of("wan"))
    with pytest.raises(UserError, match="makes no latents of an image"):
        DiffusionClassifier(policy, DiffusionClassifierConfig())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DiffusionClassifierConfig(trials=(8, 8)), "each larger than the one before"),
        (lambda: DiffusionClassifierConfig(trials=(0,), keep=()), "from 1 on"),
        (lambda: DiffusionClassifierConfig(trials=(8, 16), keep=()), "how many prompts go on"),
        (lambda: DiffusionClassifierConfig(keep=(1,)), "2 or more"),
        (lambda: judge().log_probabilities(torch.zeros(6), PROMPTS[:1]), "nothing to be compared with"),
        (lambda: load_reward("diffusion-classifier", RewardsConfig()), "--rewards.diffusion-classifier.prompts"),
        (
            lambda: require_world(["diffusion-classifier"], RewardsConfig(), "their/model"),
            "--rewards.diffusion-classifier.model",
        ),
        (lambda: load_classifier(DiffusionClassifierConfig(model="emoij"), PROMPTS[0]), "emoij"),
    ],
)
def test_what_cannot_be_is_named_with_the_remedy(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


def test_from_the_command_line(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for index, name in enumerate(["cat", "owl"]):
        draw_scene(10_000, index, "subject", names=[name]).image.resize((128, 96)).save(f"images/{name}.png")
    asked = ["classify", "images", "--prompts", "a cat", "an owl", "a shark", "--trials", "4", "--keep", "--out", "found.jsonl"]
    assert main(asked) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("images/cat.png  a cat ") and said[1].startswith("images/owl.png  an owl ")
    lines = [json.loads(line) for line in Path("found.jsonl").read_text().splitlines()]
    assert [next(iter(line["log_probabilities"])) for line in lines] == ["a cat", "an owl"]
    assert main(asked) == 2 and "found.jsonl exists" in capsys.readouterr().err
    for arguments, error in (
        (["images"], "--prompts with two texts or more"),
        (["images", "--prompts", "a cat"], "name two or more"),
        ([], "name one image"),
        (["image.png", "--prompts", "a cat", "a dog"], "there is no image image.png"),
    ):
        assert main(["classify", *arguments]) == 2 and error in capsys.readouterr().err
