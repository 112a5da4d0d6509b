"""Images that a prompt names, for pipelines that take them."""

from pathlib import Path

from PIL import Image, ImageOps

from diffusionrl.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")  # of Pillow's some forty decoders, the ones that are needed


def open_image(medium: Path | Image.Image) -> Image.Image:
    """Of a prompt, as RGB.

    Raises:
        UserError: it is not there, or does not decode.
    """
    if isinstance(medium, Image.Image):
        return medium.convert("RGB")
    try:
        with Image.open(medium, formats=FORMATS) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises whatever a broken file leads it to
        raise UserError(f"image {medium} of a prompt cannot be read: {type(error).__name__}: {error}") from error
