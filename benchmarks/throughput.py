"""One DDPO step against TRL's DDPOTrainer (0.23.1, the last release that has it), side by side, as ratios.

    python benchmarks/throughput.py                       # the embedded model, float32, two threads, on the CPU
    python benchmarks/throughput.py --ablate              # what each of our choices brings

The same pipeline, samples, denoising steps, guidance, adapter and number of updates on both sides; a reward that costs nothing.
TRL runs in an environment of its own, which this script makes (``.venv-trl``): "as recommended" with the batch sizes of its
documentation (sample 6, train 3), and at its best over ``TRL_BATCHES``. Runs alternate, and each figure is the median over
rounds with its range. Prints a table and writes ``benchmarks/throughput.json`` (or ``throughput_*.json``).
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

HERE = Path(__file__).parent
TRL = HERE.parent / ".venv-trl"
TRL_PACKAGES = ["trl==0.23.1", "transformers<5", "diffusers<0.37", "peft<0.18", "pillow"]
TRL_RECOMMENDED = (6, 3)
TRL_BATCHES = [(12, 6), (48, 12)]  # (sample, train); train is at most samples / updates
OUR_BATCHES = (48, 48)  # (sample, pairs)
UPDATES = 4
ABLATIONS: dict[str, list[str]] = {
    "as shipped": [],
    "adapter beside its layers": ["--beside-layers"],
    "channels first": ["--channels-first"],
    "update in micro-batches of 12": ["--train-batch", "12"],
    "sampling in batches of 6": ["--sample-batch", "6"],
    "update in micro-batches of 96": ["--train-batch", "96"],
}


@dataclass(frozen=True)
class Config:
    """Measure throughput."""

    rounds: int = 3
    samples: int = 48
    ablate: bool = False
    threads: int = 2


def environment() -> Path:
    """TRL's environment, made on first use. Torch first and by its version, as in the Makefile."""
    python = TRL / "bin" / "python"
    if not (TRL / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", TRL], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "torch==2.13.0"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *TRL_PACKAGES], check=True)
        (TRL / "ready").touch()
    return python


def run(python: Path | str, script: str, options: list[str]) -> dict[str, Any]:
    """One worker in a process of its own; its last line is its result."""
    quiet = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run([python, HERE / script, *options], capture_output=True, text=True, env=quiet)
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(options)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"  {script} {' '.join(options)}: {result['step_seconds']:.1f} s, {result['peak_memory_gb']:.2f} GB", flush=True)
    return result


def summarise(results: list[dict[str, Any]], samples: int) -> dict[str, Any]:
    """Images per second for the whole step, for sampling and for the update, and peak memory: median, least, most."""
    figures: dict[str, Any] = {}
    for part in ("step", "sampling", "update"):
        rates = [samples / result[f"{part}_seconds"] for result in results]
        figures[part] = [statistics.median(rates), min(rates), max(rates)]
    figures["memory"] = statistics.median(result["peak_memory_gb"] for result in results)
    return figures


def compare_with_trl(config: Config) -> dict[str, Any]:
    python = environment()
    from diffusionrl.data.prompts import load_prompts
    from diffusionrl.policies import EMBEDDED_MODEL

    prompts = HERE.parent / "runs" / "benchmarks" / "prompts.txt"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("\n".join(prompt.text for prompt in load_prompts("ddpo-animals")))
    common = ["--samples", str(config.samples), "--threads", str(config.threads), "--updates", str(UPDATES)]
    trl = [*common, "--model", str(EMBEDDED_MODEL), "--prompts", str(prompts)]
    ours = [*common, "--sample-batch", str(OUR_BATCHES[0]), "--train-batch", str(OUR_BATCHES[1])]
    results: dict[str, list[dict[str, Any]]] = {}
    for number in range(config.rounds):
        print(f"round {number + 1} of {config.rounds}", flush=True)
        results.setdefault("diffusionrl", []).append(run(sys.executable, "throughput_ours.py", ours))
        for sample, train in [TRL_RECOMMENDED, *TRL_BATCHES]:
            options = [*trl, "--sample-batch", str(sample), "--train-batch", str(train)]
            results.setdefault(f"TRL, batches {sample} and {train}", []).append(run(python, "throughput_trl.py", options))
    return {name: summarise(found, config.samples) for name, found in results.items()}


def ablate(config: Config) -> dict[str, Any]:
    common = ["--samples", str(config.samples), "--threads", str(config.threads), "--updates", str(UPDATES)]
    common += ["--sample-batch", str(OUR_BATCHES[0]), "--train-batch", str(OUR_BATCHES[1])]
    results: dict[str, list[dict[str, Any]]] = {}
    for _ in range(config.rounds):
        for name, options in ABLATIONS.items():
            results.setdefault(name, []).append(run(sys.executable, "throughput_ours.py", [*common, *options]))
    return {name: summarise(found, config.samples) for name, found in results.items()}


def main(config: Config) -> None:
    table = ablate(config) if config.ablate else compare_with_trl(config)
    first = next(iter(table.values()))
    print(
        "\n| | images/s, whole step | sampling | update | memory (GB) | step, ours as a multiple |\n|---|---|---|---|---|---|"
    )
    for name, row in table.items():
        rates = " | ".join(
            f"{row[part][0]:.2f} ({row[part][1]:.2f} to {row[part][2]:.2f})" for part in ("step", "sampling", "update")
        )
        print(f"| {name} | {rates} | {row['memory']:.2f} | {first['step'][0] / row['step'][0]:.2f} |")
    target = HERE / ("throughput_ablation.json" if config.ablate else "throughput.json")
    target.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
