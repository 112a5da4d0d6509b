"""Images as data URIs, small enough that a page of hundreds stays a page."""

import base64
import io
from functools import lru_cache
from pathlib import Path

from PIL import Image

MAX_BYTES = 20_000
"""Of one image in a page: 600 of them, in base64, are 16 MB."""
_TRIES = ((320, 82), (256, 75), (192, 65), (128, 50), (64, 40))  # longest side in pixels, WebP quality


def data_uri(file: Path) -> str | None:
    """The image as it is where it is small, and scaled down otherwise; None where it cannot be read."""
    try:
        found = file.stat()
        return _encode(file, found.st_mtime_ns, found.st_size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # PIL says SyntaxError of a broken PNG
        return None


@lru_cache(maxsize=1024)  # a page is written again at every evaluation
def _encode(file: Path, changed: int, size: int) -> str:
    with Image.open(file, formats=["PNG"]) as opened:
        opened.load()
        if size <= MAX_BYTES:
            return _uri("png", file.read_bytes())
        image = opened.convert("RGB")
    for side, quality in _TRIES:
        encoded = _webp(image, side, quality)
        if len(encoded) <= MAX_BYTES:
            break
    return _uri("webp", encoded)


def _webp(image: Image.Image, side: int, quality: int) -> bytes:
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "webp", quality=quality)
    return buffer.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
