"""The embedded models as judges: how often the diffusion classifier names the caption of a fresh scene, by number of noises.

Single subjects, each among twenty captions; and pairs against their own captions in the other order, where bags of words fail.

    python benchmarks/classify.py --out classify_results [--scenes 40] [--noises 64]

One pass gives all smaller numbers of noises, as their times are nested. Writes results.json and prints the table.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from diffusionrl.config.judges import DiffusionClassifierConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.emoji.scenes import Scene, draw_scene
from diffusionrl.emoji.vocabulary import SUBJECTS, with_article
from diffusionrl.evaluation.intervals import win_rate
from diffusionrl.rewards.diffusion_classifier import load_classifier
from diffusionrl.training.disk import cropped

SCENES = 20_000_000  # a seed that no training has
CLASSES = 20
NAMES = list(SUBJECTS)


def subjects(index: int) -> tuple[Scene, list[str]]:
    """A scene, and captions of which the first is its own."""
    names = [NAMES[(7 * index + 5 * other) % len(NAMES)] for other in range(CLASSES)]
    scene = draw_scene(SCENES, index, "subject", names=names[:1])
    return scene, list(dict.fromkeys(map(with_article, names)))


def pairs(index: int) -> tuple[Scene, list[str]]:
    left, right = NAMES[(7 * index) % len(NAMES)], NAMES[(7 * index + 31) % len(NAMES)]
    scene = draw_scene(SCENES, index, "pair", names=(left, right))
    return scene, [scene.caption, f"{with_article(right)} and {with_article(left)}"]


def measure(model: str, kind: str, scenes: int, noises: int) -> dict[str, Any]:
    config = DiffusionClassifierConfig(model=model, trials=(noises,), keep=())
    classifier = load_classifier(config, Prompt("a cat"))
    counts = [2**power for power in range(noises.bit_length()) if 2**power <= noises]
    right: dict[int, list[float]] = {count: [] for count in counts}
    began = time.perf_counter()
    for index in range(scenes):
        scene, captions = (subjects if kind == "subjects" else pairs)(index)
        image = cropped(scene.image, classifier.policy.sample_shape)
        place = index % len(captions)  # where its own is put, so that a tie is no success
        captions = [*captions[1:][:place], captions[0], *captions[1:][place:]]
        errors = classifier.errors(image, [Prompt(caption) for caption in captions])
        for count in counts:
            right[count].append(1.0 if errors[:, :count].mean(1).argmin() == place else -1.0)
    seconds = (time.perf_counter() - began) / scenes
    found = {count: win_rate(each) for count, each in right.items()}
    return {"seconds": seconds, "accuracy": {count: [each.value, each.low, each.high] for count, each in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("classify_results"))
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--noises", type=int, default=64)
    chosen = parser.parse_args()
    torch.set_grad_enabled(False)
    chosen.out.mkdir(parents=True, exist_ok=True)
    file = chosen.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for kind in ("pairs", "subjects"):
        for model in ("emoji", "emoji-flow"):
            key = f"{model}, {kind}, {chosen.scenes} scenes, {chosen.noises} noises"
            if key not in results:
                results[key] = measure(model, kind, chosen.scenes, chosen.noises)
                file.write_text(json.dumps(results, indent=2) + "\n")
            shown = {count: f"{100 * value:.0f}" for count, (value, _, _) in results[key]["accuracy"].items()}
            print(f"{key}: {shown} %, {results[key]['seconds']:.1f} s an image", flush=True)


if __name__ == "__main__":
    main()
