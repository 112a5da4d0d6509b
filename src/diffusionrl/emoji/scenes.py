"""Scenes with captions, drawn on the fly from the atlas: the training distribution of the embedded world.

A scene is one or two sprites on a plain pale background of random colour, with random size, place and flip. Sizes and places
are multiples of 8 pixels, the pitch of the latents: a sprite of one size then has the same latents wherever it stands, which is
what lets a small UNet learn some 270 sprites from a few hundred thousand samples.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from diffusionrl import seeds
from diffusionrl.emoji.sprites import load_sprites
from diffusionrl.emoji.vocabulary import (
    ACTIVE_ANIMALS,
    ACTIVITIES,
    GENDERS,
    OCCUPATIONS,
    SKIN_TONE_SHARES,
    SUBJECTS,
    person,
    with_article,
)

IMAGE_SIZE = 64
PITCH = 8  # pixels a latent
HUES = ("red", "yellow", "green", "turquoise", "blue", "pink")
KIND_SHARES = {"subject": 0.58, "pair": 0.14, "activity": 0.10, "person": 0.18}
SATURATIONS, VALUES = (0.05, 0.25), (0.88, 1.0)
DARKEST = VALUES[0] * (1 - SATURATIONS[1])
"""No channel of a ground is below it."""


@dataclass(frozen=True)
class Slot:
    """Where a sprite of a scene may be: sides in pixels, and the box (left, top, right, bottom) that it lies in."""

    sizes: tuple[int, ...]
    box: tuple[int, int, int, int] = (0, 0, IMAGE_SIZE, IMAGE_SIZE)


SLOTS = {
    "subject": (Slot((48, 56)),),
    "person": (Slot((48, 56)),),
    "activity": (Slot((32, 40), (0, 0, 64, 40)), Slot((24,), (0, 40, 64, 64))),
    "pair": (Slot((24, 32), (0, 0, 32, 64)), Slot((24, 32), (32, 0, 64, 64))),
}
"""The sprites of each kind of scene: one; the animal and what it does; the left and the right one."""


@dataclass(frozen=True)
class Scene:
    """An image, its caption, and what the caption leaves open; ``look`` says in words how large, where and on what ground."""

    image: Image.Image
    caption: str
    look: str
    subjects: tuple[str, ...] = ()
    occupation: str | None = None
    gender: str | None = None
    skin_tone: str | None = None


def draw_scene(
    seed: int,
    index: int,
    kind: str | None = None,
    active: Sequence[str] = ACTIVE_ANIMALS,
    tones: dict[str, float] = SKIN_TONE_SHARES,
    names: Sequence[str] = (),
) -> Scene:
    """Scene number ``index`` of the endless training set ``seed``.

    Args:
        kind: one of ``KIND_SHARES``, or "empty", a ground with nothing on it; None draws it by those shares.
        active: the animals that are shown with an activity.
        tones: shares of the skin tones among people.
        names: what is drawn, instead of what chance would choose: the subject, both subjects of a pair, or the occupation.
    """
    rng = seeds.numpy_generator(seed, "scene", index)
    kind = kind or _choice(rng, KIND_SHARES)
    canvas, ground = _background(rng)
    if kind == "empty":
        return Scene(canvas, "", ground)
    if kind == "person":
        occupation, gender = _choice(rng, OCCUPATIONS), _choice(rng, GENDERS)
        tone = _choice(rng, tones)
        occupation = names[0] if names else occupation
        look = f"{_paste(canvas, person(occupation, gender, tone), rng, SLOTS[kind][0])} {ground}"
        return Scene(canvas, with_article(occupation), look, (), occupation, gender, tone)
    if kind == "subject":
        name = _choice(rng, names or SUBJECTS)
        look = f"{_paste(canvas, name, rng, SLOTS[kind][0])} {ground}"
        return Scene(canvas, with_article(name), look, (name,))
    if kind == "activity":
        animal, activity = _choice(rng, active), _choice(rng, ACTIVITIES)
        for name, slot in zip((animal, activity), SLOTS[kind], strict=True):
            _paste(canvas, name, rng, slot)
        return Scene(canvas, f"{with_article(animal)} {activity}", ground, (animal,))
    left, right = names or (_choice(rng, SUBJECTS), _choice(rng, SUBJECTS))
    for name, slot in zip((left, right), SLOTS[kind], strict=True):
        _paste(canvas, name, rng, slot)
    return Scene(canvas, f"{with_article(left)} and {with_article(right)}", ground, (left, right))


def draw_images(
    seed: int,
    indices: range,
    kind: str | None = None,
    active: Sequence[str] = ACTIVE_ANIMALS,
    tones: dict[str, float] = SKIN_TONE_SHARES,
) -> tuple[np.ndarray, list[Scene]]:
    """Scenes as one array, uint8 (N, 64, 64, 3), beside the scenes themselves; arguments as in ``draw_scene``."""
    scenes = [draw_scene(seed, index, kind, active, tones) for index in indices]
    return np.stack([np.asarray(scene.image) for scene in scenes]), scenes


def _choice(rng: np.random.Generator, options: object) -> str:
    """One of the options; a mapping to floats gives their probabilities."""
    names = list(options)  # type: ignore[call-overload]
    shares = list(options.values()) if isinstance(options, dict) and isinstance(options[names[0]], float) else None
    return names[rng.choice(len(names), p=shares)]


def _background(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """A plain ground, and how it looks in words."""
    hue, saturation, value = rng.uniform(), rng.uniform(*SATURATIONS), rng.uniform(*VALUES)
    colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))
    name = HUES[round(hue * len(HUES)) % len(HUES)]
    look = f"on {'pale' if saturation < 0.15 else 'strong'} {'bright' if value > 0.94 else 'dim'} {name}"
    return Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), colour), look


def _paste(canvas: Image.Image, name: str, rng: np.random.Generator, slot: Slot) -> str:
    """Paste a sprite of random size, flip and place into a slot. Returns its look."""
    side, box = int(rng.choice(slot.sizes)), slot.box
    sprite = load_sprites()[name].resize((side, side), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left = box[0] + PITCH * int(rng.integers((box[2] - box[0] - side) // PITCH, endpoint=True))
    top = box[1] + PITCH * int(rng.integers((box[3] - box[1] - side) // PITCH, endpoint=True))
    canvas.paste(sprite, (left, top), sprite)
    across = ("left", "middle", "right")[int(np.sign(left + side / 2 - IMAGE_SIZE / 2)) + 1]
    down = ("top", "middle", "bottom")[int(np.sign(top + side / 2 - IMAGE_SIZE / 2)) + 1]
    return f"{'large' if side == max(slot.sizes) else 'small'} {down} {across}"
