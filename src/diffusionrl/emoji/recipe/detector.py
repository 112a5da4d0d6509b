"""The detector: ``SceneClassifier`` with a sigmoid a subject, which says of each whether it is in the scene.

Trained by binary cross-entropy on scenes of every kind; those with people, or with nothing, hold none of the subjects. A share
of the scenes goes through the VAE with noise on the latents, and all colours and places vary a little, because what it has to
look at are not clean scenes but the samples of a diffusion model.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from diffusionrl import seeds
from diffusionrl.emoji.classifier import CLASSES, SceneClassifier, detect_subjects
from diffusionrl.emoji.recipe.training import TrainingConfig, train_stage
from diffusionrl.emoji.recipe.vae import EVALUATION_SEED, to_tensor
from diffusionrl.emoji.scenes import Scene, draw_images
from diffusionrl.emoji.vocabulary import DDPO_ANIMALS

KINDS = {"pair": 0.55, "subject": 0.2, "activity": 0.1, "person": 0.1, "empty": 0.05}
LATENT_NOISE = 0.6  # at most, in standard deviations of the latents
NUM_EVALUATION_SCENES = 1000


@dataclass(frozen=True)
class DetectorConfig(TrainingConfig):
    """Train the detector."""

    out: Path = Path("runs/emoji/detector")
    vae: Path = Path("runs/emoji/vae/vae")
    num_steps: int = 1200
    batch_size: int = 128
    num_scenes: int = 20_000
    """Scenes drawn once and passed over several times."""
    num_rough: int = 4000
    """Further scenes that have been through the VAE, with noise."""
    rough_share: float = 0.3
    """Of a batch."""
    name: ClassVar[str] = "detector"


@dataclass(frozen=True)
class DetectorJudgeConfig(DetectorConfig):
    """Train a second detector, which judges policies that were trained towards the first."""

    out: Path = Path("runs/emoji/detector-judge")
    num_steps: int = 600
    seed: int = 1
    name: ClassVar[str] = "detector_judge"


def draw_kinds(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Images, uint8 (N, 64, 64, 3), by the shares of ``KINDS``, and which subjects are in them, float (N, 107)."""
    images: list[Tensor] = []
    scenes: list[Scene] = []
    for kind, share in KINDS.items():
        indices = range(len(scenes), len(scenes) + round(share * count))
        drawn, found = draw_images(seed, indices, kind, tuple(DDPO_ANIMALS))
        images.append(torch.from_numpy(drawn))
        scenes += found
    return torch.cat(images), present(scenes)


def present(scenes: list[Scene]) -> Tensor:
    """Which of ``CLASSES`` are in each scene: float, (N, 107), 0 or 1."""
    return torch.tensor([[float(name in scene.subjects) for name in CLASSES] for scene in scenes])


@torch.no_grad()
def roughen(vae: AutoencoderKL, images: Tensor, seed: int, device: str, noise: float | None = None) -> Tensor:
    """Images, uint8 (N, 64, 64, 3), decoded from their latents with noise on them.

    Args:
        noise: its standard deviation in units of the latents'; None draws one an image, from 0 to ``LATENT_NOISE``.
    """
    parts = []
    for first in range(0, len(images), 250):
        draw = seeds.torch_generator(seed, "rough", first)
        latents = vae.encode(to_tensor(images[first : first + 250], device)).latent_dist.mean
        amount = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, generator=draw) if noise is None else torch.tensor(noise)
        fresh = torch.randn(latents.shape, generator=draw)
        decoded = vae.decode(latents + (amount * fresh).to(device) * latents.std()).sample.clamp(-1, 1)
        parts.append((127.5 * (decoded + 1)).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
    return torch.cat(parts)


def load_rough(config: DetectorConfig, seed: int, count: int, noise: float | None = None) -> tuple[Tensor, Tensor]:
    """``draw_kinds`` through the VAE, kept in a file for the next start."""
    file = config.out / f"rough_{seed}.safetensors"
    if not file.exists():
        vae = AutoencoderKL.from_pretrained(config.vae).float().eval().to(config.device)
        images, labels = draw_kinds(seed, count)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"images": roughen(vae, images, seed, config.device, noise).contiguous(), "labels": labels}, file)
        print(f"{count} scenes through the VAE", flush=True)
    kept = load_file(file)
    return kept["images"], kept["labels"]


def vary(images: Tensor, draw: torch.Generator) -> Tensor:
    """Images in [0, 1], (B, 3, H, W), of a little other light and colour, noisy, and shifted by up to 3 pixels."""
    count = len(images)
    gain = 1 + 0.1 * (2 * torch.rand(count, 3, 1, 1, generator=draw) - 1)
    grain = 0.04 * torch.rand(count, 1, 1, 1, generator=draw) * torch.randn(images.shape, generator=draw)
    across, down = (torch.randint(7, (2,), generator=draw) - 3).tolist()
    return torch.roll(images * gain + grain, (down, across), (2, 3)).clamp(0, 1)


def scaled(images: Tensor) -> Tensor:
    """uint8 (N, 64, 64, 3) -> float in [0, 1], (N, 3, 64, 64)."""
    return images.permute(0, 3, 1, 2).float() / 255


def train_detector(config: DetectorConfig) -> None:
    torch.manual_seed(config.seed)
    detector = SceneClassifier().to(config.device)
    torch.nn.init.constant_(detector.head.bias, -4.0)  # a subject is in about one scene of sixty
    images, labels = draw_kinds(config.seed, config.num_scenes)
    rough, rough_labels = load_rough(config, config.seed + EVALUATION_SEED + 1, config.num_rough)
    num_rough = round(config.rough_share * config.batch_size)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        draw = seeds.torch_generator(config.seed, "detector", step)
        chosen = torch.randint(len(images), (config.batch_size - num_rough,), generator=draw)
        others = torch.randint(len(rough), (num_rough,), generator=draw)
        pixels = vary(scaled(torch.cat([images[chosen], rough[others]])), draw)
        logits = detector(pixels.to(config.device))
        target = torch.cat([labels[chosen], rough_labels[others]]).to(config.device)
        value = binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(target)
        recall = ((logits > 0) & (target > 0)).sum() / (target > 0).sum()
        return value, {"loss": value.item(), "recall": recall.item()}

    train_stage(detector, loss, config)
    figures = measure_detector(detector, config)
    save_file(detector.state_dict(), config.out / f"{config.name}.safetensors")
    (config.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def measure_detector(detector: SceneClassifier, config: DetectorConfig) -> dict[str, float]:
    """On scenes never trained on: pairs as drawn; all kinds through the VAE with noise of 0.3 standard deviations."""
    drawn, scenes = draw_images(EVALUATION_SEED, range(NUM_EVALUATION_SCENES), "pair")
    rough, labels = load_rough(config, EVALUATION_SEED, NUM_EVALUATION_SCENES // 2, noise=0.3)
    sure = detect_subjects(detector, scaled(torch.from_numpy(drawn)).to(config.device)).cpu()
    sure_of_rough = detect_subjects(detector, scaled(rough).to(config.device)).cpu()
    figures = {f"{config.name}_pairs_{what}": value for what, value in quality(sure, present(scenes)).items()}
    return figures | {f"{config.name}_rough_{what}": value for what, value in quality(sure_of_rough, labels).items()}


def quality(confidence: Tensor, labels: Tensor) -> dict[str, float]:
    """Of confidences (N, K) against labels of 0 and 1.

    - map: mean over the classes of the average precision, over those that occur;
    - precision, recall: of the answers above 0.5;
    - calibration: the expected calibration error, ten bins of equal width, of the answers above 0.05: nearly all others are
      rightly near 0, and would hide it.
    """
    found, there = confidence > 0.5, labels > 0.5
    right = (found & there).sum().item()
    unsure = confidence > 0.05
    given, truth = confidence[unsure], labels[unsure]
    bins = (given * 10).long().clamp(max=9)
    gaps = [
        (given[bins == i].mean() - truth[bins == i].mean()).abs().item() * int((bins == i).sum())
        for i in range(10)
        if (bins == i).any()
    ]
    precisions = [average_precision(confidence[:, k].numpy(), there[:, k].numpy()) for k in range(labels.shape[1])]
    known = [value for value in precisions if value is not None]
    return {
        "map": round(sum(known) / len(known), 4),
        "precision": round(right / max(1, int(found.sum())), 4),
        "recall": round(right / max(1, int(there.sum())), 4),
        "calibration": round(sum(gaps) / max(1, len(given)), 4),
    }


def average_precision(confidence: np.ndarray, there: np.ndarray) -> float | None:
    """The mean, over what is there, of the precision at its rank by confidence; None where nothing is there."""
    if not there.any():
        return None
    ranked = there[np.argsort(-confidence, kind="stable")]
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    return float(precision[ranked].mean())
