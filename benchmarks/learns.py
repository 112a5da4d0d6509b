"""Does every objective learn? Each on both embedded worlds, from its shipped settings, beside the same run on a noise reward.

    python benchmarks/learns.py                      # hours on two cores; may be stopped and taken up again
    python benchmarks/learns.py nft awm --worlds emoji-flow

JPEG compressibility in kilobytes, on 90 fixed seeds; for the reward gradients, which need a reward that has one, the embedded
preference model, without the noise. A gain is that of the last evaluation over the first, paired by sample,
with its standard error; what the same settings do to it when they are trained on noise stands beside it. An objective has
learned where its gain is more than three standard errors, and more than the noise's by three of the difference. One run each:
this says that an objective learns, not which one is better. Writes benchmarks/learns.json.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_suffix(".json")
POLICY_GRADIENT = ("ddpo", "diffusionrl", "grpo", "grpo-fast", "mixgrpo", "grpo-guard", "flow-dppo", "tempflow")
REWARD_GRADIENT = ("draft", "alignprop", "refl", "drtune", "flowbp")
FORWARD = ("nft", "awm", "ram", "flow-awr", "v-grpo", "epg", "dgpo", "crd", "orw", "rwr")
PREFERENCE = ("dpo", "kto", "d3po", "pso", "pso-offline")
OPTIONS: dict[str, list[str]] = {
    "diffusionrl": ["--algorithm.timesteps-per-step", "4"],
    "grpo": ["--algorithm.clip-range", "1e-3", "--algorithm.step-weight-power", "2"],
    "grpo-fast": ["--algorithm.clip-range", "1e-3"],
    "mixgrpo": ["--algorithm.clip-range", "1e-3", "--algorithm.step-weight-power", "2", "--algorithm.window.every", "3"],
    "grpo-guard": ["--algorithm.clip-range", "1e-4"],
    "flow-dppo": ["--algorithm.divergence", "1e-3", "--algorithm.step-weight-power", "2"],
    "tempflow": ["--algorithm.clip-range", "5e-3"],
    "crd": ["--algorithm.noisings", "4"],
    "rwr": ["--algorithm.updates-per-step", "4", "--algorithm.batch-size", "48"],
    "d3po": ["--algorithm.step-weight-power", "2"],
}
"""What an objective is given beyond its preset, as the run is small, and clips are published for 64 times as many latent
dimensions: said in the table."""


def reward_of(name: str) -> str:
    """What an objective is trained on, and judged by."""
    return "preference" if name in REWARD_GRADIENT else "compressibility"


def options_of(name: str, world: str) -> list[str]:
    preset = world if name in (*POLICY_GRADIENT, "d3po", "pso") else f"{world}-forward"
    return ["--preset", preset, "--algorithm.name", name, *OPTIONS.get(name, [])]


def run(name: str, world: str, reward: str, runs: Path) -> dict[str, Any]:
    """A finished run's figures."""
    folder = runs / f"{world}_{name}_{reward}"
    command = [sys.executable, "-m", "diffusionrl", "train", *options_of(name, world), "--reward", reward]
    held_out = "emoji-judge" if reward == reward_of(name) else reward_of(name)
    finished = subprocess.run(
        [*command, "--run-dir", str(folder), "--evaluation.held-out", held_out, "--evaluation.every", "0"],
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)}\n{finished.stdout[-2000:]}{finished.stderr[-2000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = "reward" if reward == reward_of(name) else reward_of(name)
    last, first = lines[-1], lines[0]
    return {
        "queries": last["queries"],
        "before": first[f"eval/{measured}"],
        "gain": last[f"eval/{measured}_change"],
        "se": last[f"eval/{measured}_change_se"],
        "judge": last.get("eval/emoji-judge_change"),
        "rollout_seconds": statistics.median(line["time/rollout"] for line in lines if "time/rollout" in line),
        "update_seconds": statistics.median(line["time/update"] for line in lines if "time/update" in line),
        "peak_gb": max(line.get("peak_memory_gb", 0) for line in lines),
        "minutes": sum(line.get(key, 0) for line in lines for key in ("time/rollout", "time/update", "time/evaluation")) / 60,
    }


def row(name: str, world: str, found: dict[str, Any], drift: dict[str, Any] | None) -> dict[str, Any]:
    drift = drift or {"gain": 0.0, "se": 0.0}  # noise has no gradient to follow
    net, error = found["gain"] - drift["gain"], math.hypot(found["se"], drift["se"])
    learned = found["gain"] > 3 * found["se"] and net > 3 * error
    beside = {"noise_gain": drift["gain"], "noise_se": drift["se"], "learned": learned}
    return {"objective": name, "world": world, **found, **beside}


def table(rows: list[dict[str, Any]]) -> str:
    columns = ["objective", "world", "queries", "before", "gain", "on noise", "judge", "rollout, s", "update, s", "learned"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for each in rows:
        figures = [
            f"{each['queries']} | {each['before']:.1f}",
            f"{each['gain']:+.2f} ± {each['se']:.2f} | {each['noise_gain']:+.2f} ± {each['noise_se']:.2f}",
            f"{each['judge']:+.3f}",
            f"{each['rollout_seconds']:.1f} | {each['update_seconds']:.1f} | {'yes' if each['learned'] else 'no'}",
        ]
        lines.append(f"| {each['objective']} | {each['world']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objectives", nargs="*", default=[*POLICY_GRADIENT, *FORWARD, *PREFERENCE, *REWARD_GRADIENT])
    parser.add_argument("--worlds", nargs="*", default=["emoji-flow", "emoji"])
    parser.add_argument("--runs", type=Path, default=Path("runs/learns"))
    asked = parser.parse_args()
    known = {(each["objective"], each["world"]): each for each in json.loads(RESULTS.read_text())} if RESULTS.is_file() else {}
    for world in asked.worlds:
        for name in asked.objectives:
            found = run(name, world, reward_of(name), asked.runs)
            drift = None if name in REWARD_GRADIENT else run(name, world, "noise", asked.runs)
            known[name, world] = row(name, world, found, drift)
            RESULTS.write_text(json.dumps(list(known.values()), indent=1) + "\n")
            print(table([known[name, world]]), flush=True)
    print(table(list(known.values())))


if __name__ == "__main__":
    main()
