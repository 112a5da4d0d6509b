"""The preference reward: the Bradley-Terry loss, the rule behind the choices, and what the shipped model has learned of it."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusionrl.emoji.aesthetics import gold_rating
from diffusionrl.emoji.preference import WEIGHTS, bradley_terry_loss, load_preference_model, utility
from diffusionrl.emoji.recipe.detector import scaled
from diffusionrl.emoji.recipe.preference import PreferenceConfig, agreement, draw_choices, draw_comparison, load_comparisons
from diffusionrl.emoji.scenes import draw_images, draw_scene
from diffusionrl.errors import UserError
from diffusionrl.rewards import load_reward, score
from diffusionrl.rewards.clip import CLIP, EMBEDDED_CLIP
from diffusionrl.seeds import torch_generator


def pictures(seed: int, count: int, kind: str) -> tuple[Tensor, list[str]]:
    drawn, scenes = draw_images(seed, range(count), kind)
    return scaled(torch.from_numpy(drawn)), [scene.caption for scene in scenes]


def test_the_loss_is_that_of_bradley_and_terry() -> None:
    preferred, other = torch.tensor([1.0, -0.5, 2.0], requires_grad=True), torch.tensor([0.0, 0.5, 2.0])
    by_hand = [-math.log(1 / (1 + math.exp(-gap))) for gap in (1.0, -1.0, 0.0)]
    loss = bradley_terry_loss(preferred, other)
    assert loss.item() == pytest.approx(sum(by_hand) / 3)
    loss.backward()
    slopes = [-1 / (1 + math.exp(gap)) / 3 for gap in (1.0, -1.0, 0.0)]  # of the loss, -sigmoid(-gap) / B
    assert preferred.grad is not None and preferred.grad.tolist() == pytest.approx(slopes)
    assert bradley_terry_loss(torch.tensor([200.0]), torch.tensor([-200.0])).item() == 0
    assert bradley_terry_loss(torch.tensor([-200.0]), torch.tensor([200.0])).item() == 400  # and not infinite


def test_the_rule_is_what_it_says() -> None:
    images, _ = pictures(11, 5, "subject")
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    torch.testing.assert_close(utility(images, shares), 4 * shares + gold_rating(images))


def test_choices_are_as_frequent_as_the_rule_says() -> None:
    probability = torch.tensor([0.1, 0.5, 0.9]).repeat_interleave(4000)
    shares = draw_choices(probability, torch_generator(0, "test")).float().view(3, -1).mean(1)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.5, 0.9]), atol=4 * (0.25 / 4000) ** 0.5, rtol=0)


def test_comparisons_show_the_share_that_they_say() -> None:
    seen = set()
    for index in range(200):
        caption, scenes, shares = draw_comparison(3, index)
        named = caption.replace("an ", "a ").removeprefix("a ").split(" and a ")
        for scene, share in zip(scenes, shares, strict=True):
            shown = {scene.occupation} if scene.occupation else set(scene.subjects)
            assert share == len(shown & set(named)) / len(named)
            seen.add((len(named), share))
    assert seen == {(1, 0.0), (1, 1.0), (2, 0.0), (2, 0.5), (2, 1.0)}


def test_a_scene_is_drawn_of_what_is_asked_for() -> None:
    assert draw_scene(0, 1, "pair", names=("bus", "ant")).caption == "a bus and an ant"
    assert draw_scene(0, 1, "person", names=("pilot",)).occupation == "pilot"
    assert draw_scene(0, 1, "subject", names=("bus",)).subjects == ("bus",)
    assert draw_scene(0, 1, "empty").subjects == ()


def test_the_shipped_model_is_as_good_as_published(tmp_path: Path) -> None:
    published = json.loads((WEIGHTS.parent / "figures.json").read_text())
    config = PreferenceConfig(out=tmp_path, clip=EMBEDDED_CLIP, device="cpu")
    found = agreement(load_preference_model(), load_comparisons(config, 21, 250, rough=False))
    for what in ("rule", "choices", "ceiling"):
        assert found[what] == pytest.approx(published[f"preference_{what}"], abs=0.08)
    assert found["rule"] > 0.8 and found["rule"] > found["choices"]


def test_the_score_is_the_models() -> None:
    images, prompts = pictures(12, 4, "pair")
    clip = CLIP("emoji")
    by_hand = load_preference_model()(images, clip.embed_images(images), clip.embed_texts(prompts))
    reward = load_reward("preference")
    torch.testing.assert_close(reward(images, prompts, [{}] * 4), by_hand.detach())
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1], [{}]) for i in range(4)])
    torch.testing.assert_close(alone, by_hand.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["subject", "pair", "person"])
def test_the_right_prompt_is_preferred_to_another_one(kind: str) -> None:
    images, prompts = pictures(13, 60, kind)
    reward = load_reward("preference")
    others = prompts[1:] + prompts[:1]
    other = torch.tensor([a != b for a, b in zip(prompts, others, strict=True)])
    gap = reward(images, prompts, [{}] * 60) - reward(images, others, [{}] * 60)
    assert (gap[other] > 0).float().mean() > 0.9


def test_it_is_differentiable_in_the_images() -> None:
    images, prompts = pictures(14, 2, "subject")
    images.requires_grad_(True)
    reward = load_reward("preference")
    reward(images, prompts, [{}] * 2).sum().backward()
    gradient = images.grad
    assert gradient is not None and gradient.isfinite().all() and gradient.norm() > 0
    direction = gradient / gradient.norm()
    with torch.no_grad():
        up, down = (reward(images + sign * 1e-2 * direction, prompts, [{}] * 2).sum() for sign in (1, -1))
    assert ((up - down) / 2e-2).item() == pytest.approx(gradient.norm().item(), rel=0.05)


def test_images_of_other_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="sees images of 64 x 64 pixels"):
        load_reward("preference")(torch.rand(1, 3, 32, 32), ["a cat"], [{}])
    assert not score(load_reward("preference"), torch.rand(1, 3, 32, 32), ["a cat"], [{}]).valid.any()
