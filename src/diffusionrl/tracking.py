"""The run folder's record: metrics.jsonl is the truth, the progress lines are a mirror of it."""

import json
import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffusionrl.config import TrainConfig, to_yaml
from diffusionrl.errors import UserError

_RECORDED = ("diffusionrl", "torch", "diffusers", "peft", "transformers", "safetensors", "numpy", "pillow")


def peak_memory_gb(device: torch.device) -> float:
    """Most memory in use so far: of the GPU if the policy is on one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def check_new(run_dir: Path) -> None:
    """Raises UserError where the run folder exists: a run is never overwritten."""
    if run_dir.exists():
        raise UserError(f"{run_dir} exists, and a run is never overwritten: choose another --name or --run-dir")


class Tracker:
    """Creates the run folder and writes its record.

    Raises:
        UserError: the folder exists; a run is never overwritten.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, device: torch.device) -> None:
        check_new(run_dir)
        run_dir.mkdir(parents=True)
        self.run_dir, self._total, self._began = run_dir, config.steps, time.perf_counter()
        (run_dir / "config.yaml").write_text(to_yaml(config))
        environment = {
            "command": sys.argv,
            "seed": config.seed,
            "python": platform.python_version(),
            "versions": {package: version(package) for package in _RECORDED},
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
        }
        (run_dir / "env.json").write_text(json.dumps(environment, indent=2) + "\n")

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and print progress. Non-finite numbers are written as null."""
        finite = {k: v if v == v and abs(v) != float("inf") else None for k, v in metrics.items()}
        with (self.run_dir / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps(finite) + "\n")
        print(self._progress(metrics), flush=True)

    def _progress(self, metrics: dict[str, Any]) -> str:
        step = metrics["step"]
        parts = [f"step {step:>4}/{self._total}"]
        if "reward/mean" in metrics:
            parts.append(f"reward {metrics['reward/mean']:8.3f} ± {metrics['reward/std']:.3f}")
        parts.append(f"queries {metrics['queries']:>6}")
        if step:
            remaining = (time.perf_counter() - self._began) / step * (self._total - step)
            parts.append(f"{int(remaining // 60)}:{int(remaining % 60):02d} left")
        if "eval/reward" in metrics:
            parts.append(f"evaluation {metrics['eval/reward']:.3f} ± {metrics['eval/reward_se']:.3f}")
        return "  ".join(parts)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
