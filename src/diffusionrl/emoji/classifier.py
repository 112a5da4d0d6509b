"""Small image classifiers, trained on fresh scenes only, so they can judge generated ones: which subject a scene shows, or, as
a detector, whether each of them is in it; and the skin tone of a person."""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusionrl.emoji.vocabulary import SKIN_TONES, SUBJECTS

FOLDER = Path(__file__).parent / "weights"
CLASSES = tuple(SUBJECTS)
TONES = tuple(SKIN_TONES)


class SceneClassifier(nn.Module):
    """Four strided convolutions, mean and maximum over places, one linear layer: about 240,000 parameters.

    Args:
        num_classes: the subjects', by default.
        widths: channels, those of an image first.
    """

    def __init__(self, num_classes: int = len(CLASSES), widths: tuple[int, ...] = (3, 32, 64, 96, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], (B, 3, 64, 64) -> logits over the classes, (B, 107) for subjects."""
        features = self.features(images * 2 - 1)
        return self.head(torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1))


def build_tone_classifier() -> SceneClassifier:
    """Of the five skin tones, lightest first: about 80,000 parameters."""
    return SceneClassifier(len(TONES), (3, 24, 48, 64, 64))


def load_classifier() -> SceneClassifier:
    """The shipped classifier of subjects, in evaluation mode."""
    return _load(SceneClassifier(), "classifier")


def load_tone_classifier() -> SceneClassifier:
    """The shipped classifier of skin tones, in evaluation mode."""
    return _load(build_tone_classifier(), "skin_tones")


def load_detector(name: str = "detector") -> SceneClassifier:
    """A shipped detector, in evaluation mode: "detector", or "detector_judge", a second one."""
    return _load(SceneClassifier(), name)


def _load(classifier: SceneClassifier, name: str) -> SceneClassifier:
    weights = load_file(FOLDER / f"{name}.safetensors")
    classifier.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return classifier.eval()


@torch.no_grad()
def name_subjects(classifier: SceneClassifier, images: Tensor) -> list[str]:
    """The most likely subject of each image, (B, 3, 64, 64) in [0, 1]."""
    return [CLASSES[i] for i in classifier(images).argmax(1).tolist()]


@torch.no_grad()
def detect_subjects(detector: SceneClassifier, images: Tensor) -> Tensor:
    """How sure a detector is that each subject is in each image, (B, 3, 64, 64) in [0, 1] -> (B, 107) in [0, 1]."""
    return detector(images).sigmoid()
