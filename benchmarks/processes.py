"""What several processes cost and gain: a step of the demo on 1 and on 2 of them, and what that predicts for more.

    python benchmarks/processes.py

Each process has one thread, so on a machine of two cores the two do not get in each other's way. Writes
``benchmarks/processes.json`` and prints the tables of docs/processes.md.

The prediction for W processes: sampling, rewards and updates are shared evenly, each update waits for the process with the most
rows, and a message takes its bytes over the bandwidth and a latency for each of its 2 (W - 1) hops (a ring).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from diffusionrl.runs.lines import read_metrics

HERE = Path(__file__).parent
PROCESSES = (1, 2)
PREDICTED = (2, 8, 64)


@dataclass(frozen=True)
class Config:
    """Measure and predict."""

    steps: int = 6
    """Steps of each run; the first is not counted."""
    rounds: int = 3
    """Runs of each, in turn."""
    bandwidth: float = 1.25e9
    """Bytes a second between two processes: 10 Gbit/s."""
    latency: float = 50e-6
    """Seconds a hop."""
    samples_per_second: float = 1.0
    """A GPU's, for the prediction: sampled, scored and trained on. About what Stable Diffusion 1.5 takes at 50 steps."""
    samples: int = 256
    """A step's."""
    updates: int = 4
    """A step's."""
    parameters: int = 797_184
    """Trained: a LoRA of rank 4 on the attention of Stable Diffusion 1.5."""


def measure(count: int, steps: int) -> list[dict[str, float]]:
    """Metrics of the steps of the demo on so many processes, without the first."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        options = ["--steps", str(steps), "--evaluation.num-samples", "2", "--run-dir", str(run_dir), "--policy.device", "cpu"]
        command = [sys.executable, *launcher, "-m", "diffusionrl", "train", *options]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        return [line for line in read_metrics(run_dir) if line["step"] > 1]


def seconds(line: dict[str, float]) -> float:
    """Of a step; rewards that are waited for are part of the rollout here."""
    return line["time/rollout"] + line["time/update"]


def predict(config: Config, count: int) -> dict[str, float]:
    """Of a step on so many GPUs, by the model above. DDPO's updates take one of ``updates`` samples in a row each, so processes
    with as many whole rows of them have equal work."""
    own = config.samples / count
    most = -(-own // config.updates) * config.updates  # an update waits for whoever has a sample more
    work = most / config.samples_per_second
    message = 8 * config.parameters  # gradients are added up in double precision
    sent = config.updates * 2 * message * (count - 1) / count
    waiting = config.updates * 2 * (count - 1) * config.latency + sent / config.bandwidth
    alone = config.samples / config.samples_per_second
    return {
        "processes": count,
        "seconds": work + waiting,
        "speedup": alone / (work + waiting),
        "efficiency": alone / (work + waiting) / count,
        "communicating": waiting / (work + waiting),
        "megabytes": sent / 1e6,
    }


def main(config: Config) -> None:
    lines: dict[int, list[dict[str, float]]] = {count: [] for count in PROCESSES}
    for _ in range(config.rounds):
        for count in PROCESSES:
            lines[count] += measure(count, config.steps)
    found = {}
    for count in PROCESSES:
        shares = [line.get("time/communication", 0.0) / seconds(line) for line in lines[count]]
        found[count] = {
            "seconds": statistics.median(map(seconds, lines[count])),
            "lowest": min(map(seconds, lines[count])),
            "highest": max(map(seconds, lines[count])),
            "waiting_or_communicating": statistics.median(shares),
            "bytes": statistics.median(line.get("communication/bytes", 0.0) for line in lines[count]),
        }
    predicted = [predict(config, count) for count in PREDICTED]
    (HERE / "processes.json").write_text(json.dumps({"measured": found, "predicted": predicted}, indent=1) + "\n")
    print("| processes | seconds a step, median (lowest to highest) | waiting or communicating | sent a step and process |")
    print("|---|---|---|---|")
    for count, each in found.items():
        spread = f"{each['seconds']:.2f} ({each['lowest']:.2f} to {each['highest']:.2f})"
        print(f"| {count} | {spread} | {each['waiting_or_communicating']:.1%} | {each['bytes'] / 1e6:.1f} MB |")
    print("\n| GPUs | predicted speed-up | efficiency | communicating | sent a step and process |\n|---|---|---|---|---|")
    for each in predicted:
        cells = [f"{each['processes']:.0f}", f"{each['speedup']:.1f}", f"{each['efficiency']:.0%}"]
        print(f"| {' | '.join(cells)} | {each['communicating']:.2%} | {each['megabytes']:.0f} MB |")


if __name__ == "__main__":
    main(tyro.cli(Config))
