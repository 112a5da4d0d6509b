"""The judge: ``SceneClassifier`` on fresh single-subject scenes, by cross-entropy."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffusionrl import seeds
from diffusionrl.emoji.classifier import CLASSES, SceneClassifier, name_subjects
from diffusionrl.emoji.recipe.training import TrainingConfig, train_stage
from diffusionrl.emoji.recipe.vae import EVALUATION_SEED
from diffusionrl.emoji.scenes import Scene, draw_images

NUM_EVALUATION_SCENES = 2048


@dataclass(frozen=True)
class ClassifierConfig(TrainingConfig):
    """Train the classifier."""

    out: Path = Path("runs/emoji/classifier")
    num_steps: int = 1200
    batch_size: int = 128
    num_scenes: int = 24_000
    """Scenes drawn once and passed over several times."""


def _scaled(images: object, device: str) -> torch.Tensor:
    return torch.as_tensor(images).to(device).permute(0, 3, 1, 2).float() / 255


def _labels(scenes: list[Scene]) -> torch.Tensor:
    return torch.tensor([CLASSES.index(scene.subjects[0]) for scene in scenes])


def train_classifier(config: ClassifierConfig) -> None:
    torch.manual_seed(config.seed)
    classifier = SceneClassifier().to(config.device)
    images, scenes = draw_images(config.seed, range(config.num_scenes), "subject")
    labels = _labels(scenes).to(config.device)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = seeds.numpy_generator(config.seed, "classifier", step)
        chosen = rng.integers(len(images), size=config.batch_size)
        logits = classifier(_scaled(images[chosen], config.device))
        right = (logits.argmax(1) == labels[chosen]).float().mean().item()
        value = torch.nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        return value, {"loss": value.item(), "accuracy": right}

    train_stage(classifier, loss, config)
    fresh, scenes = draw_images(EVALUATION_SEED, range(NUM_EVALUATION_SCENES), "subject")
    named = name_subjects(classifier, _scaled(fresh, config.device))
    right = sum(name == scene.subjects[0] for name, scene in zip(named, scenes, strict=True))
    figures = {"accuracy_on_fresh_scenes": round(right / len(scenes), 4)}
    save_file(classifier.state_dict(), config.out / "classifier.safetensors")
    (config.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(figures)
