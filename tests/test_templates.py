"""Template matching of the world's scenes, exact, and the gold score that is made of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusionrl import Prompt, UserError, load_policy
from diffusionrl.config import RewardsConfig, SamplingConfig
from diffusionrl.emoji.aesthetics import gold_rating
from diffusionrl.emoji.scenes import SLOTS, Scene, draw_scene
from diffusionrl.emoji.sprites import load_sprites
from diffusionrl.emoji.templates import asked_by, match, vocabulary_of
from diffusionrl.emoji.vocabulary import caption_sets
from diffusionrl.evaluation.fixed_seed import evaluate
from diffusionrl.rewards import Mixture, Scores, load_reward, score
from diffusionrl.rewards.loading import require_world


def drawn(kind: str, count: int = 3) -> tuple[Tensor, list[Scene]]:
    scenes = [draw_scene(11, index, kind) for index in range(count)]
    return as_images([scene.image for scene in scenes]), scenes


def as_images(images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


def scored(name: str, images: Tensor, prompts: list[str]) -> Scores:
    return score(load_reward(name), images, prompts, [{}] * len(prompts))


@pytest.mark.parametrize("kind", SLOTS)
def test_every_scene_is_its_own_nearest(kind: str) -> None:
    """To the rounding of its pixels, in all sizes, places and flips."""
    images, scenes = drawn(kind)
    shares, distances = match(images, [scene.caption for scene in scenes])
    assert shares.tolist() == [1.0] * len(scenes)
    assert distances.max() < 0.003


def test_sprites_count_where_the_prompt_puts_them() -> None:
    """The first of a pair is on the left."""
    images, scenes = drawn("pair", 1)
    left, right = (f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in scenes[0].subjects)
    prompts = [f"{left} and {right}", f"{right} and {left}", f"{left} and a whale", left]
    shares, distances = match(images.expand(4, -1, -1, -1), prompts)
    assert shares.tolist() == [1.0, 0.0, 0.5, 0.0]
    assert distances[0] < 0.003 < 0.05 < distances[2] < distances[1]


def test_the_error_is_that_of_the_drawn_scene() -> None:
    """The closed form against a scene that is drawn: a sprite on the best of its grounds, pixel by pixel."""
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = match(image, ["a cat"])[1].item()
    least = np.inf
    for side, places in ((48, (0, 8, 16)), (56, (0, 8))):
        sprite = np.asarray(load_sprites()["cat"].resize((side, side), Image.Resampling.BILINEAR)) / 255
        for flipped in (sprite, sprite[:, ::-1]):
            for top, left in ((top, left) for top in places for left in places):
                opacity, paint = np.zeros((64, 64, 1)), np.zeros((64, 64, 3))
                opacity[top : top + side, left : left + side] = flipped[..., 3:]
                paint[top : top + side, left : left + side] = flipped[..., 3:] * flipped[..., :3]
                gap, bare = image[0].permute(1, 2, 0).numpy() - paint, 1 - opacity
                ground = ((gap * bare).sum((0, 1)) / (bare**2).sum()).clip(0.66, 1)
                least = min(least, float(np.sqrt(((gap - bare * ground) ** 2).mean())))
    assert found == pytest.approx(least, rel=1e-5)


def test_captions_of_the_world_are_read() -> None:
    for name, prompts in caption_sets().items():
        kinds = {getattr(asked_by(prompt), "kind", None) for prompt in prompts}
        assert kinds == {{"activities": "activity", "occupations": "person"}.get(name, "subject")}
    asked = asked_by("a doctor")
    assert asked is not None and len(asked.sprites[0]) == 10 and set(asked.sprites[0]) <= set(vocabulary_of("person", 0))
    assert asked_by("a cat riding a bike") is not None
    for other in (
        "",
        "cats",
        "a cat and a doctor",
        "a cat and a dog and a cow",
        "a unicorn riding a bike",
        "a cat beside a dog",
    ):
        assert asked_by(other) is None


def test_what_is_no_caption_of_the_world_is_invalid() -> None:
    images, _ = drawn("subject", 2)
    for name in ("emoji-template", "emoji-scene"):
        found = scored(name, images, ["a cat", "a unicorn"])
        assert found.valid.tolist() == [True, False] and "'a unicorn' is no caption" in str(found.error)
        large = scored(name, torch.zeros(1, 3, 32, 32), ["a cat"])
        assert not large.valid.any() and "64 x 64" in str(large.error)
        with pytest.raises(UserError, match="judges images of the embedded world alone"):
            require_world([name], RewardsConfig(), "another")


def test_what_is_beautiful_and_no_scene_is_worth_nothing() -> None:
    """A saturated square on white has a high rating by the rule; a scene that is blended away loses by the blend."""
    image = torch.ones(1, 3, 64, 64)
    image[:, 1:, 10:54, 10:54] = 0
    images, scenes = drawn("subject", 1)
    assert gold_rating(image) > gold_rating(images)
    prompt = [scenes[0].caption]
    worth = [scored("emoji-scene", each, prompt).values.item() for each in (images, 0.7 * images + 0.3 * image, image)]
    assert worth[0] > worth[1] > worth[2] == 0


def test_weights_that_are_moved_at_random_lose_it_where_the_rule_rises() -> None:
    policy = load_policy("emoji", lora_rank=16, seed=0)
    prompts = [Prompt(text) for text in ("a cat", "an owl", "a fox", "a pig")]
    judges = Mixture({name: load_reward(name) for name in ("emoji-scene", "emoji-gold")})
    sampling = SamplingConfig(num_steps=5, guidance=3.0, batch_size=4)

    def scores() -> list[float]:
        found = evaluate(policy, judges, prompts, len(prompts), sampling, 0).rollout.scores.parts
        return [values.mean().item() for values in found.values()]

    gold, rule = scores()
    for index, (name, weight) in enumerate(policy.trainable().items()):
        if "lora_B" in name:
            weight.data.normal_(std=0.5, generator=torch.Generator().manual_seed(index))
    moved_gold, moved_rule = scores()
    assert moved_rule > rule and moved_gold < gold / 4


def test_no_run_on_noise_has_raised_it() -> None:
    """What benchmarks/gold.py has found: the rule alone rises, and not what is made of it."""
    found = json.loads((Path(__file__).parent.parent / "benchmarks" / "gold.json").read_text())
    assert found["rises"]["emoji-gold"]["risen"] > 0
    assert [found["rises"][name]["risen"] for name in ("emoji-scene", "emoji-template")] == [0, 0]
    last = [lines[-1]["emoji-scene"] for lines in found["runs"].values()]
    assert len(last) >= 4 and all(change + 2 * error < 0 for _, change, error in last)
