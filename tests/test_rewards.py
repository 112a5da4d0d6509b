"""Rewards: the paper's JPEG conventions, and what a user's function may do."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffusionrl.config.rewards import BUILT_IN_REWARDS
from diffusionrl.data.images import to_pil
from diffusionrl.errors import UserError
from diffusionrl.rewards import REGISTRY, Scores, load_reward, score, try_reward
from diffusionrl.rewards.jpeg import jpeg_kilobytes

FLAT = torch.full((3, 64, 64), 0.5)
NOISE = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 8, 8), (1, 64), (2,)])
def test_noise_is_a_number_of_any_sample(shape: tuple[int, ...]) -> None:
    samples = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    first, again = (load_reward("noise")(samples.clone(), [""] * 4, [{}] * 4) for _ in range(2))
    assert len(set(first.tolist())) == 4 and torch.equal(first, again)


def test_noise_is_larger_than_a_flat_image() -> None:
    assert jpeg_kilobytes(FLAT) < 10 < jpeg_kilobytes(NOISE)
    images = torch.stack([FLAT, NOISE])
    large = load_reward("incompressibility")(images, ["", ""], [{}, {}])
    small = load_reward("compressibility")(images, ["", ""], [{}, {}])
    assert large == [jpeg_kilobytes(FLAT), jpeg_kilobytes(NOISE)]
    assert small == [-size for size in large]


def test_size_is_that_of_a_512_pixel_file_at_quality_95_in_thousands_of_bytes() -> None:
    pixels = to_pil(NOISE).resize((512, 512), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    pixels.save(file, format="JPEG", quality=95, subsampling="4:2:0")
    assert jpeg_kilobytes(NOISE) == len(file.getvalue()) / 1000
    native = torch.rand(3, 512, 512, generator=torch.Generator().manual_seed(1))
    file = io.BytesIO()
    to_pil(native).save(file, format="JPEG", quality=95)
    assert jpeg_kilobytes(native) == len(file.getvalue()) / 1000


def test_pixels_are_rounded_not_truncated() -> None:
    assert to_pil(torch.full((3, 1, 1), 0.999)).getpixel((0, 0)) == (255, 255, 255)
    assert to_pil(torch.full((3, 1, 1), 0.501)).getpixel((0, 0)) == (128, 128, 128)


def returning(value: Any) -> Any:
    return lambda images, prompts, metadata: value


@pytest.mark.parametrize("value", [[1, 2], (1.5, 2.5), torch.tensor([1, 2]), torch.tensor([1.0, 2.0], requires_grad=True)])
def test_any_two_numbers_are_scores(value: Any) -> None:
    found = score(returning(value), torch.zeros(2, 3, 8, 8), ["a", "b"], [{}, {}])
    assert found.values.dtype == torch.float64
    assert found.valid.all()
    assert found.error is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), None])
def test_a_missing_score_is_invalid_not_zero(bad: float | None) -> None:
    found = score(returning([1.0, bad]), torch.zeros(2, 3, 8, 8), ["a", "b"], [{}, {}])
    assert found.valid.tolist() == [True, False]
    assert found.error is not None and "'b'" in found.error


def test_an_exception_makes_its_samples_invalid_and_is_kept() -> None:
    def broken(images: Any, prompts: Any, metadata: Any) -> Any:
        raise OSError("no disk")

    found = score(broken, torch.zeros(2, 3, 8, 8), ["a", "b"], [{}, {}])
    assert not found.valid.any()
    assert found.error == "OSError: no disk"
    joined = Scores.join([found, score(returning([1, 2]), torch.zeros(2, 3, 8, 8), ["a", "b"], [{}, {}])])
    assert joined.valid.tolist() == [False, False, True, True]
    assert joined.error == "OSError: no disk"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1.0], "list of length 1"),
        (torch.zeros(2, 1), r"Tensor of shape \(2, 1\)"),
        (3.0, "float"),
        (["x", "y"], "list"),
        (None, "NoneType"),
    ],
)
def test_a_wrong_length_or_type_is_an_error_at_first_and_invalid_later(value: Any, said: str) -> None:
    contract = f"one number a sample, here 2; it returned a {said}"
    with pytest.raises(UserError, match=contract):
        try_reward(returning(value), (3, 8, 8), ["a"], [{}])
    found = score(returning(value), torch.zeros(2, 3, 8, 8), ["a", "b"], [{}, {}])
    assert not found.valid.any()
    assert re.search(contract, found.error or "")


def test_rewards_are_tried_before_anything_slow() -> None:
    def broken(images: Any, prompts: Any, metadata: Any) -> Any:
        raise KeyError("colour")

    with pytest.raises(UserError, match=r"failed on two grey 64 x 64 images: KeyError: 'colour'"):
        try_reward(broken, (3, 64, 64), ["a cat"], [{}])
    with pytest.raises(UserError, match="one number a sample"):
        try_reward(returning([1.0]), (3, 64, 64), ["a cat"], [{}])
    try_reward(load_reward("compressibility"), (3, 64, 64), ["a cat"], [{}])
    try_reward(returning([None, None]), (3, 64, 64), ["a cat"], [{}])  # nothing to see on a grey image is no fault


def test_rewards_build_no_graph() -> None:
    weight = torch.ones(1, requires_grad=True)
    graph: list[bool] = []
    score(
        lambda images, p, m: graph.append((images.mean((1, 2, 3)) * weight).requires_grad) or [0.0, 0.0],
        torch.zeros(2, 3, 8, 8),
        ["", ""],
        [{}, {}],
    )
    assert graph == [False]


def test_a_reward_may_say_itself_what_is_invalid_and_why() -> None:
    said = Scores(torch.tensor([1.0, 0.0]), torch.tensor([True, False]), "the server sleeps")
    found = score(returning(said), torch.zeros(2, 3, 8, 8), ["a", "b"], [{}, {}])
    assert found.valid.tolist() == [True, False]
    assert found.error == "the server sleeps"
    nothing = Scores(torch.zeros(2), torch.zeros(2).bool(), "the server sleeps")
    with pytest.raises(UserError, match="grey 8 x 8 images: the server sleeps"):
        try_reward(returning(nothing), (3, 8, 8), ["a"], [{}])


def test_a_score_outside_the_rewards_range_is_invalid() -> None:
    def share(images: Any, prompts: Any, metadata: Any) -> list[float]:
        return [0.5, 7.2]

    share.range = (0.0, 1.0)  # type: ignore[attr-defined]
    found = score(share, torch.zeros(2, 3, 8, 8), ["a", "b"], [{}, {}])
    assert found.valid.tolist() == [True, False]
    assert found.error == "it returned 7.2 for 'b', outside its range of 0 to 1"


def test_the_built_in_names_are_known_without_torch() -> None:
    assert sorted(REGISTRY) == sorted(BUILT_IN_REWARDS)


def test_own_rewards_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_found.py").write_text(
        "def red(images, prompts, metadata):\n    return images[:, 0].mean((1, 2))\nsize = 3\n"
    )
    (tmp_path / "mine_broken.py").write_text("import nothing_like_this\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_reward("mine_found:red")(torch.ones(1, 3, 2, 2), ["a"], [{}]).tolist() == [1.0]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "beside_it.py").write_text("factor = 2\n")
    (tmp_path / "sub" / "json.py").write_text(
        "from beside_it import factor\ndef red(images, prompts, metadata): return factor * images[:, 0].mean((1, 2))\n"
        "def no(images, prompts, metadata): return -red(images, prompts, metadata)\n"
    )
    red, no = load_reward("./sub/json.py:red"), load_reward(f"{tmp_path}/sub/json.py:no")
    assert red(torch.ones(1, 3, 2, 2), ["a"], [{}]).tolist() == [2.0]
    assert no.__globals__ is red.__globals__, "a file is one module"
    for name, said in [
        ("none.py:red", "FileNotFoundError"),
        ("compresibility", "did you mean 'compressibility'"),
        ("mine_found:blue", "AttributeError"),
        ("mine_found:size", "is a int, not a function"),
        ("mine_broken:red", "ModuleNotFoundError"),
        ("no_such_module:red", "ModuleNotFoundError"),
    ]:
        with pytest.raises(UserError, match=said):
            load_reward(name)
