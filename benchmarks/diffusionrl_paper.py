"""The findings of the DiffusionRL paper (arXiv 2401.12244) on the embedded model.

    python benchmarks/diffusionrl_paper.py               # every run (hours), then tables, a plot and JSON in docs/reproduction/
    python benchmarks/diffusionrl_paper.py --only grid   # runs whose name begins so; the report holds what is there
    python benchmarks/diffusionrl_paper.py --jobs 0      # the report alone

Each run is an ordinary ``diffusionrl train`` in ``runs/benchmarks/diffusionrl_paper/``, on one thread; ``--jobs`` of them at a
time. What it made is then scored on the test sets of all three tasks (``test.json`` beside it). A finished run is not made
again and an unfinished one goes on, so the command may be stopped and given again at any time.
"""

import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from ddpo_paper import finished, make
from ddpo_paper_runs import SEEDS, Run
from diffusionrl_paper_report import report
from diffusionrl_paper_runs import RATES, base, final_runs, grid, prompt_file
from torch import Tensor

from diffusionrl.config import SamplingConfig
from diffusionrl.data.prompts import Prompt, load_prompts
from diffusionrl.emoji.classifier import SceneClassifier, load_classifier
from diffusionrl.emoji.scenes import draw_images
from diffusionrl.evaluation.fixed_seed import evaluate
from diffusionrl.policies import load_trained
from diffusionrl.policies.base import Policy
from diffusionrl.rewards import load_mixture

HERE = Path(__file__).parent
TESTS = {
    "preference": ("other-animals", ("preference",), 90, 1),
    "composition, seen things": ("thing-pairs", ("composition", "composition-judge"), 96, 1),
    "composition, unseen things": ("unseen-thing-pairs", ("composition", "composition-judge"), 96, 1),
    "parity, seen occupations": ("seen-occupations", ("parity-sp", "parity-squared"), 192, 16),
    "parity, unseen occupations": ("unseen-occupations", ("parity-sp", "parity-squared"), 192, 16),
}
"""Prompts, rewards, images, and images of a prompt."""
DRAWN, REAL = 256, 2048  # images and real scenes whose features are compared
SCENES = 31_337  # a seed of scenes that nothing is trained on


@dataclass(frozen=True)
class Config:
    """Reproduce the DiffusionRL paper on the embedded model."""

    only: str = ""
    """Make only runs whose name begins so."""
    jobs: int = 2
    """Runs at a time, a thread each; 0 makes none."""
    folder: Path = HERE.parent / "runs" / "benchmarks" / "diffusionrl_paper"
    out: Path = HERE.parent / "docs" / "reproduction"


def features(judge: SceneClassifier, images: Tensor) -> Tensor:
    """What the held-out classifier decides by, (N, 256), float64."""
    with torch.no_grad():
        maps = judge.features(images * 2 - 1)
    return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1).double()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D), as in FID (Heusel et al., arXiv 1706.08500)."""
    means = (a.mean(0) - b.mean(0)).square().sum()
    first, second = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return (means + first.trace() + second.trace() - 2 * cross).item()


def real_scenes(first: int, count: int) -> tuple[Tensor, list[Prompt]]:
    """Scenes of one subject, (N, 3, 64, 64) in [0, 1], and their captions."""
    images, scenes = draw_images(SCENES, range(first, first + count), "subject")
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, [Prompt(scene.caption) for scene in scenes]


def test(policy: Policy, folder: Path, sampling: SamplingConfig, seed: int) -> dict[str, float]:
    """Every score of every test set, and the quality of images of single subjects beside real ones of the same captions."""
    found: dict[str, float] = {}
    for name, (prompts, rewards, count, together) in TESTS.items():
        asked, mixture = load_prompts(str(prompt_file(folder, prompts))), load_mixture(rewards)
        evaluation = evaluate(policy, mixture, asked, count, sampling, seed, samples_per_prompt=together)
        for reward, values in evaluation.rollout.scores.parts.items():
            found[f"{name}: {reward}"] = values.nanmean().item()
    judge = load_classifier()
    real = features(judge, real_scenes(DRAWN, REAL)[0])
    twins, captions = real_scenes(0, DRAWN)
    drawn = evaluate(policy, load_mixture(["emoji-judge"]), captions, DRAWN, sampling, seed)
    found["quality: judge names the subject"] = drawn.mean
    found["quality: Frechet distance"] = frechet_distance(features(judge, drawn.rollout.images), real)
    found["quality: Frechet distance of real scenes"] = frechet_distance(features(judge, twins), real)
    return found


def score(folder: Path, group: str, model: str, seed: int) -> None:
    """``test`` of a model into a file of the group's seed, if it is not there."""
    file = folder / group / f"seed_{seed}" / "test.json"
    if file.is_file():
        return
    sampling = base(folder, "parity", seed, RATES[0]).sampling
    file.parent.mkdir(parents=True, exist_ok=True)
    found = test(load_trained(model), folder, sampling, seed)
    assert all(map(math.isfinite, found.values())), found
    half = file.with_suffix(".half")
    half.write_text(json.dumps(found, indent=1) + "\n")
    half.rename(file)
    print(f"{file.parent.relative_to(folder)}: scored", flush=True)


def make_and_score(folder: Path, run: Run) -> None:
    make(run, folder)
    score(folder, str(Path(run.name).parent), str(folder / run.name), run.config.seed)


def main(config: Config) -> None:
    config.folder.mkdir(parents=True, exist_ok=True)
    if config.jobs:
        # processes: two threads that load a model at the same time get in each other's way
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(config.jobs, context, torch.set_num_threads, (1,)) as pool:
            trials = [run for run in grid(config.folder) if run.name.startswith(config.only)]
            list(pool.map(partial(make, folder=config.folder), trials))
            if not all(finished(config.folder / run.name) for run in grid(config.folder)):
                print("the rest needs the grid: --only grid")
            else:
                list(pool.map(partial(score, config.folder, "base", "emoji"), SEEDS))
                runs = [run for run in final_runs(config.folder) if run.name.startswith(config.only)]
                list(pool.map(partial(make_and_score, config.folder), runs))
    report(config.folder, config.out)


if __name__ == "__main__":
    main(tyro.cli(Config))
