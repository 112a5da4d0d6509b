"""CLIP-type rewards: what transformers computes, differentiable, from any folder; and the aesthetic head on it."""

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel
from transformers.image_transforms import get_resize_output_image_size
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffusionrl.config.judges import AestheticConfig, CLIPScoreConfig
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.data.images import to_pil
from diffusionrl.emoji.aesthetics import gold_rating
from diffusionrl.emoji.recipe import clip as recipe
from diffusionrl.emoji.recipe.clip import measure_clip, measure_head
from diffusionrl.emoji.recipe.tokenizer import train_tokenizer
from diffusionrl.emoji.scenes import draw_images
from diffusionrl.emoji.vocabulary import DDPO_ANIMALS
from diffusionrl.errors import UserError
from diffusionrl.rewards import load_reward, score, try_reward
from diffusionrl.rewards.aesthetic import EMBEDDED_HEAD, load_head
from diffusionrl.rewards.clip import CLIP, EMBEDDED_CLIP

EXAMPLES = Path(__file__).parent.parent / "examples"


def smooth_images(count: int, height: int, width: int) -> Tensor:
    """Random blobs, so that resizing by another library's bicubic differs by rounding and not by aliasing."""
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = nn.functional.interpolate(noise, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)
    return (images * 255).round() / 255


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of 32 x 32 pixels whose processor says nothing unusual."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = train_tokenizer(folder / "tokenizer")
    tokenizer.save_pretrained(folder)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = {"image_size": 32, "patch_size": 8}
        CLIPModel(CLIPConfig(text_config=shared | tokens, vision_config=shared | vision, projection_dim=8)).save_pretrained(
            folder
        )
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48), (32, 32), (20, 24), (49, 49), (103, 98)])
def test_images_are_prepared_as_the_processor_prepares_them(tiny_clip: Path, size: tuple[int, int]) -> None:
    images = smooth_images(2, *size)
    ours = CLIP(str(tiny_clip)).preprocess(images)
    processor = CLIPImageProcessorPil.from_pretrained(tiny_clip)
    theirs = processor([to_pil(image) for image in images], return_tensors="pt").pixel_values
    assert ours.shape == theirs.shape
    level = 1 / 255 / 0.26  # theirs is rounded, and clipped, to 8 bits after each of two passes
    assert (ours - theirs).abs().mean() < 0.5 * level
    assert (ours - theirs).abs().max() < 3.5 * level


@given(height=st.integers(8, 300), width=st.integers(8, 300), edge=st.sampled_from([32, 64, 224]))
def test_images_of_any_size_become_what_the_processor_makes_of_their_size(height: int, width: int, edge: int) -> None:
    clip = CLIP.__new__(CLIP)  # of which only the settings are looked at
    clip._settings = {"size": {"shortest_edge": edge}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    expected = get_resize_output_image_size(np.zeros((height, width, 3)), edge, False, input_data_format="channels_last")
    assume(max(expected) < 1000)
    image = torch.zeros(1, 3, height, width)
    assert clip.preprocess(image).shape[-2:] == expected
    clip._settings["crop_size"] = {"height": edge, "width": edge}
    assert clip.preprocess(image).shape[-2:] == (edge, edge)


def test_only_the_newest_texts_are_remembered(tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusionrl.rewards.clip._REMEMBERED", 2)
    clip, texts = CLIP(str(tiny_clip)), ["a cat", "a dog", "an ant", "a cat"]
    together = clip.embed_texts(texts)
    assert list(clip._texts) == ["a dog", "an ant"]
    torch.testing.assert_close(together, torch.cat([clip.embed_texts([text]) for text in texts]))


def test_the_score_is_the_models_own(tiny_clip: Path) -> None:
    clip, images, texts = CLIP(str(tiny_clip)), smooth_images(3, 32, 32), ["a cat", "a dog riding a bike", "an ant"]
    tokens = clip.tokenizer(texts, padding="max_length", return_tensors="pt")
    logits = clip.model(**tokens, pixel_values=clip.preprocess(images)).logits_per_image.diagonal()
    reward = load_reward("clip-score", RewardsConfig(clip_score=CLIPScoreConfig(model=str(tiny_clip))))
    torch.testing.assert_close(reward(images, texts, [{}] * 3), logits.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["clip-score", "aesthetic"])
def test_rewards_are_differentiable_in_the_images(name: str) -> None:
    reward = load_reward(name)
    images = smooth_images(2, 64, 64).requires_grad_(True)
    value = reward(images, ["a cat", "a dog"], [{}, {}]).sum()
    value.backward()
    gradient = images.grad
    assert gradient is not None and gradient.isfinite().all()
    direction = gradient / gradient.norm()
    with torch.no_grad():
        step = 1e-2
        up, down = (reward(images + sign * step * direction, ["a cat", "a dog"], [{}, {}]).sum() for sign in (1, -1))
    assert ((up - down) / (2 * step)).item() == pytest.approx(gradient.norm().item(), rel=0.05)


def test_the_embedded_clip_and_head_are_as_good_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CLIP on fewer scenes than the recipe takes, the head on all of them."""
    monkeypatch.setattr(recipe, "NUM_EVALUATION_SCENES", 300)
    published = json.loads((EMBEDDED_CLIP.parent / "figures.json").read_text())
    clip = CLIP("emoji")
    found = measure_clip(clip.model, clip.tokenizer, "cpu") | measure_head(clip.model, load_file(EMBEDDED_HEAD), "cpu")
    assert found.keys() <= published.keys()
    for name, value in found.items():
        assert value == pytest.approx(published[name], abs=0.01)  # float16 weights
    assert found["clip_subject_accuracy"] > 0.95 and found["clip_activity_accuracy"] > 0.9
    assert found["aesthetic_correlation"] > 0.7


def test_the_gold_rule_prefers_what_it_says() -> None:
    def scene(size: int, place: tuple[int, int], colour: str = "red", background: str = "white") -> Tensor:
        canvas = Image.new("RGB", (64, 64), background)
        canvas.paste(Image.new("RGB", (size, size), colour), place)
        return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255

    best = scene(46, (9, 9))
    others = [
        scene(20, (22, 22)),  # smaller
        scene(46, (18, 18)),  # off centre
        scene(46, (9, 9), colour="#806060"),  # pale
        scene(46, (9, 9), background="#909090"),  # on grey
        torch.full((3, 64, 64), 1.0),  # nothing there
        torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)),  # noise
    ]
    ratings = gold_rating(torch.stack([best, *others]))
    assert (ratings[0] > ratings[1:] + 0.5).all()
    assert ratings[0] > 9.5 and (ratings >= 1).all() and (ratings <= 10).all()


def test_the_judge_names_the_animal_of_the_prompt() -> None:
    drawn, scenes = draw_images(3, range(20), "subject")
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
    judge = load_reward("emoji-judge")
    assert judge(images, [scene.caption for scene in scenes], [{}] * 20).values.sum() >= 19
    assert judge(images, [f"{scene.caption} riding a bike" for scene in scenes], [{}] * 20).values.sum() >= 19
    assert judge(images, ["a cat" if "cat" not in scene.caption else "a dog" for scene in scenes], [{}] * 20).values.sum() <= 1


@pytest.mark.parametrize("prompt", ["a doctor", "tench, Tinca tinca", "a catapult", "cat", "a", ""])
def test_the_judge_does_not_judge_what_it_cannot_know(prompt: str) -> None:
    judge = load_reward("emoji-judge")
    found = score(judge, torch.rand(2, 3, 64, 64), ["a cat", prompt], [{}, {}])
    assert found.valid.tolist() == [True, False]
    assert found.error == f"{prompt!r} begins with no animal or thing that the embedded classifier knows"
    with pytest.raises(UserError, match="begins with no animal or thing"):
        try_reward(judge, (3, 64, 64), [prompt], [{}])


def test_clip_judges_activities_that_the_diffusion_model_never_saw() -> None:
    animal = list(DDPO_ANIMALS)[1]
    drawn, scenes = draw_images(4, range(30), "activity", (animal,))
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
    right, wrong = [scene.caption for scene in scenes], [scene.caption.replace(animal, "zebra") for scene in scenes]
    reward = load_reward("clip-score")
    assert ((reward(images, right, []) - reward(images, wrong, [])) > 0).float().mean() > 0.9


class LAIONHead(nn.Module):
    """The shape of LAION's predictor: linear layers with dropouts between them and no nonlinearity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        linear = [nn.Linear(a, b) for a, b in zip((width, 12, 6, 4, 2), (12, 6, 4, 2, 1), strict=True)]
        first, second, third, fourth, last = linear
        self.layers = nn.Sequential(first, nn.Dropout(0.2), second, nn.Dropout(0.2), third, nn.Dropout(0.1), fourth, last)


def test_a_published_pickle_is_converted_by_an_explicit_command(
    tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = LAIONHead(8).eval()
    torch.save(head.state_dict(), tmp_path / "head.pth")
    config = AestheticConfig(model=str(tiny_clip), head=tmp_path / "head.pth")
    with pytest.raises(UserError, match=r"convert_to_safetensors\.py"):
        load_reward("aesthetic", RewardsConfig(aesthetic=config))
    converted = tmp_path / "head.safetensors"
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "head.pth"), str(converted)])
    runpy.run_path(str(EXAMPLES / "convert_to_safetensors.py"), run_name="__main__")
    assert "is a pickle; its 10 tensors" in capsys.readouterr().out
    images = smooth_images(2, 32, 32)
    reward = load_reward("aesthetic", RewardsConfig(aesthetic=AestheticConfig(model=str(tiny_clip), head=converted)))
    with torch.no_grad():
        expected = head.layers(CLIP(str(tiny_clip)).embed_images(images))[:, 0]
        torch.testing.assert_close(reward(images, ["", ""], [{}, {}]), expected)


def save_layers(file: Path, *shapes: tuple[int, int]) -> Path:
    layers = {f"layers.{i}.weight": torch.zeros(*shape) for i, shape in enumerate(shapes)}
    save_file(layers | {f"layers.{i}.bias": torch.zeros(shape[0]) for i, shape in enumerate(shapes)}, file)
    return file


def test_heads_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
    save_file({"scorer.weight": torch.zeros(1, 8)}, tmp_path / "other.safetensors")
    for file, said in [
        (tmp_path / "missing.safetensors", "no such file"),
        (tmp_path / "broken.safetensors", "is not made of layers"),
        (tmp_path / "other.safetensors", "is not made of layers"),
        (save_layers(tmp_path / "narrow.safetensors", (4, 7), (1, 4)), r"\(7 -> 4, 4 -> 1\) does not lead from the model's 8"),
        (save_layers(tmp_path / "wide.safetensors", (2, 8)), "to one score"),
    ]:
        with pytest.raises(UserError, match=said):
            load_head(file, 8)


def copy_with_weights(folder: Path, copy: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_a_model_without_some_of_its_weights_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    """transformers would make them up, and only warn."""

    def cut(weights: dict[str, Tensor]) -> None:
        weights["visual_projection.weight"] = weights["visual_projection.weight"][:, :-1].clone()

    part = copy_with_weights(tiny_clip, tmp_path / "part", lambda weights: weights.pop("visual_projection.weight"))
    none = copy_with_weights(tiny_clip, tmp_path / "none", lambda weights: [weights.pop(name) for name in list(weights)[1:]])
    resized = copy_with_weights(tiny_clip, tmp_path / "resized", cut)
    for folder, said in [
        (part, "its weights lack visual_projection.weight, which would be random"),
        (none, r"its weights lack .*; .*; .* and \d+ more"),
        (resized, r"do not fit visual_projection.weight, \(8, 15\) instead of \(8, 16\)"),
    ]:
        with pytest.raises(UserError, match=said):
            CLIP(str(folder))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("image_mean", None, "has None for image_mean, which must be three numbers"),
        ("image_std", 0.5, "has 0.5 for image_std, which must be three numbers"),
        ("size", None, "has None for size, which must be a shortest_edge, or a height and a width"),
        ("size", {"height": 32}, "for size, which must be"),
    ],
)
def test_image_settings_that_say_too_little_are_refused(
    tiny_clip: Path, tmp_path: Path, key: str, value: Any, said: str
) -> None:
    shutil.copytree(tiny_clip, tmp_path / "clip")
    file = tmp_path / "clip" / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    del settings[key]
    file.write_text(json.dumps(settings if value is None else settings | {key: value}))
    with pytest.raises(UserError, match=rf"preprocessor_config.json of .*{said}"):
        CLIP(str(tmp_path / "clip"))


def test_models_that_do_not_fit_are_refused(tiny_clip: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def load(**settings: Any) -> Any:
        return load_reward("clip-score", RewardsConfig(clip_score=CLIPScoreConfig(**settings)))

    torn = tmp_path / "torn"
    shutil.copytree(tiny_clip, torn)
    (torn / "model.safetensors").write_bytes((tiny_clip / "model.safetensors").read_bytes()[:100])
    for settings, said in [
        ({"model": str(torn)}, "could not be loaded"),
        ({"model": "./nowhere"}, "was not found"),
        ({"model": "some/clip"}, "give the revision of 'some/clip'"),
        ({"model": str(tmp_path)}, "could not be loaded"),
        ({"model": str(tiny_folder / "text_encoder"), "processor": str(tiny_clip)}, "not a model of images and texts"),
    ]:
        with pytest.raises(UserError, match=said):
            load(**settings)
    with pytest.raises(UserError, match=r"rewards\.aesthetic\.head is needed"):
        load_reward("aesthetic", RewardsConfig(aesthetic=AestheticConfig(model=str(tiny_clip))))
