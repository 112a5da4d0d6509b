"""Images and captions are what people see: transparency on white, 16 bits scaled, every column of a table accounted for."""

import base64
import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusionrl.config import PretrainingConfig
from diffusionrl.data.media import open_image, to_rgb
from diffusionrl.data.pairs import FolderPairs, load_pairs
from diffusionrl.errors import UserError

LINE = '{"file_name": "0.png", "text": "a cat"}\n'


def grey16(value: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, np.uint16))


def see_through(hidden: tuple[int, int, int], alpha: int = 0) -> Image.Image:
    """A red square amid what lies under the transparency."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[...] = [*hidden, alpha]
    pixels[2:6, 2:6] = [255, 0, 0, 255]
    return Image.fromarray(pixels)


def turned() -> tuple[Image.Image, dict[str, Any]]:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((8, 4, 3), np.uint8)
    pixels[:4] = 255  # white above black, to be turned to the right
    return Image.fromarray(pixels), {"exif": exif}


def palette() -> tuple[Image.Image, dict[str, Any]]:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((3, 3), 1)
    return image, {"transparency": 0}


PICTURES: list[tuple[str, Callable[[], Any], dict[tuple[int, int], tuple[int, int, int]]]] = [
    ("png", lambda: grey16(40000), {(0, 0): (156, 156, 156)}),
    ("png", lambda: grey16(600), {(0, 0): (2, 2, 2)}),
    ("png", lambda: grey16(16384), {(0, 0): (64, 64, 64)}),
    ("png", lambda: (grey16(600), {"transparency": 600}), {(0, 0): (255, 255, 255)}),
    ("png", lambda: see_through((0, 255, 0)), {(0, 0): (255, 255, 255), (3, 3): (255, 0, 0)}),
    ("webp", lambda: (see_through((0, 0, 0)), {"lossless": True}), {(0, 0): (255, 255, 255), (3, 3): (255, 0, 0)}),
    ("png", lambda: see_through((0, 0, 255), 51), {(0, 0): (204, 204, 255)}),
    ("png", palette, {(0, 0): (255, 255, 255), (3, 3): (255, 0, 0)}),
    ("png", lambda: Image.new("LA", (8, 8), (0, 0)), {(0, 0): (255, 255, 255)}),
    ("png", lambda: (Image.new("RGB", (8, 8), (1, 2, 3)), {"transparency": (1, 2, 3)}), {(0, 0): (255, 255, 255)}),
    ("png", lambda: Image.new("1", (8, 8), 1), {(0, 0): (255, 255, 255)}),
    ("jpg", turned, {(0, 0): (0, 0, 0), (7, 0): (255, 255, 255)}),
]


@pytest.mark.parametrize(("suffix", "make", "seen"), PICTURES)
def test_what_people_see(tmp_path: Path, suffix: str, make: Callable[[], Any], seen: dict[Any, Any]) -> None:
    """In pairs, in prompts, and by the reward server."""

    from diffusionrl.serving.requests import parse

    made = make()
    image, options = made if isinstance(made, tuple) else (made, {})
    file = tmp_path / f"0.{suffix}"
    image.save(file, **options)
    (tmp_path / "0.txt").write_text("a cat")
    found = [FolderPairs(tmp_path).draw(0)[0], open_image(file)]
    if suffix == "png":
        asked = {"images": [base64.b64encode(file.read_bytes()).decode()], "prompts": ["a cat"], "metadata": [{}]}
        request = parse(json.dumps(asked).encode())
        request.decode(threading.Lock())
        found.append(Image.fromarray(request.images[0].numpy()))
    for each in found:
        assert each.mode == "RGB"
        assert {place: each.getpixel(place) for place in seen} == seen


def test_values_without_a_range_are_refused() -> None:
    with pytest.raises(UserError, match="floating-point"):
        to_rgb(Image.fromarray(np.ones((4, 4), np.float32)))


@settings(max_examples=examples(60))
@given(
    st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]),
    st.integers(0, 255),
    st.integers(0, 255),
    st.sampled_from(["PNG", "WEBP"]),
)
def test_any_mode_on_white(mode: str, level: int, alpha: int, kind: str) -> None:
    """A plain picture of one grey level, in whichever mode it is saved."""
    shown = 255 * (level >= 128) if mode == "1" else level
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), level * 257, np.uint16))
    elif mode in ("LA", "RGBA"):
        image = Image.new(mode, (4, 4), (*[level] * (len(mode) - 1), alpha))
        shown = round(255 + (level - 255) * alpha / 255)
    else:
        image = Image.new("L", (4, 4), shown).convert(mode)
    file = io.BytesIO()
    if kind == "WEBP" and mode == "I;16":
        return
    image.save(file, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    got = np.asarray(to_rgb(Image.open(file)), int)
    assert np.abs(got - shown).max() <= 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("file_name,text\n0.png,a cat, red\n", r"metadata\.csv:2: 3 columns, and the first line names 2 .*double quotes"),
        ("image,caption\n0.png,a cat\n", r"metadata\.csv:2 has no file_name \(it has \['caption', 'image'\]\)"),
        ("file_name,text\n0.png\n", r"metadata\.csv:2: 1 columns"),
        ("file_name,text\n0.png,\n", r"metadata\.csv:2 has no text"),
        ("file_name,text,text\n0.png,a,b\n", "two columns 'text'"),
        ("file_name,text\n1.png,a cat\n", r"1 images in .* are not there, .*max_broken = 0: 1\.png"),
        ("file_name,text\npipe,a cat\n", r"not there, or no files, .*: pipe"),
        ('file_name,text\n0.png,"a cat\n', "double quotes"),
    ],
)
def test_captions_that_cannot_be_meant(tmp_path: Path, content: str, said: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "metadata.csv").write_text(content)
    with pytest.raises(UserError, match=said):
        FolderPairs(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "file_name, text\n0.png, a cat\n",
        "File_Name;Text\r\n0.png;a cat\r\n;\r\n",
        "text\tfile_name\na cat\t0.png\n",
        'file_name,text,author\n0.png,"a cat",me\n',
    ],
)
def test_captions_as_people_write_them(tmp_path: Path, content: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert FolderPairs(tmp_path).draw(0)[1] == "a cat"


def test_a_caption_in_a_text_file_beside_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "pairs" / "10_cats"
    folder.mkdir(parents=True)
    for name in ("0.png", "1.JPG"):
        Image.new("RGB", (4, 4)).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"\ufeffa cat, {name}\n")
    (folder / "notes.txt").write_text("not a caption")
    pairs = load_pairs(PretrainingConfig("~/pairs"))
    assert pairs is not None and [pairs.draw(i)[1] for i in range(2)] == ["a cat, 0.png", "a cat, 1.JPG"]
    (folder / "1.txt").write_text("\n")
    with pytest.raises(UserError, match=r"1\.txt is empty"):
        FolderPairs(tmp_path / "pairs")
    (folder / "1.txt").write_text("\ud83d", errors="surrogatepass")
    with pytest.raises(UserError, match="not UTF-8"):
        FolderPairs(tmp_path / "pairs")
