"""Which scene of the world is nearest to an image: every sprite of the atlas in every size, place and flip is tried.

A scene is a ground of one colour c, and on it a sprite of colours s and opacity a: a s + (1 - a) c. Of an image x, the error

    e = |x - a s - (1 - a) c|^2,        c = sum (1 - a) (x - a s) / sum (1 - a)^2, within the colours that grounds have

is the least over c, in closed form, so nothing is learned and nothing is searched for: an image has one nearest scene. The two
boxes of a scene of two sprites are each taken with a ground of its own.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusionrl.emoji.scenes import DARKEST, IMAGE_SIZE, PITCH, SLOTS, Slot
from diffusionrl.emoji.sprites import load_sprites
from diffusionrl.emoji.vocabulary import ACTIVITIES, GENDERS, OCCUPATIONS, SKIN_TONES, SUBJECTS, person, subject_of


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for.

    Attributes:
        kind: of scene, in ``SLOTS``.
        sprites: of each slot, the names that will do.
    """

    kind: str
    sprites: tuple[tuple[str, ...], ...]


def asked_by(prompt: str) -> Asked | None:
    """None where a prompt is no caption of the world."""
    texts = [_bare(text) for text in prompt.strip().split(" and ")]
    if len(texts) == 2 and all(text in SUBJECTS for text in texts):
        return Asked("pair", ((texts[0],), (texts[1],)))
    if len(texts) != 1:
        return None
    text, subject = texts[0], subject_of(texts[0])
    if subject is not None:
        activity = text.removeprefix(subject).strip()
        return Asked("activity", ((subject,), (activity,))) if activity else Asked("subject", ((subject,),))
    if text in OCCUPATIONS:
        return Asked("person", (tuple(person(text, gender, tone) for gender in GENDERS for tone in SKIN_TONES),))
    return None


def _bare(text: str) -> str:
    """Without its article."""
    return text.removeprefix("an ").removeprefix("a ")


def match(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """How much of what its prompt asks for is where it belongs in an image, and how far the image is from any such scene.

    Args:
        images: in [0, 1], (B, 3, 64, 64).
        prompts: B of them.

    Returns:
        The share of the sprites asked for that are nearer to the image than every other sprite that could be there, (B,); and
        the root mean squared error to the nearest scene that is asked for, over pixels and channels, (B,). Both are NaN for a
        prompt that is no caption of the world.
    """
    asked = [asked_by(prompt) for prompt in prompts]
    shares, squares = torch.full((2, len(images)), torch.nan)
    for kind, slots in SLOTS.items():
        rows = [row for row, each in enumerate(asked) if each is not None and each.kind == kind]
        if not rows:
            continue
        shares[rows], squares[rows] = 0.0, 0.0
        for slot in range(len(slots)):
            found, names = errors(images[rows], kind, slot), vocabulary_of(kind, slot)
            for row, each in zip(rows, found, strict=True):
                wanted = asked[row]
                assert wanted is not None
                nearest = each[[names.index(name) for name in wanted.sprites[slot]]].min()
                shares[row] += (nearest == each.min()) / len(slots)
                squares[row] += nearest
    return shares, (squares / (3 * IMAGE_SIZE**2)).sqrt()


def vocabulary_of(kind: str, slot: int) -> tuple[str, ...]:
    """The sprites that may stand in a slot of a kind of scene."""
    if kind == "person":
        return tuple(name for name in load_sprites() if "/" in name)
    return tuple(ACTIVITIES) if (kind, slot) == ("activity", 1) else tuple(SUBJECTS)


def errors(images: Tensor, kind: str, slot: int) -> Tensor:
    """How far a part of each image is from the nearest scene with each sprite of ``vocabulary_of``.

    Args:
        images: in [0, 1], (B, 3, 64, 64).

    Returns:
        Squared errors, summed over the pixels and channels of the slot's box, (B, V).
    """
    place, names = SLOTS[kind][slot], vocabulary_of(kind, slot)
    left, top, right, bottom = place.box
    region = images[:, :, top:bottom, left:right]
    best = torch.full((len(images), len(names)), torch.inf)
    for side in place.sizes:
        sprites = _sprites(names, side)
        for y, x in _places(place, side):
            patch = region[:, :, y : y + side, x : x + side]
            for seen in (patch, patch.flip(-1)):  # a sprite that is flipped, on the image as it is
                best = torch.minimum(best, _error(region, seen, sprites))
    return best.clamp(min=0)


def _places(slot: Slot, side: int) -> list[tuple[int, int]]:
    """(top, left) within the box."""
    left, top, right, bottom = slot.box
    return [(y, x) for y in range(0, bottom - top - side + 1, PITCH) for x in range(0, right - left - side + 1, PITCH)]


@dataclass(frozen=True)
class _Sprites:
    """V sprites of one size. ``opacity``: a, (V, S); ``paint``: a s, (V, 3, S)."""

    opacity: Tensor
    paint: Tensor


@functools.cache
def _sprites(names: Sequence[str], side: int) -> _Sprites:
    """As scenes draw them."""
    drawn = [load_sprites()[name].resize((side, side), Image.Resampling.BILINEAR) for name in names]
    pixels = torch.from_numpy(np.stack([np.asarray(each) for each in drawn])).float().flatten(1, 2).movedim(-1, 1) / 255
    return _Sprites(pixels[:, 3], pixels[:, 3:] * pixels[:, :3])


def _error(region: Tensor, patch: Tensor, sprites: _Sprites) -> Tensor:
    """Squared, over the region, of each sprite where the patch is, (B, V)."""
    opacity, paint, pixels = sprites.opacity, sprites.paint, patch.flatten(2)  # (B, 3, S)
    bare = 1 - opacity
    room = region[0, 0].numel() - opacity.shape[1] + bare.square().sum(1)  # sum (1 - a)^2, (V,)
    seen = region.flatten(2).sum(2)[:, :, None] - pixels @ opacity.T  # sum (1 - a) x, (B, 3, V)
    left = seen - (bare[:, None] * paint).sum(2).T
    ground = (left / room).clamp(DARKEST, 1)
    covered = region.flatten(1).square().sum(1)[:, None] - 2 * pixels.flatten(1) @ paint.flatten(1).T
    return covered + paint.flatten(1).square().sum(1) + (room * ground.square() - 2 * ground * left).sum(1)
