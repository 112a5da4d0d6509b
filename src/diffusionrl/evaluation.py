"""Fixed-seed evaluation: the same prompts and the same noise every time, so that differences are the policy's."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusionrl.config import SamplingConfig
from diffusionrl.images import image_grid, to_pil
from diffusionrl.policies.base import Policy
from diffusionrl.prompts import Prompt
from diffusionrl.rewards.base import Reward
from diffusionrl.rollout import Rollout, collect


@dataclass(frozen=True)
class Evaluation:
    """A rollout on the fixed seeds, with the mean of its valid scores and the standard error of that mean."""

    rollout: Rollout
    mean: float
    standard_error: float


def evaluate(
    policy: Policy, reward: Reward, prompts: Sequence[Prompt], num_samples: int, sampling: SamplingConfig, seed: int
) -> Evaluation:
    """Score ``num_samples`` images over the prompts in turn."""
    asked = [prompts[i % len(prompts)] for i in range(num_samples)]
    rollout = collect(policy, reward, asked, sampling, seed, "evaluation", 0)
    values = rollout.scores.values[rollout.scores.valid]
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Evaluation(rollout, values.mean().item() if len(values) else math.nan, error)


def write_samples(rollout: Rollout, folder: Path) -> None:
    """``grid.png``, every image, and ``samples.jsonl``. File names come from the index, never from a prompt."""
    folder.mkdir(parents=True)
    tiles = [to_pil(image) for image in rollout.images]
    image_grid(tiles, columns=8).save(folder / "grid.png")
    with (folder / "samples.jsonl").open("w") as lines:
        for index, (tile, prompt) in enumerate(zip(tiles, rollout.prompts, strict=True)):
            tile.save(folder / f"{index:05d}.png")
            valid = bool(rollout.scores.valid[index])
            entry = {
                "index": index,
                "prompt": prompt.text,
                "reward": rollout.scores.values[index].item() if valid else None,
                "valid": valid,
            }
            lines.write(json.dumps(entry) + "\n")
