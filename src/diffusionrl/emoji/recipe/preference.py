"""The preference model (``emoji/preference.py``), fitted to choices between two scenes for one caption.

A scene shows what the caption says, or, with a chance of ``WRONG``, has one or all of its subjects (or the occupation) drawn by
lot. Some comparisons go through the VAE with noise, as the detector's scenes do. Whenever a comparison comes up, a choice is
drawn anew from the rule's probability; the model sees nothing else of the rule.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.emoji.preference import PreferenceModel, bradley_terry_loss, utility
from diffusionrl.emoji.recipe.detector import roughen, scaled
from diffusionrl.emoji.recipe.training import TrainingConfig, train_stage
from diffusionrl.emoji.recipe.vae import EVALUATION_SEED
from diffusionrl.emoji.scenes import Scene, draw_scene
from diffusionrl.emoji.vocabulary import OCCUPATIONS, SUBJECTS, with_article
from diffusionrl.rewards.clip import CLIP

KINDS = {"subject": 0.4, "pair": 0.4, "person": 0.2}
WRONG = 0.35
NUM_EVALUATION = 1000  # comparisons as drawn, and a quarter as many through the VAE


@dataclass(frozen=True)
class PreferenceConfig(TrainingConfig):
    """Train the preference model."""

    out: Path = Path("runs/emoji/preference")
    vae: Path = Path("runs/emoji/vae/vae")
    clip: Path = Path("runs/emoji/clip/clip")
    num_steps: int = 1200
    batch_size: int = 128
    """Comparisons."""
    learning_rate: float = 4e-3
    num_comparisons: int = 10_000
    """Drawn once and passed over several times."""
    num_rough: int = 1500
    """Further ones that have been through the VAE, with noise."""


def draw_comparison(seed: int, index: int) -> tuple[str, tuple[Scene, Scene], tuple[float, float]]:
    """A caption, two scenes, and the share of what it names that each shows."""
    rng = seeds.numpy_generator(seed, "comparison", index)
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    pool = list(OCCUPATIONS if kind == "person" else SUBJECTS)
    names = [pool[i] for i in rng.choice(len(pool), 2 if kind == "pair" else 1, replace=False)]
    scenes, shares = [], []
    for side in range(2):
        shown = list(names)
        if rng.random() < WRONG:
            places = range(len(names)) if rng.random() < 0.5 else [int(rng.integers(len(names)))]
            for place in places:
                shown[place] = pool[int(rng.integers(len(pool)))]
        scenes.append(draw_scene(seed, 2 * index + side, kind, names=shown))
        shares.append(len(set(names) & set(shown)) / len(names))
    return " and ".join(map(with_article, names)), (scenes[0], scenes[1]), (shares[0], shares[1])


@dataclass(frozen=True)
class Comparisons:
    """N pairs of images.

    Attributes:
        images: uint8, (N, 2, 64, 64, 3).
        embedded: CLIP's embeddings of them, (N, 2, D).
        prompts: CLIP's embeddings of the captions, (N, D).
        shares, utilities: by the rule, (N, 2).
    """

    images: Tensor
    embedded: Tensor
    prompts: Tensor
    shares: Tensor
    utilities: Tensor

    @property
    def probability(self) -> Tensor:
        """That the first is preferred, (N,)."""
        return (self.utilities[:, 0] - self.utilities[:, 1]).sigmoid()

    def score(self, model: PreferenceModel, chosen: Tensor) -> Tensor:
        """Of both images of each chosen comparison, (B, 2)."""
        device = next(model.parameters()).device
        images = scaled(self.images[chosen].flatten(0, 1)).to(device)
        prompts = self.prompts[chosen].repeat_interleave(2, 0).to(device)
        return model(images, self.embedded[chosen].flatten(0, 1).to(device), prompts).view(-1, 2)


def load_comparisons(config: PreferenceConfig, seed: int, count: int, rough: bool) -> Comparisons:
    """``count`` comparisons, through the VAE if ``rough``, kept in a file for the next start."""
    file = config.out / f"{'rough' if rough else 'drawn'}_{seed}.safetensors"
    if not file.exists():
        drawn = [draw_comparison(seed, index) for index in range(count)]
        images = torch.from_numpy(np.stack([np.asarray(scene.image) for _, scenes, _ in drawn for scene in scenes]))
        if rough:
            vae = AutoencoderKL.from_pretrained(config.vae).float().eval().to(config.device)
            images = roughen(vae, images, seed, config.device)
        clip = CLIP(str(config.clip))
        with torch.no_grad():
            embedded = torch.cat([clip.embed_images(scaled(part)) for part in torch.split(images, 500)])
        shares = torch.tensor([each for _, _, each in drawn])
        parts = zip(torch.split(images, 500), torch.split(shares.flatten(), 500), strict=True)
        utilities = torch.cat([utility(scaled(part), share) for part, share in parts])
        found = {
            "images": images.view(count, 2, *images.shape[1:]),
            "embedded": embedded.view(count, 2, -1),
            "prompts": clip.embed_texts([caption for caption, _, _ in drawn]),
            "shares": shares,
            "utilities": utilities.view(count, 2),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in found.items()}, file)
        print(f"{count} comparisons", flush=True)
    return Comparisons(**load_file(file))


def join(first: Comparisons, second: Comparisons) -> Comparisons:
    return Comparisons(*(torch.cat([getattr(part, name) for part in (first, second)]) for name in first.__dataclass_fields__))


def draw_choices(probability: Tensor, draw: torch.Generator) -> Tensor:
    """Whether the first of each comparison is chosen, bool, (B,)."""
    return torch.rand(probability.shape, generator=draw) < probability


def train_preference(config: PreferenceConfig) -> None:
    torch.manual_seed(config.seed)
    data = join(
        load_comparisons(config, config.seed, config.num_comparisons, rough=False),
        load_comparisons(config, config.seed + EVALUATION_SEED + 1, config.num_rough, rough=True),
    )
    model = PreferenceModel(data.prompts.shape[1]).to(config.device)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        draw = seeds.torch_generator(config.seed, "preference", step)
        chosen = torch.randint(len(data.images), (config.batch_size,), generator=draw)
        first = draw_choices(data.probability[chosen], draw).to(config.device)
        one, two = data.score(model, chosen).unbind(1)
        value = bradley_terry_loss(torch.where(first, one, two), torch.where(first, two, one))
        return value, {"loss": value.item(), "accuracy": ((one > two) == first).float().mean().item()}

    train_stage(model, loss, config)
    figures = measure_preference(model, config)
    save_file(model.state_dict(), config.out / "preference.safetensors")
    (config.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def measure_preference(model: PreferenceModel, config: PreferenceConfig) -> dict[str, float]:
    """On comparisons never trained on, as drawn and through the VAE."""
    drawn = load_comparisons(config, EVALUATION_SEED, NUM_EVALUATION, rough=False)
    rough = load_comparisons(config, EVALUATION_SEED, NUM_EVALUATION // 4, rough=True)
    figures = {f"preference_{what}": value for what, value in agreement(model, drawn).items()}
    return figures | {f"preference_rough_{what}": value for what, value in agreement(model, rough).items()}


@torch.no_grad()
def agreement(model: PreferenceModel, data: Comparisons) -> dict[str, float]:
    """How often the model prefers what the rule does, and what a choice drawn from the rule's probability says.

    - rule: of all comparisons; rule_same: where both images show as much of the prompt, so that beauty alone decides;
      rule_other: where they do not;
    - choices: against one choice a comparison; ceiling: what the rule itself would reach there.
    """
    scores = torch.cat([data.score(model, part) for part in torch.split(torch.arange(len(data.images)), 250)]).cpu()
    says, probability = scores[:, 0] > scores[:, 1], data.probability
    choices = draw_choices(probability, seeds.torch_generator(EVALUATION_SEED, "choices"))
    agrees, same = (says == (probability > 0.5)).float(), data.shares[:, 0] == data.shares[:, 1]
    found = {
        "rule": agrees.mean(),
        "rule_same": agrees[same].mean(),
        "rule_other": agrees[~same].mean(),
        "choices": (says == choices).float().mean(),
        "ceiling": torch.maximum(probability, 1 - probability).mean(),
    }
    return {what: round(value.item(), 4) for what, value in found.items()}
