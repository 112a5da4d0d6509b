"""Tensors to pictures."""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> an 8-bit RGB image, rounded to nearest."""
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def to_png(image: Tensor) -> bytes:
    """The same as the bytes of a PNG file."""
    png = io.BytesIO()
    to_pil(image).save(png, format="PNG")
    return png.getvalue()


def image_grid(tiles: Sequence[Image.Image], columns: int, gap: int = 0) -> Image.Image:
    """Tiles of one size side by side, row by row, with ``gap`` white pixels between them."""
    width, height = tiles[0].width + gap, tiles[0].height + gap
    sheet = Image.new("RGB", (columns * width - gap, -(-len(tiles) // columns) * height - gap), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * width, index // columns * height))
    return sheet
