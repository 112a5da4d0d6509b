"""The atlas: every sprite of the world in one PNG, rendered once from Noto Color Emoji.

``python -m diffusionrl.emoji.sprites --font NotoColorEmoji.ttf`` draws it again (Pillow needs libraqm for the people, which
are ligatures). The atlas ships with the package, so nothing else needs the font. Font licence: SIL OFL, ``NOTICE.md``.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from diffusionrl.emoji.vocabulary import sprite_code_points

ATLAS = Path(__file__).parent / "atlas.png"
SPRITE_SIZE = 64
COLUMNS = 18
_FONT_SIZE = 109  # the only size of the font's bitmaps, which are 136 x 128 pixels


@functools.cache
def load_sprites() -> dict[str, Image.Image]:
    """Every sprite by name, RGBA, 64 x 64 pixels."""
    with Image.open(ATLAS) as atlas:
        atlas.load()
        return {name: atlas.crop(_cell(index)) for index, name in enumerate(sprite_code_points())}


def _cell(index: int) -> tuple[int, int, int, int]:
    top, left = index // COLUMNS * SPRITE_SIZE, index % COLUMNS * SPRITE_SIZE
    return left, top, left + SPRITE_SIZE, top + SPRITE_SIZE


def _render(font: ImageFont.FreeTypeFont, code_points: list[int]) -> Image.Image:
    canvas = Image.new("RGBA", (4 * _FONT_SIZE, 2 * _FONT_SIZE))
    text = "".join(map(chr, code_points))
    ImageDraw.Draw(canvas).text((8, 8), text, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None or box[2] - box[0] > 150:
        raise ValueError(f"the font draws {[hex(c) for c in code_points]} as {box}, not as one emoji")
    glyph = canvas.crop(box)
    side = max(glyph.size)
    square = Image.new("RGBA", (side, side))
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
    return square.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class AtlasConfig:
    """Render the atlas."""

    font: Path = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    """Noto Color Emoji (Debian package fonts-noto-color-emoji)."""


def render_atlas(config: AtlasConfig) -> None:
    """Raises ValueError where the font lacks a sprite or Pillow lacks libraqm."""
    if not features.check("raqm"):
        raise ValueError("Pillow was built without libraqm, which joins a person, a skin tone and a badge into one glyph")
    font = ImageFont.truetype(config.font, _FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    table = sprite_code_points()
    atlas = Image.new("RGBA", (COLUMNS * SPRITE_SIZE, -(-len(table) // COLUMNS) * SPRITE_SIZE))
    for index, code_points in enumerate(table.values()):
        atlas.paste(_render(font, code_points), _cell(index)[:2])
    atlas.save(ATLAS, optimize=True)


if __name__ == "__main__":
    import tyro

    render_atlas(tyro.cli(AtlasConfig))
