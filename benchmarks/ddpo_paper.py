"""The findings of the DDPO paper (arXiv 2305.13301) on the embedded model, and two questions of ours.

    python benchmarks/ddpo_paper.py                  # every run (hours), then figures, tables and JSON in docs/reproduction/
    python benchmarks/ddpo_paper.py --only fig4      # runs whose name begins so; the report holds what is there
    python benchmarks/ddpo_paper.py --jobs 0         # the report alone

Each run is an ordinary ``diffusionrl train`` in ``runs/benchmarks/ddpo_paper/``, on one thread; ``--jobs`` of them at a time. A
finished run is not made again and an unfinished one goes on, so the command may be stopped and given again at any time.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from ddpo_paper_report import report
from ddpo_paper_runs import REWARDS, SEEDS, Run, all_runs

from diffusionrl.config import to_yaml
from diffusionrl.data.prompts import load_prompts
from diffusionrl.evaluation.fixed_seed import evaluate
from diffusionrl.policies import load_trained
from diffusionrl.rewards import load_mixture

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config:
    """Reproduce the DDPO paper on the embedded model."""

    only: str = ""
    """Make only runs whose name begins so."""
    jobs: int = 2
    """Runs at a time, a thread each; 0 makes none."""
    folder: Path = HERE.parent / "runs" / "benchmarks" / "ddpo_paper"
    out: Path = HERE.parent / "docs" / "reproduction"


def finished(run_dir: Path) -> bool:
    return (run_dir / "seconds.json").is_file()


def make(run: Run, folder: Path) -> None:
    """Run it to its end, if it is not there."""
    run_dir = folder / run.name
    if finished(run_dir):
        return
    settings = folder / "configs" / f"{run.name.replace('/', '_')}.yaml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(to_yaml(run.config))
    command = [sys.executable, "-m", "diffusionrl", "train", "--config", str(settings), "--run-dir", str(run_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{run.name} failed with status {status}; see {folder / 'log.txt'}")
    seconds = usage.ru_utime + usage.ru_stime  # of the processor: what else the machine does is not counted
    (run_dir / "seconds.json").write_text(json.dumps(seconds))
    print(f"{run.name}: {seconds:.0f} s", flush=True)


def evaluate_elsewhere(run: Run, folder: Path) -> None:
    """Figure 12: the same reward on the animals of training, on other animals and on things, before and after."""
    run_dir = folder / run.name
    if not finished(run_dir) or (run_dir / "elsewhere.json").is_file():
        return
    config, mixture = run.config, load_mixture(run.config.reward)
    found = {}
    for name in (config.prompts, "other-animals", "things"):
        prompts = load_prompts(name)
        means = {
            moment: evaluate(load_trained(model), mixture, prompts, 90, config.sampling, config.seed).mean
            for moment, model in (("before", config.model), ("after", str(run_dir)))
        }
        found[name] = means
    (run_dir / "elsewhere.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{run.name}: evaluated elsewhere", flush=True)


def main(config: Config) -> None:
    config.folder.mkdir(parents=True, exist_ok=True)
    chosen = [run for run in all_runs(config.folder) if run.name.startswith(config.only)]
    if config.jobs:
        with ThreadPoolExecutor(config.jobs) as pool:
            list(pool.map(lambda run: make(run, config.folder), chosen))
        for run in chosen:
            if run.name in {f"fig4/{reward}/ddpo-is/seed_{seed}" for reward in REWARDS for seed in SEEDS}:
                evaluate_elsewhere(run, config.folder)
    report(config.folder, config.out)


if __name__ == "__main__":
    main(tyro.cli(Config))
