"""Images with the prompts that they were made from: a folder with captions, a run's samples, or one prompt's images."""

import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from diffusionrl.data.folders import IMAGES, captions_in, has_captions, is_file
from diffusionrl.data.media import FORMATS
from diffusionrl.errors import UserError, require
from diffusionrl.paths import describe

_SHOWN = 3  # names in an error


def gallery(place: Path, prompt: str = "") -> list[tuple[Path, str]]:
    """(file, prompt) of each image, in order.

    Args:
        place: a run, the samples of one, or a folder of JPEG, PNG or WebP with captions as ``captions_in`` reads them.
        prompt: of all images of a folder without captions.

    Raises:
        UserError: there is no such folder, no image in it, no prompt, or an image does not decode.
    """
    require(place.is_dir(), f"{place} is {describe(place)}, no folder of images")
    sampled = sorted((place / "samples" if (place / "config.yaml").is_file() else place).rglob("samples.jsonl"))
    sampled = [file for file in sampled if "recent" not in file.relative_to(place).parts]  # which come and go with the steps
    if sampled:
        found = [each for file in sampled for each in _samples(file)]
    elif has_captions(place):
        found = [(place / name, text) for name, text in captions_in(place, "the folder")]
    else:
        found = [(each, prompt) for each in sorted(place.iterdir()) if each.suffix.lower() in IMAGES]
        require(not found or bool(prompt.strip()), f"{place} has no captions: name what all its images show with --prompt")
    require(len(found) >= 1, f"{place} holds no image ({', '.join(IMAGES)}): name a folder of images, or a run")
    broken = [file.name for file, _ in found if not _is_image(file)]
    if broken:
        named = ", ".join(broken[:_SHOWN])
        raise UserError(f"{len(broken)} images in {place} are not there, or no JPEG, PNG or WebP: {named}: mend or remove them")
    return list(dict.fromkeys(found))


def _samples(file: Path) -> Iterator[tuple[Path, str]]:
    """Of a samples.jsonl that a run has written; a last line that it is about to write is none."""
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            entry = json.loads(line)
            yield file.parent / f"{int(entry['index']):05d}.png", str(entry["prompt"])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{file}:{number} is broken ({error}): remove that line") from error


def _is_image(file: Path) -> bool:
    """By its header."""
    if not is_file(file):
        return False
    try:
        with Image.open(file, formats=FORMATS):
            return True
    except Exception:  # Pillow raises whatever a broken file leads it to
        return False
