"""What a step of every objective costs, beside DDPO's: processor time and memory, on both embedded worlds.

    python benchmarks/steps.py                        # 45 minutes of a processor; may be stopped and taken up again
    python benchmarks/steps.py nft awm --worlds emoji-flow

The settings are those of learns.py: 48 samples a step (DDPO and DiffusionRL on ``emoji``: 64). Each objective has a process of
its own, on one thread, and makes three steps after one that warms up; the table gives the median and the range. Time is the
processor's, so other work on the machine counts little. Memory is what the process holds at its peak beyond what it held with
the model loaded. The reward costs nothing, or, for reward gradients, is the embedded preference model. Writes steps.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from learns import FORWARD, POLICY_GRADIENT, PREFERENCE, REWARD_GRADIENT, options_of  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
STEPS = 3


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def brightness(images: Any, *_: Any) -> list[float]:
    return list(images.mean((1, 2, 3)).tolist())


def measure(name: str, world: str) -> dict[str, Any]:
    """In this process."""
    import torch

    from diffusionrl.algorithms import make_algorithm
    from diffusionrl.cli import parse_train
    from diffusionrl.data.prompts import load_prompts
    from diffusionrl.policies import load_policy
    from diffusionrl.rewards import load_reward
    from diffusionrl.training.trainer import Trainer

    torch.set_num_threads(1)
    config = parse_train(options_of(name, world))
    policy = load_policy(config.model, sampling=config.sampling, lora_rank=config.policy.lora_rank)
    reward = load_reward("preference") if name in REWARD_GRADIENT else brightness
    trainer = Trainer(policy, reward, load_prompts(config.prompts), make_algorithm(config), config)
    loaded, seconds = peak_mb(), []
    for step in range(1, STEPS + 2):
        began = time.process_time()
        trainer.step(step)
        seconds.append(time.process_time() - began)
    return {
        "objective": name,
        "world": world,
        "samples": config.samples_per_step,
        "seconds": seconds[1:],
        "mb": peak_mb() - loaded,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| objective | world | samples | s a sample | beside DDPO's | MB | beside DDPO's |", f"|{'---|' * 7}"]
    ddpo = {each["world"]: each for each in rows if each["objective"] == "ddpo"}
    for each in rows:
        of_one = [one / each["samples"] for one in each["seconds"]]
        beside = ["", ""]
        if each["world"] in ddpo:
            base = ddpo[each["world"]]
            share = statistics.median(base["seconds"]) / base["samples"]
            beside = [f"{statistics.median(of_one) / share:.2f}", f"{each['mb'] / base['mb']:.2f}"]
        spread = f"{statistics.median(of_one):.3f} ({min(of_one):.3f} to {max(of_one):.3f})"
        figures = [each["objective"], each["world"], str(each["samples"]), spread, beside[0], f"{each['mb']:.0f}", beside[1]]
        lines.append(f"| {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objectives", nargs="*", default=[*POLICY_GRADIENT, *FORWARD, *PREFERENCE, *REWARD_GRADIENT])
    parser.add_argument("--worlds", nargs="*", default=["emoji-flow", "emoji"])
    parser.add_argument("--here", action="store_true", help="one objective, in this process; prints a line of JSON")
    asked = parser.parse_args()
    if asked.here:
        print(json.dumps(measure(asked.objectives[0], asked.worlds[0])))
        return
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    for world in asked.worlds:
        for name in asked.objectives:
            if any((each["objective"], each["world"]) == (name, world) for each in rows):
                continue
            command = [sys.executable, __file__, name, "--worlds", world, "--here"]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
