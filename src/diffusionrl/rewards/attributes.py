"""Attributes of images, for rewards that look at how they are spread: functions of images that name a class, or none.

They are instruments for shares over many images, not for judging who is in one: see docs/parity.md for what each gets wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusionrl.config.judges import ParityConfig
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.emoji.classifier import TONES, load_tone_classifier
from diffusionrl.errors import UserError
from diffusionrl.foreign.finding import find_function
from diffusionrl.rewards.clip import CLIP

ITA_CLASSES = ("very light", "light", "intermediate", "tan", "brown", "dark")
ITA_BOUNDS = (55.0, 41.0, 28.0, 10.0, -30.0)
"""Degrees between those classes: Chardon, Cretois and Hourseau 1991, Int. J. Cosmetic Science 13(4); Del Bino and Bernerd 2013,
Brit. J. Dermatology 169(s3)."""
_MIN_SKIN = 0.01  # of the pixels


class Attribute:
    """Images (B, 3, H, W) in [0, 1] to B indices into ``classes``, None where it cannot be told.

    Args:
        name: what is told, for messages.
        classes: names, two or more.
        tell: the function; whatever it returns is checked.
    """

    def __init__(self, name: str, classes: Sequence[str], tell: Callable[[Tensor], Any]) -> None:
        self.name, self.classes, self._tell = name, tuple(classes), tell

    def __call__(self, images: Tensor) -> list[int | None]:
        """Raises UserError where the function returns something else than B classes."""
        told = self._tell(images)
        told = told.tolist() if hasattr(told, "tolist") else list(told)
        if len(told) != len(images):
            raise UserError(f"the attribute {self.name} told {len(told)} classes of {len(images)} images")
        for each in told:
            if each is not None and not (isinstance(each, int) and 0 <= each < len(self.classes)):
                raise UserError(
                    f"the attribute {self.name} told {each!r}: it has to be None or a whole number from 0 to "
                    f"{len(self.classes) - 1}, one of {', '.join(self.classes)}"
                )
        return told


def load_attribute(config: RewardsConfig) -> Attribute:
    """The one that ``rewards.parity.attribute`` names.

    Raises:
        UserError: no such attribute, it does not import, or what it needs is not there.
    """
    settings = config.parity
    if settings.attribute == "emoji-skin-tone":
        classifier = load_tone_classifier()
        return Attribute("skin tone", TONES, lambda images: classifier(images).argmax(1))
    if settings.attribute == "clip":
        return Attribute("class of rewards.parity.classes", settings.classes, _zero_shot(settings))
    if settings.attribute == "ita":
        _kornia()
        return Attribute("skin", ITA_CLASSES, ita_classes)
    tell = find_function("attribute", settings.attribute, "images -> class indices")
    classes = settings.classes or tuple(getattr(tell, "classes", ()))
    if len(classes) < 2:
        raise UserError(
            f"the attribute {settings.attribute} names no classes: set rewards.parity.classes, or its own .classes, to two "
            "names or more"
        )
    return Attribute(settings.attribute, classes, tell)


def _zero_shot(settings: ParityConfig) -> Callable[[Tensor], Tensor]:
    """The class whose text is the most similar."""
    clip = CLIP(settings.clip.model, settings.clip.revision, settings.clip.processor, settings.clip.processor_revision)
    texts = clip.embed_texts(settings.classes)
    return lambda images: (clip.embed_images(images) @ texts.T).argmax(1)


def ita_classes(images: Tensor) -> list[int | None]:
    """Indices into ``ITA_CLASSES``, lightest first; None where fewer than one pixel in a hundred is skin."""
    bounds = torch.tensor(ITA_BOUNDS)
    angles = typology_angles(images)
    return [int((angle < bounds).sum()) if angle.isfinite() else None for angle in angles]


def typology_angles(images: Tensor) -> Tensor:
    """Individual typology angle, atan2(L* - 50, b*) in degrees, the median over an image's skin pixels; NaN where there are too
    few. (B, 3, H, W) in [0, 1] -> (B,).

    L* and b* are CIE Lab's (sRGB, D65). Which pixels are skin: see ``skin_pixels``.
    """
    lightness, _, yellow = _kornia().rgb_to_lab(images).unbind(1)
    angles = torch.rad2deg(torch.atan2(lightness - 50, yellow))
    skin = skin_pixels(images)
    enough = skin.flatten(1).float().mean(1) >= _MIN_SKIN
    medians = torch.where(skin, angles, torch.nan).flatten(1).nanmedian(1).values
    return torch.where(enough, medians, torch.nan)


def skin_pixels(images: Tensor) -> Tensor:
    """The rule of Chai and Ngan 1999 (IEEE Trans. Circuits and Systems for Video Technology 9(4)): 77 <= Cb <= 127 and
    133 <= Cr <= 173, in the 8-bit YCbCr of ITU-R BT.601. It does not ask for the lightness, which rules in RGB do, and with
    which they lose dark skin. (B, 3, H, W) in [0, 1] -> bool, (B, H, W)."""
    red, green, blue = images.unbind(1)
    cb = 128 - 37.797 * red - 74.203 * green + 112.0 * blue
    cr = 128 + 112.0 * red - 93.786 * green - 18.214 * blue
    return (cb >= 77) & (cb <= 127) & (cr >= 133) & (cr <= 173)


def _kornia() -> Any:
    """``kornia.color``. Raises UserError where kornia is not installed."""
    try:
        import kornia.color
    except ImportError as error:
        raise UserError(
            f"the attribute ita needs kornia ({error}): pip install 'diffusionrl[ita]', or choose another "
            "rewards.parity.attribute"
        ) from error
    return kornia.color
