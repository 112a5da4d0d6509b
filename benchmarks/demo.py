"""What ``make demo`` reaches: reward before and after on fixed seeds, with its interval over seeds, and the time.

    python benchmarks/demo.py            # about five minutes a seed on two cores

Each seed is an ordinary run in ``runs/benchmarks/demo/``; a finished one is not run again. Prints a table and writes
``benchmarks/demo.json``.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from diffusionrl.evaluation.intervals import LEVEL, student_t_quantile

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config:
    """Measure the demo."""

    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = HERE.parent / "runs" / "benchmarks" / "demo"


def measure(seed: int, run_dir: Path) -> dict[str, float]:
    if not (run_dir / "seconds.json").is_file():
        began = time.perf_counter()
        command = [sys.executable, "-m", "diffusionrl", "train", "--seed", str(seed), "--run-dir", str(run_dir)]
        subprocess.run(command, check=True)
        (run_dir / "seconds.json").write_text(json.dumps(time.perf_counter() - began))
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rewards = []
    for folder in sorted((run_dir / "samples").glob("step_*")):
        rewards.append([json.loads(line)["reward"] for line in (folder / "samples.jsonl").read_text().splitlines()])
    gains = [after - before for before, after in zip(rewards[0], rewards[-1], strict=True)]
    trained = sum(line.get("time/rollout", 0.0) + line.get("time/update", 0.0) for line in metrics)
    return {
        "seed": seed,
        "before": metrics[0]["eval/reward"],
        "after": metrics[-1]["eval/reward"],
        "gain": statistics.mean(gains),
        "standard_error": math.hypot(metrics[0]["eval/reward_se"], metrics[-1]["eval/reward_se"]),
        "paired_standard_error": statistics.stdev(gains) / math.sqrt(len(gains)),
        "queries": metrics[-1]["queries"],
        "training_seconds": trained,
        "seconds": json.loads((run_dir / "seconds.json").read_text()),
        "largest_ratio_gap": max(line.get("ratio/max_gap", 0.0) for line in metrics),
        "peak_memory_gb": max(line.get("peak_memory_gb", 0.0) for line in metrics),
    }


def main(config: Config) -> None:
    rows = [measure(seed, config.out / f"seed_{seed}") for seed in config.seeds]
    print("\n| seed | before | after | gain | queries | training (s) | whole (s) |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['seed']} | {row['before']:.2f} | {row['after']:.2f} | {row['gain']:+.2f} "
            f"| {row['queries']} | {row['training_seconds']:.0f} | {row['seconds']:.0f} |"
        )
    gains = [row["gain"] for row in rows]
    if len(gains) > 1:
        half = student_t_quantile(LEVEL, len(gains) - 1) * statistics.stdev(gains) / math.sqrt(len(gains))
        print(f"\ngain over seeds: {statistics.mean(gains):.1f} ± {half:.1f} kB (95 %)")
    (HERE / "demo.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
