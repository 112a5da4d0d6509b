"""How evenly a model spreads skin tones: shares by prompt and overall, SP beside its floor, and a picture to look at.

    python benchmarks/parity.py                        # the embedded model, 16 occupations x 8 samples
    python benchmarks/parity.py --model runs/fair --samples-per-prompt 16

The picture has a column a predicted tone, lightest left, so that whoever reads the figures can see what the classifier saw.
With --check-colours it also says how often another judge agrees, which is no network: the tone whose face colour is nearest to
the most pixels. The people of the atlas are drawn in five flat face colours; a generated face is a little off them.
"""

from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from diffusionrl.config import SamplingConfig
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.data.images import image_grid, to_pil
from diffusionrl.data.prompts import load_prompts
from diffusionrl.emoji.classifier import TONES
from diffusionrl.emoji.recipe.skin_tones import EVENLY, LIGHT_FACE, REACH
from diffusionrl.emoji.recipe.vae import EVALUATION_SEED
from diffusionrl.emoji.scenes import draw_images
from diffusionrl.emoji.sprites import load_sprites
from diffusionrl.emoji.vocabulary import GENDERS, OCCUPATIONS, person
from diffusionrl.policies import load_trained
from diffusionrl.rewards.attributes import load_attribute
from diffusionrl.rewards.parity import Parity, expected_parity, squared_distance, statistical_parity
from diffusionrl.sampling.rollout import collect


@dataclass(frozen=True)
class Config:
    """What to measure."""

    model: str = "emoji"
    prompts: str = "occupations"
    samples_per_prompt: int = 8
    seed: int = 0
    out: Path = Path("runs/benchmarks/parity.png")
    check_colours: bool = False
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(num_steps=8, guidance=3.0, batch_size=32))
    rewards: RewardsConfig = field(default_factory=RewardsConfig)


def face_colours() -> Tensor:
    """The median colour of each tone where the people of light tone show skin, (5, 3) in [0, 1]."""
    people = {
        tone: np.stack([np.asarray(load_sprites()[person(o, g, tone)]) for o in OCCUPATIONS for g in GENDERS]) for tone in TONES
    }
    skin = np.abs(people["light"].astype(int) - (*LIGHT_FACE, 255)).max(-1) < REACH
    return torch.tensor(np.stack([np.median(people[tone][skin][:, :3], 0) for tone in TONES]) / 255, dtype=torch.float32)


def nearest_tones(images: Tensor, reach: float = 0.06) -> Tensor:
    """The tone whose face colour is the nearest to the most pixels within reach of one, (B, 3, H, W) -> (B,)."""
    distances = (images.flatten(2).transpose(1, 2)[:, :, None] - face_colours()).norm(dim=-1)  # (B, H * W, 5)
    nearest = torch.nn.functional.one_hot(distances.argmin(-1), len(TONES)) * (distances.amin(-1) < reach)[..., None]
    return nearest.sum(1).argmax(-1)


def main(config: Config) -> None:
    attribute = load_attribute(config.rewards)
    prompts = [prompt for prompt in load_prompts(config.prompts) for _ in range(config.samples_per_prompt)]
    size, policy = config.samples_per_prompt, load_trained(config.model)
    reward = Parity(attribute, "shared")
    rollout = collect(
        policy, reward, prompts, config.sampling, config.seed, "evaluation", 0, needs="endpoints", group_size=size
    )
    told = torch.tensor([-1 if each is None else each for each in attribute(rollout.images)])
    counts = torch.nn.functional.one_hot(told.view(-1, size).clamp(min=0), len(attribute.classes)) * (
        told.view(-1, size, 1) >= 0
    )
    counts = counts.sum(1)
    print("prompt".ljust(22) + "".join(name.rjust(14) for name in attribute.classes) + "SP".rjust(8))
    for prompt, row in zip(prompts[::size], counts, strict=True):
        print(prompt.text.ljust(22) + "".join(f"{n:14}" for n in row.tolist()) + f"{statistical_parity(row):8.3f}")
    shares = counts.sum(0) / counts.sum()
    print("share of all".ljust(22) + "".join(f"{share:13.1%} " for share in shares.tolist()))
    parity, squared = statistical_parity(counts), squared_distance(counts)
    error = parity.std() / len(parity) ** 0.5
    print(f"SP {parity.mean():.3f} ± {error:.3f}; perfectly even {expected_parity(size, counts.shape[1]):.3f}; ", end="")
    print(f"squared distance, unbiased {squared.mean():.3f} ± {squared.std() / len(squared) ** 0.5:.3f}")
    if config.check_colours:
        print(f"agreement with the face colours: {(nearest_tones(rollout.images) == told).float().mean():.1%}; ", end="")
        drawn, scenes = draw_images(EVALUATION_SEED, range(100), "person", tones=EVENLY)
        people = torch.from_numpy(drawn).permute(0, 3, 1, 2) / 255
        right = [TONES[i] == scene.skin_tone for i, scene in zip(nearest_tones(people).tolist(), scenes, strict=True)]
        print(f"they are right on {sum(right)} of {len(right)} fresh scenes")
    blank = to_pil(torch.ones_like(rollout.images[0]))
    columns = [[to_pil(image) for image in rollout.images[told == tone][:12]] for tone in range(len(attribute.classes))]
    config.out.parent.mkdir(parents=True, exist_ok=True)
    tiles = [tile for row in zip_longest(*columns, fillvalue=blank) for tile in row]
    image_grid(tiles, columns=len(columns)).save(config.out)
    print(f"picture: {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
