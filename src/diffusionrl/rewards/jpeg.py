"""Compressibility and incompressibility: the size of the image as a JPEG file (DDPO, arXiv 2305.13301, Sec. 5.1).

The paper fixes the image at 512 x 512 pixels. It states no quality; its code uses 95, Pillow's default 4:2:0 chroma, and
kB = 1000 bytes, and so does this file. Smaller images are enlarged to 512 x 512 (bicubic), so sizes compare across models;
pixels are rounded to 8 bits (as in the PyTorch release; the JAX release truncates).
"""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image
from torch import Tensor

from diffusionrl.data.images import to_pil
from diffusionrl.rewards.base import register

SIZE = 512
QUALITY = 95
_THREADS = 2  # Pillow releases the interpreter lock while it resizes and encodes


def jpeg_kilobytes(image: Tensor) -> float:
    """Size in kB of one image, (3, H, W) in [0, 1], as a JPEG of 512 x 512 pixels and quality 95."""
    pixels = to_pil(image)
    if pixels.size != (SIZE, SIZE):
        pixels = pixels.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    pixels.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000


def incompressibility(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
    """JPEG size in kB."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(jpeg_kilobytes, images))


def compressibility(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
    """Minus the JPEG size in kB."""
    return [-size for size in incompressibility(images, prompts, metadata)]


register("incompressibility")(lambda config: incompressibility)
register("compressibility")(lambda config: compressibility)
