"""The compositional reward of DiffusionRL (arXiv 2401.12244, Sec. 4): is everything there that the prompt names?

    r(x0, c) = mean over the objects o that the prompt c names of d(o, x0)

where d is a detector's confidence that o is in the image. It rewards presence, not relation: of "a dog beside a tree" it asks
for a dog and a tree, wherever they stand. The paper's detector is UniDet; ours are OWLv2 and Grounding DINO (``detection.py``)
and, for the embedded world, a classifier with a sigmoid a subject.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.emoji.classifier import CLASSES, load_detector
from diffusionrl.emoji.scenes import IMAGE_SIZE
from diffusionrl.emoji.vocabulary import subject_of
from diffusionrl.errors import UserError
from diffusionrl.rewards.base import Reward, Scores, register
from diffusionrl.rewards.detection import Detector

RELATIONS = ("and", "next to", "near", "on side of", "on the side of", "beside")
_RELATION = re.compile(rf"\s+(?:{'|'.join(RELATIONS)})\s+", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:an?|the)\s+", re.IGNORECASE)


def split_prompt(prompt: str) -> list[str]:
    """``"a dog beside the old tree"`` -> ``["dog", "old tree"]``: what the paper's relations part, without articles."""
    parts = [_ARTICLE.sub("", part.strip(" \t\n.,"), count=1) for part in _RELATION.split(f" {prompt} ")]
    return [part for part in parts if part]


def objects_of(prompt: str, metadata: dict[str, Any], known: Callable[[str], str | None] | None = None) -> list[str]:
    """What has to be in the image, each once: the metadata's "objects", or else what the prompt names.

    Args:
        known: the detector's name of an object, or None; a detector that is asked in words knows everything.

    Raises:
        UserError: nothing is named, or something that the detector does not know.
    """
    objects = metadata.get("objects")
    if objects is None:
        objects = split_prompt(prompt)
    elif not isinstance(objects, list) or not all(isinstance(name, str) for name in objects):
        raise UserError(f'the metadata "objects" of {prompt!r} is {objects!r}: give a list of texts')
    if not objects or not all(re.search(r"\w", name) for name in objects):
        raise UserError(f'{prompt!r} names no object: write "a cat and a dog", or a list "objects" beside the prompt')
    if known is not None:
        names = [known(_ARTICLE.sub("", name, count=1)) for name in objects]
        if None in names:
            unknown = objects[names.index(None)]
            raise UserError(f"the embedded detector does not know {unknown!r} of {prompt!r}: it knows animals and things alone")
        objects = names
    return list(dict.fromkeys(objects))


class CompositionReward:
    """The mean confidence over a prompt's objects; a prompt without one makes its sample invalid.

    Args:
        detect: images and B lists of objects -> B tensors of confidences.
        known: see ``objects_of``.
    """

    range = (0.0, 1.0)
    differentiable = True

    def __init__(
        self, detect: Callable[[Tensor, list[list[str]]], list[Tensor]], known: Callable[[str], str | None] | None = None
    ) -> None:
        self._detect, self._known = detect, known

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        objects: list[list[str]] = []
        rows, error = [], None
        for row, (prompt, more) in enumerate(zip(prompts, metadata, strict=True)):
            try:
                objects.append(objects_of(prompt, more, self._known))
                rows.append(row)
            except UserError as refused:
                error = str(refused)
        values, valid = torch.zeros(len(prompts)), torch.zeros(len(prompts), dtype=torch.bool)
        if rows:
            values[rows] = torch.stack([found.mean() for found in self._detect(images[rows], objects)])
            valid[rows] = True
        return Scores(values, valid, error)


def _embedded(name: str) -> CompositionReward:
    detector = load_detector(name).requires_grad_(False)

    def detect(images: Tensor, objects: list[list[str]]) -> list[Tensor]:
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            raise UserError(
                f"the embedded detector sees images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, not {tuple(images.shape[-2:])}: "
                "rewards.composition.model takes an OWLv2 or Grounding DINO checkpoint; see docs/rewards.md"
            )
        confidence = detector(images).sigmoid()
        return [row[[CLASSES.index(name) for name in names]] for row, names in zip(confidence, objects, strict=True)]

    return CompositionReward(detect, subject_of)


@register("composition")
def composition(config: RewardsConfig) -> Reward:
    """By the detector of the settings."""
    settings = config.composition
    if settings.model == "emoji":
        return _embedded("detector")
    return CompositionReward(Detector(settings.model, settings.revision, settings.query, settings.threshold).confidences)


@register("composition-judge")
def composition_judge(config: RewardsConfig) -> Reward:
    """By a second embedded detector, of other initial weights and other scenes, that no run is trained on: to be held out."""
    return _embedded("detector_judge")
