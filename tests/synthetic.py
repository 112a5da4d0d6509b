"""Run folders without a run, for the tests of the pages."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusionrl import TrainConfig
from diffusionrl.config import to_yaml

ENVIRONMENT = {
    "command": ["/somewhere/diffusionrl/__main__.py", "train", "--name", "a run; rm -rf ~"],
    "seed": 0,
    "python": "3.11.7",
    "versions": {"diffusionrl": "0.1.0", "torch": "2.13.0"},
    "platform": "Linux-6.1",
    "device": "NVIDIA H100",
    "threads": 8,
}


def noise(index: int, step: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng([index, step]).integers(0, 256, (size, size, 3), dtype=np.uint8))


def default_reward(index: int, step: int) -> float | None:
    return index + step / 2


def make_run(
    folder: Path,
    steps: int = 8,
    every: int = 4,
    prompts: Sequence[str] = ("a cat", "a dog", "an owl", "a fox"),
    reward: Callable[[int, int], float | None] = default_reward,
    held_out: Callable[[int, int], float | None] = lambda index, step: 1.0 - step / 100,
    draw: Callable[[int, int], Image.Image] = noise,
    finished: bool = True,
    kl: float = 1e-3,
    **settings: Any,
) -> Path:
    """A run of four queries a step, each of 0.9 seconds, with an evaluation over ``prompts`` every so many steps."""
    folder.mkdir(parents=True)
    config = TrainConfig(**{"steps": steps, "prompts": "ddpo-animals", **settings})
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "env.json").write_text(json.dumps(ENVIRONMENT | {"seed": config.seed}))
    lines = []
    for step in range(steps + 1):
        line: dict[str, Any] = {"step": step, "queries": 4 * step}
        if step:
            line |= {
                "reward/mean": 1.5 + step / 2,
                "reward/std": 1.0,
                "reward/invalid": 0,
                "policy/approx_kl": kl,
                "grad_norm": 0.1,
            }
            line |= {"time/rollout": 0.5, "time/reward": 0.1, "time/update": 0.4, "peak_memory_gb": 1.25}
        if step % every == 0:
            scores = [reward(i, step) for i in range(len(prompts))]
            valid = [score for score in scores if score is not None]
            line |= {"eval/reward": float(np.mean(valid)), "eval/reward_se": 0.1, "eval/invalid": len(scores) - len(valid)}
            line |= {"eval/judge": held_out(0, step), "eval/judge_se": 0.01}
            _write_samples(folder / "samples" / f"step_{step:06d}", step, prompts, scores, held_out, draw)
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    if finished:
        (folder / "finished.json").write_text(json.dumps({"steps": steps}))
    return folder


def _write_samples(folder: Path, step: int, prompts: Any, scores: Any, held_out: Any, draw: Any) -> None:
    folder.mkdir(parents=True)
    with (folder / "samples.jsonl").open("w") as lines:
        for index, (prompt, score) in enumerate(zip(prompts, scores, strict=True)):
            draw(index, step).save(folder / f"{index:05d}.png", compress_level=0)
            entry = {
                "index": index,
                "prompt": prompt,
                "reward": score,
                "valid": score is not None,
                "judge": held_out(index, step),
            }
            lines.write(json.dumps(entry) + "\n")
