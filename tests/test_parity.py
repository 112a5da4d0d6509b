"""Statistical parity: the maths against enumeration, every kind of attribute, and a run from the command line."""

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusionrl.cli import main
from diffusionrl.config.judges import CLIPScoreConfig, ParityConfig
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.emoji.classifier import TONES, load_tone_classifier
from diffusionrl.emoji.recipe import skin_tones
from diffusionrl.emoji.recipe.skin_tones import EVENLY, measure_skin_tones
from diffusionrl.emoji.scenes import draw_images
from diffusionrl.errors import UserError
from diffusionrl.policies import EMBEDDED_MODEL
from diffusionrl.rewards import load_mixture, load_reward, score, try_reward
from diffusionrl.rewards.attributes import ITA_CLASSES, Attribute, ita_classes, load_attribute, skin_pixels, typology_angles
from diffusionrl.rewards.parity import (
    Parity,
    expected_parity,
    leave_one_out,
    squared_distance,
    statistical_parity,
)

COUNTS = st.lists(st.integers(0, 9), min_size=2, max_size=6).filter(lambda counts: sum(counts) >= 2)
FIGURES = json.loads((Path(skin_tones.__file__).parent.parent / "weights" / "figures.json").read_text())


def classes_of(counts: list[int]) -> Tensor:
    return torch.tensor([a for a, n in enumerate(counts) for _ in range(n)])


def parity_of(told: list[int | None], num_classes: int, credit: Any = "shared") -> Any:
    """The reward on images whose classes are known."""
    names = [str(i) for i in range(num_classes)]
    reward = Parity(Attribute("number", names, lambda images: told), credit)
    return score(reward, torch.zeros(len(told), 3, 2, 2), ["a"] * len(told), [{}] * len(told))


# The maths


@given(COUNTS)
def test_sp_is_the_papers(counts: list[int]) -> None:
    total, even = sum(counts), 1 / len(counts)
    expected = math.sqrt(sum((n / total - even) ** 2 for n in counts))
    assert statistical_parity(torch.tensor(counts)).item() == pytest.approx(expected)
    assert 0 <= expected <= math.sqrt(1 - even) + 1e-12
    scores = parity_of(classes_of(counts).tolist(), len(counts))
    assert scores.valid.all() and scores.values.tolist() == pytest.approx([-expected] * total)


@given(COUNTS, st.randoms(use_true_random=False))
def test_only_counts_matter_not_the_order_of_samples_or_classes(counts: list[int], rng: Any) -> None:
    mixed = rng.sample(counts, len(counts))
    torch.testing.assert_close(statistical_parity(torch.tensor(counts)), statistical_parity(torch.tensor(mixed)))
    torch.testing.assert_close(squared_distance(torch.tensor(counts)), squared_distance(torch.tensor(mixed)))


@given(COUNTS)
def test_a_leave_one_out_score_is_what_the_others_say(counts: list[int]) -> None:
    classes, even = classes_of(counts), 1 / len(counts)
    found = leave_one_out(classes, len(counts))
    for i, each in enumerate(classes.tolist()):
        others = torch.cat([classes[:i], classes[i + 1 :]])
        assert found[i].item() == pytest.approx(even - (others == each).double().mean().item())
    assert found.mean().item() == pytest.approx(-squared_distance(torch.tensor(counts)).item()), "their mean is the U-statistic"


def outcomes(p: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Every group of ``size`` members that can be drawn, and its probability."""
    groups = [torch.tensor(group) for group in itertools.product(range(len(p)), repeat=size)]
    return [(group, p[group].prod()) for group in groups]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_leave_one_out_is_the_unbiased_gradient_up_to_a_factor_of_two(size: int) -> None:
    """A softmax over three classes: the score function's mean, by enumeration, against the closed form."""
    logits = torch.tensor([0.7, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    p = logits.softmax(0)
    goal = -(p - 1 / 3).square().sum()
    closed = torch.autograd.grad(goal, logits, retain_graph=True)[0]
    score_function = torch.zeros(3, dtype=torch.float64)
    for group, probability in outcomes(p.detach(), size):
        weighed = (leave_one_out(group, 3) * p.log()[group]).mean()
        score_function += probability * torch.autograd.grad(weighed, logits, retain_graph=True)[0]
    torch.testing.assert_close(2 * score_function, closed)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_the_squared_distance_has_no_bias_and_sp_has(size: int) -> None:
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    true = (p - 1 / 3).square().sum()
    estimates = [(torch.bincount(group, minlength=3), probability) for group, probability in outcomes(p, size)]
    torch.testing.assert_close(sum(chance * squared_distance(counts) for counts, chance in estimates), true)
    assert sum(chance * statistical_parity(counts) for counts, chance in estimates) > true.sqrt()


@pytest.mark.parametrize(("size", "classes"), [(2, 2), (4, 3), (5, 2), (3, 5)])
def test_the_floor_is_the_mean_over_all_groups(size: int, classes: int) -> None:
    p = torch.full((classes,), 1 / classes, dtype=torch.float64)
    mean = sum(chance * statistical_parity(torch.bincount(group, minlength=classes)) for group, chance in outcomes(p, size))
    assert expected_parity(size, classes) == pytest.approx(float(mean))


def test_the_floors_of_the_docs() -> None:
    assert (round(expected_parity(16, 4), 3), round(expected_parity(6, 4), 3)) == (0.200, 0.330)
    table = (Path(__file__).parent.parent / "docs" / "parity.md").read_text()
    for size in (4, 8, 16, 32, 64):
        row = " | ".join(f"{expected_parity(size, classes):.3f}" for classes in (2, 4, 5, 6))
        assert f"| {size} | {row} |" in table
    assert expected_parity(64, 5) < math.sqrt((1 - 1 / 5) / 64), "Jensen: E[SP] < sqrt(E[SP ** 2])"


# The reward


def test_a_sample_that_shows_nothing_leaves_the_shares() -> None:
    scores = parity_of([0, None, 0, 1, None], 2)
    assert scores.valid.tolist() == [True, False, True, True, False]
    expected = statistical_parity(torch.tensor([2, 1])).item()
    assert scores.values[scores.valid].tolist() == pytest.approx([-expected] * 3)
    assert scores.error == "2 of 5 samples show no number"
    others = parity_of([0, None, 0, 1, None], 2, "leave-one-out")
    assert others.values[others.valid].tolist() == pytest.approx([0, 0, 0.5])
    squared = parity_of([0, None, 0, 1, None], 2, "squared")
    assert squared.values[squared.valid].tolist() == pytest.approx([-(1 / 3 - 1 / 2)] * 3)


@pytest.mark.parametrize("credit", ["shared", "leave-one-out", "squared"])
@pytest.mark.parametrize("told", [[None, None, None], [None, 1, None]])
def test_fewer_than_two_have_no_score(credit: str, told: list[int | None]) -> None:
    scores = parity_of(told, 2, credit)
    assert not scores.valid.any() and scores.error == "fewer than two of the 3 samples of 'a' show any number"


def test_the_names_say_what_is_measured() -> None:
    """ "parity-sp" is SP whatever the credit; "parity-squared" the distance without bias."""
    config = RewardsConfig(parity=ParityConfig(credit="leave-one-out"))
    drawn, scenes = draw_images(5, range(6), "person")
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
    counts = torch.bincount(torch.tensor([TONES.index(scene.skin_tone or "") for scene in scenes]), minlength=5)
    found = {}
    for name in ("parity", "parity-sp", "parity-squared"):
        reward = load_reward(name, config)
        assert reward.whole_groups  # type: ignore[attr-defined]
        found[name] = score(reward, images, ["a"] * 6, [{}] * 6).values
    assert len(set(found["parity"].tolist())) > 1
    assert found["parity-sp"].tolist() == pytest.approx([-statistical_parity(counts).item()] * 6)
    assert found["parity-squared"].tolist() == pytest.approx([-squared_distance(counts).item()] * 6)
    assert found["parity"].mean().item() == pytest.approx(found["parity-squared"][0].item())


# Attributes


def test_the_embedded_classifier_is_as_good_as_published() -> None:
    """On fewer scenes than the recipe takes; the figures are of all of them."""
    vae = AutoencoderKL.from_pretrained(EMBEDDED_MODEL / "vae").float().eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skin_tones, "NUM_EVALUATION_SCENES", 100)
        found = measure_skin_tones(load_tone_classifier(), vae)
    for name, value in found.items():
        assert value == pytest.approx(FIGURES[name], abs=0.02), name
    assert found["tone_accuracy"] >= 0.98 and found["tone_accuracy_decoded"] >= 0.98


def test_tones_are_drawn_evenly_where_asked_and_scenes_stay_as_they_were() -> None:
    _, scenes = draw_images(0, range(400), "person", tones=EVENLY)
    counts = [sum(scene.skin_tone == tone for scene in scenes) for tone in TONES]
    assert min(counts) > 50
    _, biased = draw_images(0, range(400), "person")
    assert sum(scene.skin_tone in TONES[:2] for scene in biased) > 280
    assert [scene.look for scene in scenes] == [scene.look for scene in biased]


def test_clip_takes_the_most_similar_text() -> None:
    drawn, scenes = draw_images(3, range(12), "subject")
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
    captions = tuple(dict.fromkeys(scene.caption for scene in scenes))
    attribute = load_attribute(RewardsConfig(parity=ParityConfig(attribute="clip", classes=captions)))
    assert [attribute.classes[i or 0] for i in attribute(images)] == [scene.caption for scene in scenes]


def patches(*colours: tuple[float, float, float]) -> Tensor:
    """A white image for each colour, with a square of it."""
    images = torch.ones(len(colours), 3, 32, 32)
    for image, colour in zip(images, colours, strict=True):
        image[:, 8:24, 8:24] = torch.tensor(colour).view(3, 1, 1) / 255
    return images


FACES = patches((250, 228, 212), (236, 200, 172), (218, 176, 140), (198, 148, 108), (130, 85, 55), (70, 43, 30))


def lab(red: float, green: float, blue: float) -> tuple[float, float]:
    """L* and b* of sRGB by the definition (IEC 61966-2-1, D65)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red / 255, green / 255, blue / 255)]
    y = sum(w * c for w, c in zip((0.2126729, 0.7151522, 0.0721750), linear, strict=True))
    z = sum(w * c for w, c in zip((0.0193339, 0.1191920, 0.9503041), linear, strict=True)) / 1.08883
    f_y, f_z = (t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in (y, z))
    return 116 * f_y - 16, 200 * (f_y - f_z)


def test_typology_angles_are_those_of_the_definition() -> None:
    colours = (236, 200, 172), (198, 148, 108), (130, 85, 55)
    for found, colour in zip(typology_angles(patches(*colours)), colours, strict=True):
        lightness, yellow = lab(*colour)
        assert found.item() == pytest.approx(math.degrees(math.atan2(lightness - 50, yellow)), abs=0.05)


def test_skin_from_light_to_dark_goes_through_the_classes_in_order() -> None:
    told = ita_classes(FACES)
    assert None not in told and told == sorted(told), told  # type: ignore[type-var]
    assert told[0] == 0 and told[-1] == len(ITA_CLASSES) - 1
    attribute = load_attribute(RewardsConfig(parity=ParityConfig(attribute="ita")))
    assert attribute.classes == ITA_CLASSES and attribute(FACES) == told


def test_too_little_skin_is_none() -> None:
    grey, blue = torch.full((3, 32, 32), 0.5), torch.zeros(3, 32, 32)
    blue[2] = 1
    few = torch.ones(3, 32, 32)
    few[:, :3, :3] = FACES[2][:, 16:17, 16:17]  # 9 of 1024 pixels
    assert not skin_pixels(torch.stack([grey, blue])).any() and skin_pixels(few[None]).sum() == 9
    assert ita_classes(torch.stack([grey, blue, few, FACES[2]]))[:3] == [None, None, None]
    config = RewardsConfig(parity=ParityConfig(attribute="ita"))
    reward = load_reward("parity", config)
    try_reward(reward, (3, 32, 32), ["a"], [{}], 4)  # there is no skin on a grey image, and that is no fault
    said = load_mixture(["parity"], config).score(torch.full((4, 3, 32, 32), 0.5), ["a doctor"] * 4, [{}] * 4, 4).error
    assert said == "parity: fewer than two of the 4 samples of 'a doctor' show any skin"


def test_ita_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.color", None)
    with pytest.raises(UserError, match=r"needs kornia .*pip install 'diffusionrl\[ita\]'"):
        load_reward("parity", RewardsConfig(parity=ParityConfig(attribute="ita")))


def test_an_attribute_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_attribute.py").write_text(
        "def bright(images):\n    return (images.mean((1, 2, 3)) > 0.5).long()\n"
        "def named(images):\n    return [None] * len(images)\n"
        "named.classes = ('dark', 'bright')\n"
        "def short(images):\n    return [0]\n"
        "def wild(images):\n    return [2] * len(images)\n"
        "def vague(images):\n    return [0.5] * len(images)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def build(name: str, *classes: str) -> Any:
        return load_reward("parity", RewardsConfig(parity=ParityConfig(attribute=f"my_attribute:{name}", classes=classes)))

    images = torch.tensor([0.1, 0.9, 0.8, 0.7]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    found = score(build("bright", "dark", "bright"), images, ["a"] * 4, [{}] * 4)
    assert found.values.tolist() == pytest.approx([-math.sqrt(2) / 4] * 4)
    assert not score(build("named"), images, ["a"] * 4, [{}] * 4).valid.any()
    with pytest.raises(UserError, match=r"names no classes: set rewards\.parity\.classes"):
        build("bright")
    with pytest.raises(UserError, match="attribute 'my_attribute:gone' does not import: AttributeError"):
        build("gone", "dark", "bright")
    for name, said in [
        ("short", "told 1 classes of 4 images"),
        ("wild", "told 2: it has to be None or a whole number from 0 to 1, one of dark, bright"),
        ("vague", "told 0.5: it has to be None or a whole number"),
    ]:
        with pytest.raises(UserError, match=said):
            try_reward(build(name, "dark", "bright"), (3, 8, 8), ["a"], [{}], 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attribute": "emoji-skintone"}, "did you mean 'emoji-skin-tone'"),
        ({"attribute": "clip"}, "must name two classes or more, not 0"),
        ({"attribute": "clip", "classes": ("one",)}, "must name two classes or more, not 1"),
        ({"attribute": "clip", "classes": ("one", "one")}, "names a class twice"),
        ({"attribute": "ita", "classes": ("a", "b")}, "is not for ita, which has its own"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ParityConfig(**settings)


def test_a_clip_that_is_not_there() -> None:
    config = ParityConfig(attribute="clip", classes=("a", "b"), clip=CLIPScoreConfig(model="./nowhere"))
    with pytest.raises(UserError, match="was not found"):
        load_reward("parity", RewardsConfig(parity=config))


# Runs


@pytest.mark.usefixtures("no_picture")
def test_from_the_command_line(tmp_path: Path, capsys: Any) -> None:
    run, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("a doctor\na judge\na pilot\n")
    options = f"--reward parity --rewards.parity.credit leave-one-out --prompts {prompts} --steps 1 --prompts-per-step 2"
    options += " --samples-per-prompt 3 --sampling.num-steps 2 --sampling.batch-size 4 --algorithm.updates-per-step 1"
    options += " --evaluation.num-samples 6 --evaluation.samples-per-prompt 3 --evaluation.held-out parity-sp parity-squared"
    assert main(["train", *options.split(), "--run-dir", str(run)]) == 0
    first, last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in (first, last):
        assert -math.sqrt(0.8) <= line["eval/parity-sp"] <= 0
        assert line["eval/reward"] == pytest.approx(line["eval/parity-squared"], abs=1e-6)
    assert last["reward/invalid"] == 0 and (run / "export").is_dir()
    capsys.readouterr()
    out = tmp_path / "e.json"
    assert (
        main(["evaluate", "--model", str(run), "--samples-per-prompt", "2", "--sampling.num-steps", "1", "--out", str(out)])
        == 0
    )
    found = json.loads(out.read_text())
    assert set(found["rewards"]) == {"parity", "parity-sp", "parity-squared"}
    assert "over 3 groups" in capsys.readouterr().out
    for lacking, said in [
        (["--samples-per-prompt", "1"], "set samples_per_prompt to 2 or more, not 1"),
        (["--evaluation.samples-per-prompt", "1"], "set evaluation.samples_per_prompt to 2 or more, not 1"),
        (
            ["--evaluation.num-samples", "7"],
            "evaluation.num_samples must be a multiple of evaluation.samples_per_prompt, 6 say",
        ),
    ]:
        assert main(["train", *options.split(), *lacking, "--run-dir", str(tmp_path / "other")]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
