"""Samples to files, and images that a prompt names: pictures, clips that play, and sound with a picture of its wave."""

import io
import wave
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusionrl.data.entries import Prompt
from diffusionrl.data.images import to_pil
from diffusionrl.errors import UserError, describe, require

FORMATS = ("JPEG", "PNG", "WEBP")  # of Pillow's some forty decoders, the ones that are needed
FRAME_RATE = 16
"""Frames a second of a clip that is written."""
Show = Callable[[Tensor], Tensor]
"""Pictures of samples that are none themselves: (B, *sample_shape) -> (B, 3, H, W) in [0, 1]."""
_BLANK = (3, 64, 64)
_WAVE = (256, 96)  # pixels of the picture of a wave
_INPUT = 512  # longest side


def kind_of(sample_shape: Sequence[int]) -> str:
    """ "sound", "image" or "video"."""
    return {2: "sound", 3: "image", 4: "video"}[len(sample_shape)]


def shown(show: Show | None, samples: Tensor) -> tuple[Tensor, str | None]:
    """What is to be seen of samples, on the CPU: they themselves, or pictures of them. Where these cannot be made, grey ones,
    and what is wrong."""
    if show is None:
        return samples, None
    try:
        with torch.no_grad():
            made = torch.as_tensor(show(samples.clone())).float().cpu()
        told = f"show makes {tuple(made.shape)} of {len(samples)} samples, not ({len(samples)}, 3, H, W)"
        require(made.ndim == 4 and made.shape[:2] == (len(samples), 3) and made.numel() > 0, told)
    except Exception as error:  # it is the user's, and a run goes on without
        return torch.full((len(samples), *_BLANK), 0.5), describe(error)
    return made.nan_to_num(0.5).clamp(0, 1), None


def still(sample: Tensor) -> Image.Image:
    """A picture of a sample: an image, (3, H, W); the frame in the middle of a video, (F, 3, H, W); or the wave of a sound,
    (C, S)."""
    if sample.ndim == 2:
        return _wave_picture(sample)
    return to_pil(sample if sample.ndim == 3 else sample[len(sample) // 2])


def write_sample(sample: Tensor, file: Path, sampling_rate: int | None = None) -> None:
    """``file``, a PNG; beside it, under the same name, a video is an animated WebP, and a sound a WAV of 16 bits."""
    still(sample).save(file)
    if sample.ndim == 4:
        first, *others = [to_pil(frame) for frame in sample]
        duration = round(1000 / FRAME_RATE)
        first.save(file.with_suffix(".webp"), save_all=True, append_images=others, duration=duration, loop=0, quality=90)
    elif sample.ndim == 2:
        assert sampling_rate is not None
        levels = (sample.clamp(-1, 1) * 32767).round().to(torch.int16)
        with wave.open(str(file.with_suffix(".wav")), "wb") as written:
            written.setnchannels(len(levels))
            written.setsampwidth(2)
            written.setframerate(sampling_rate)
            written.writeframes(levels.T.contiguous().numpy().tobytes())


def write_inputs(media: Mapping[str, Path | Image.Image], folder: Path, index: int) -> None:
    """What a prompt names, scaled down, as ``inputs/INDEX_NAME.png`` beside the sample of that index."""
    for name, medium in media.items():
        picture = open_image(medium)
        picture.thumbnail((_INPUT, _INPUT))
        (folder / "inputs").mkdir(exist_ok=True)
        picture.save(folder / "inputs" / f"{index:05d}_{name}.png")


def _wave_picture(sound: Tensor) -> Image.Image:
    """The lowest and the highest value of each column's stretch of time."""
    width, height = _WAVE
    values = sound.mean(0).clamp(-1, 1).numpy()
    edges = np.linspace(0, len(values), width + 1).astype(int)
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    for column, (start, stop) in enumerate(pairwise(edges)):
        stretch = values[start : max(stop, start + 1)]
        low, high = ((1 - each) / 2 * (height - 1) for each in (stretch.max(), stretch.min()))
        pixels[int(low) : int(high) + 1, column] = (68, 119, 170)
    return Image.fromarray(pixels)


def stills(samples: Sequence[Tensor] | Tensor) -> list[Image.Image]:
    return [still(sample) for sample in samples]


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB as people see it: turned as its camera was held, on white where it is transparent, 16 bits scaled to 8.

    Raises:
        UserError: its values are of a kind that has no known range.
    """
    turned = ImageOps.exif_transpose(image)
    if turned.mode == "F":
        raise UserError("an image of floating-point values has no known range: save it with 8 or 16 bits")
    if turned.mode.startswith("I"):
        values = np.asarray(turned).astype(np.int64)
        levels = ((values.clip(0, 65535) * 255 + 32767) // 65535).astype(np.uint8)
        if "transparency" in turned.info:  # the value that is
            levels[values == turned.info["transparency"]] = 255
        return Image.fromarray(levels).convert("RGB")
    if not turned.has_transparency_data:
        return turned.convert("RGB")
    layer = turned.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def one_of_each_size(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Of prompts that name images, the first of each size of theirs. Only the images' headers are read."""
    found: dict[Any, Prompt] = {}
    for prompt in prompts:
        if prompt.media:
            found.setdefault(str([_size(medium) for medium in prompt.media.values()]), prompt)
    return list(found.values())


def _size(medium: Path | Image.Image) -> tuple[int, int]:
    if isinstance(medium, Image.Image):
        return medium.size
    try:
        with Image.open(medium, formats=FORMATS) as image:
            return image.size
    except Exception as error:  # Pillow raises whatever a broken file leads it to
        raise UserError(f"image {medium} of a prompt cannot be read: {type(error).__name__}: {error}") from error


def decode(image: Path | bytes) -> Image.Image:
    """See ``to_rgb``. Raises whatever a broken file leads Pillow to."""
    if isinstance(image, Path) and not image.is_file():  # a pipe would be waited for
        raise FileNotFoundError("there is no such file")
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as opened:
        return to_rgb(opened)


def open_image(medium: Path | Image.Image) -> Image.Image:
    """Of a prompt: see ``to_rgb``.

    Raises:
        UserError: it is not there, or does not decode.
    """
    if isinstance(medium, Image.Image):
        return to_rgb(medium)
    try:
        with Image.open(medium, formats=FORMATS) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow raises whatever a broken file leads it to
        raise UserError(f"image {medium} of a prompt cannot be read: {type(error).__name__}: {error}") from error
