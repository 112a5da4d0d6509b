"""Can drift raise a gold score? Runs on a reward of noise, at rates at which weights fall apart, scored image by image.

    python benchmarks/gold.py              # six runs of the embedded models, half an hour on one thread, then the table
    python benchmarks/gold.py --no-train   # the table of the runs that are there

Each run is an ordinary one in ``runs/benchmarks/gold/``; a finished one is not run again. Every evaluation draws the same 90
prompts and seeds, so what changed since before training is paired, with its standard error over images. Writes
``benchmarks/gold.json`` and the table of docs/embedded_world.md.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from diffusionrl.data.media import open_image
from diffusionrl.evaluation.fixed_seed import mean_and_error
from diffusionrl.rewards import load_reward, score

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "embedded_world.md"
BEGIN, END = "<!-- figures: benchmarks/gold.py writes these lines -->", "<!-- end of figures -->"
UNET = "--sampling.num-steps 8 --algorithm.variant sf --algorithm.updates-per-step 1 --optimizer.learning-rate 1e-2"
FLOW = "--model emoji-flow --optimizer.learning-rate 5e-3"
PAIRS = "--prompts thing-pairs"
RUNS = {
    "emoji/animals_0": UNET,
    "emoji-flow/animals_0": FLOW,
    "emoji/pairs_0": f"{UNET} {PAIRS}",
    "emoji/animals_1": UNET,
    "emoji-flow/pairs_0": f"{FLOW} {PAIRS}",
    "emoji/animals_2": UNET,
}
"""By name, which ends with the seed: what is not as in the preset."""
SCORES = ("emoji-gold", "emoji-judge", "emoji-template", "emoji-scene")


@dataclass(frozen=True)
class Config:
    """Check the gold scores on drifting weights."""

    train: bool = True
    folder: Path = HERE.parent / "runs" / "benchmarks" / "gold"


def train(name: str, run_dir: Path) -> None:
    options = f"--steps 16 --reward noise --evaluation.held-out emoji-gold --evaluation.every 4 {RUNS[name]}"
    command = [sys.executable, "-m", "diffusionrl", "train", "--run-dir", str(run_dir), "--seed", name.rpartition("_")[2]]
    subprocess.run([*command, *shlex.split(options)], check=True)


def scores_of(samples: Path) -> dict[str, Tensor]:
    """Of an evaluation's images, by name, NaN where invalid."""
    prompts = [json.loads(line)["prompt"] for line in (samples / "samples.jsonl").read_text().splitlines()]
    pixels = [np.asarray(open_image(samples / f"{index:05d}.png")) for index in range(len(prompts))]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    found = {name: score(load_reward(name), images, prompts, [{}] * len(prompts)) for name in SCORES}
    return {name: torch.where(each.valid, each.values, torch.nan) for name, each in found.items()}


def measure(run_dir: Path) -> list[dict[str, Any]]:
    """At each evaluation, the mean of each score; its change since the first one, and that one's standard error."""
    folders = sorted((run_dir / "samples").glob("step_*"))
    found = [scores_of(folder) for folder in folders]
    lines = []
    for folder, now in zip(folders, found, strict=True):
        changes = {name: mean_and_error(values - found[0][name]) for name, values in now.items()}
        figures = {name: [values.nanmean().item(), *changes[name]] for name, values in now.items()}
        lines.append({"step": int(folder.name.rpartition("_")[2])} | figures)
    return lines


def rises_of(runs: dict[str, Any], name: str) -> dict[str, float]:
    """How often a score has risen beyond two standard errors, and by how much at most."""
    changes = [line[name][1:] for lines in runs.values() for line in lines[1:]]
    risen = sum(change > 2 * error for change, error in changes)
    return {"risen": risen, "evaluations": len(changes), "most": max(change for change, _ in changes)}


def table(runs: dict[str, Any], rises: dict[str, dict[str, float]]) -> str:
    """The last evaluation of each run, in Markdown."""
    rows = [f"| after 16 steps on noise | {' | '.join(f'`{name}`' for name in SCORES)} |", "|---|" + "---|" * len(SCORES)]
    for run, lines in runs.items():
        cells = []
        for name in SCORES:
            now, change, error = lines[-1][name]
            cells.append(f"{now:.2f} ({change:+.2f} ± {error:.2f})".replace("-", "−"))
        rows.append(f"| `{run}` | {' | '.join(cells)} |")
    cells = [f"{each['risen']} of {each['evaluations']}" for each in rises.values()]
    rows.append(f"| evaluations at which it is up by more than two standard errors | {' | '.join(cells)} |")
    return "\n".join(rows)


def main(config: Config) -> None:
    runs: dict[str, Any] = {}
    for name in RUNS:
        if config.train:
            train(name, config.folder / name)
        if (config.folder / name / "finished.json").is_file():
            runs[name] = measure(config.folder / name)
    rises = {name: rises_of(runs, name) for name in SCORES}
    rounded = json.loads(json.dumps({"runs": runs, "rises": rises}), parse_float=lambda text: round(float(text), 4))
    (HERE / "gold.json").write_text(json.dumps(rounded, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(runs, rises)}\n\n{END}{rest.partition(END)[2]}")
    print(table(runs, rises))


if __name__ == "__main__":
    main(tyro.cli(Config))
