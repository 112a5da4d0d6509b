"""Images, clips and sounds as data URIs, small enough that a page of hundreds stays a page."""

import base64
import io
import wave
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

MAX_BYTES = 20_000
"""Of one image in a page: 600 of them, in base64, are 16 MB."""
MAX_CLIP_BYTES = 80_000
_TRIES = ((320, 82), (256, 75), (192, 65), (128, 50), (64, 40))  # longest side in pixels, WebP quality


def data_uri(file: Path) -> str | None:
    """The image as it is where it is small, and scaled down otherwise; None where it cannot be read. Where a clip of the same
    name lies beside it, that."""
    clip = file.with_suffix(".webp")
    try:
        if clip.is_file():
            found = clip.stat()
            return _encode_clip(clip, found.st_mtime_ns, found.st_size)
        found = file.stat()
        return _encode(file, found.st_mtime_ns, found.st_size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # PIL says SyntaxError of a broken PNG
        return None


@lru_cache(maxsize=1024)  # a page is written again at every evaluation
def _encode(file: Path, changed: int, size: int) -> str:
    with Image.open(file, formats=["PNG"]) as opened:
        opened.load()
        if size <= MAX_BYTES:
            return _uri("image/png", file.read_bytes())
        image = opened.convert("RGB")
    for side, quality in _TRIES:
        encoded = _webp(image, side, quality)
        if len(encoded) <= MAX_BYTES:
            break
    return _uri("image/webp", encoded)


@lru_cache(maxsize=1024)
def _encode_clip(file: Path, changed: int, size: int) -> str:
    with Image.open(file, formats=["WEBP"]) as opened:
        duration = opened.info.get("duration", 60)
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(opened)]
    for side, quality in _TRIES:
        small = [frame.copy() for frame in frames]
        for frame in small:
            frame.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small[0].save(buffer, "webp", save_all=True, append_images=small[1:], duration=duration, loop=0, quality=quality)
        if len(buffer.getvalue()) <= MAX_CLIP_BYTES:
            break
    return _uri("image/webp", buffer.getvalue())


def sound_uri(file: Path) -> str | None:
    """The WAV that lies beside a picture of its wave, as one channel of at most 11,025 Hz; None where there is none."""
    sound = file.with_suffix(".wav")
    try:
        with wave.open(str(sound), "rb") as opened:
            channels, rate = opened.getnchannels(), opened.getframerate()
            values = np.frombuffer(opened.readframes(opened.getnframes()), dtype="<i2").reshape(-1, channels)
    except (OSError, EOFError, ValueError, wave.Error):
        return None
    every = max(1, -(-rate // 11_025))
    whole = values[: len(values) // every * every].mean(1).reshape(-1, every).mean(1)  # a mean is a low pass, of a kind
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(rate // every)
        written.writeframes(whole.round().astype("<i2").tobytes())
    return _uri("audio/wav", buffer.getvalue())


def _webp(image: Image.Image, side: int, quality: int) -> bytes:
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "webp", quality=quality)
    return buffer.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
