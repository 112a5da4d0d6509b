"""Real pairs of image and caption: scenes of the embedded world, or a folder of images."""

import hashlib
import json
from pathlib import Path
from typing import Protocol

from PIL import Image

from diffusionrl.config import PretrainingConfig
from diffusionrl.data.folders import captions_in, check_broken, is_file, size_of
from diffusionrl.data.media import decode
from diffusionrl.emoji.scenes import draw_scene
from diffusionrl.errors import RunStopped, UserError
from diffusionrl.paths import expand

MAX_BROKEN = "pretraining.max_broken"
"""The setting."""


class Pairs(Protocol):
    """Images with captions.

    Attributes:
        fingerprint: of captions, and names and sizes of the files; a run that is taken up must have the same.
        broken: what is wrong with the images that were found not to decode, by their number.
    """

    fingerprint: str
    broken: dict[int, str]

    def draw(self, address: int) -> tuple[Image.Image, str]:
        """The pair that a number picks."""
        ...


def load_pairs(config: PretrainingConfig) -> Pairs | None:
    """What ``pretraining.source`` names; None where the loss is off.

    Raises:
        UserError: no such folder, no captions in it, or its first image does not decode.
    """
    if not config.source:
        return None
    return ScenePairs() if config.source == "emoji" else FolderPairs(expand(config.source), config.max_broken)


class ScenePairs:
    """The endless training set of the embedded world, with its own distribution."""

    def __init__(self) -> None:
        self.fingerprint = "emoji"
        self.broken: dict[int, str] = {}

    def draw(self, address: int) -> tuple[Image.Image, str]:
        scene = draw_scene(address, 0)
        return scene.image, scene.caption


class FolderPairs:
    """A folder of images with captions, as ``captions_in`` reads them. In the place of an image that does not decode stands the
    next that does.

    Raises:
        UserError: as in ``load_pairs``.
    """

    def __init__(self, folder: Path, max_broken: int = 0) -> None:
        self.folder, self.max_broken = folder, max_broken
        self.broken: dict[int, str] = {}
        self._entries = captions_in(folder, "pretraining.source")
        try:
            self._check_files()
            sizes = [size_of(folder / name) for name, _ in self._entries]
            self.fingerprint = hashlib.sha256(json.dumps([self._entries, sizes]).encode()).hexdigest()
            self.draw(0)
        except RunStopped as error:
            raise UserError(str(error)) from error

    def _check_files(self) -> None:
        """Raises RunStopped where more than ``max_broken`` are not there, before the run needs them."""
        missing = {place: name for place, (name, _) in enumerate(self._entries) if not is_file(self.folder / name)}
        if len(missing) > self.max_broken:
            raise RunStopped(
                f"{len(missing)} images in {self.folder} are not there, or no files, more than pretraining.max_broken = "
                f"{self.max_broken}: {', '.join(list(missing.values())[:3])}"
            )

    def draw(self, address: int) -> tuple[Image.Image, str]:
        """Raises RunStopped where more than ``max_broken`` have turned out broken."""
        for further in range(len(self._entries)):
            place = (address + further) % len(self._entries)
            name, caption = self._entries[place]
            try:
                return decode(self.folder / name), caption
            except Exception as error:  # Pillow raises whatever a broken file leads it to
                self.broken[place] = f"{self.folder / name} ({type(error).__name__}: {error})"
                check_broken(self.broken, self.max_broken, MAX_BROKEN)
        raise RunStopped(f"no image in {self.folder} decodes")
