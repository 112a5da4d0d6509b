"""A preference model of the embedded world: which of two images of one prompt is preferred.

Preferences come from a stated rule. The utility of an image x for a prompt c is

    u(x, c) = 4 * (share of the named subjects, or the occupation, that are in x) + gold_rating(x)

and the first of two images is preferred with probability sigmoid(u1 - u2) (Bradley & Terry 1952). The model never sees u: it is
fitted to such choices alone (``recipe/preference.py``), as ImageReward is to those of people.
"""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, logsigmoid

from diffusionrl.emoji.aesthetics import gold_rating

WEIGHTS = Path(__file__).parent / "weights" / "preference.safetensors"
FOLLOWING = 4.0  # utility of showing everything that the prompt names, in points of the gold rating


def utility(images: Tensor, shares: Tensor) -> Tensor:
    """The rule's u of images in [0, 1], (B, 3, 64, 64), that show these shares of what was asked for, (B,)."""
    return FOLLOWING * shares + gold_rating(images)


def bradley_terry_loss(preferred: Tensor, other: Tensor) -> Tensor:
    """-log sigmoid(R_w - R_l), averaged over the comparisons: the scores of the preferred images and of the others, (B,)."""
    return -logsigmoid(preferred - other).mean()


class PreferenceModel(nn.Module):
    """R(x, c) = w * (CLIP(x) times CLIP(c), feature by feature) + f(x): about 23,000 parameters.

    f is a small convolutional network on the image at half its size, with its coordinates as two more channels: the embedded
    CLIP knows who is in an image, but has forgotten too much of how beautiful it is (docs/embedded_world.md).

    Args:
        width: length of CLIP's embeddings.
    """

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        widths = (5, 16, 32, 48)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.SiLU(),
            ]  # no norm, which would level areas and light
        self.features = nn.Sequential(*layers)
        self.beauty = nn.Sequential(nn.Linear(2 * widths[-1], 32), nn.SiLU(), nn.Linear(32, 1))
        self.following = nn.Linear(width, 1, bias=False)

    def forward(self, images: Tensor, embedded: Tensor, prompts: Tensor) -> Tensor:
        """Images in [0, 1], (B, 3, 64, 64), and the CLIP embeddings of images and prompts, (B, D), of length 1 -> (B,)."""
        pixels = avg_pool2d(images * 2 - 1, 2)
        steps = torch.linspace(-1, 1, pixels.shape[-1], device=pixels.device)
        places = torch.stack(torch.meshgrid(steps, steps, indexing="ij")).expand(len(pixels), -1, -1, -1)
        features = self.features(torch.cat([pixels, places], 1))
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        return (self.beauty(pooled) + self.following(10 * embedded * prompts))[:, 0]  # 10: entries of about 1


def load_preference_model() -> PreferenceModel:
    """The shipped model, in evaluation mode."""
    model = PreferenceModel()
    model.load_state_dict({name: weight.float() for name, weight in load_file(WEIGHTS).items()})
    return model.eval()
