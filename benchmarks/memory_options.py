"""What the settings that save memory save, and cost, on the embedded flow model: docs/models.md, "Memory".

    python benchmarks/memory_options.py       # three minutes on a core; int8 needs torchao

What an image or a row adds is the difference of two peaks of what PyTorch holds. Seconds are the processor's, of sixteen rows
or images.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

from diffusionrl import load_policy
from diffusionrl.cli.parsing import quiet_libraries
from diffusionrl.data.prompts import Prompt
from diffusionrl.policies.encoders import encoders_of

ROWS = 16
COLUMNS = ["network, MB", "encoders, MB", "decoding, MB an image", "update, MB a row", "decoding, s", "update, s"]
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "VAE slicing": {"vae_slicing": True},
    "int8": {"quantization": "int8"},
}


def tensors_of(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Those that a quantised weight is kept in."""
    inner = getattr(weight, "__tensor_flatten__", None)
    yield from [weight] if inner is None else [getattr(weight, name) for name in inner()[0]]


def megabytes(part: torch.nn.Module) -> float:
    return sum(tensor.nbytes for weight in part.parameters() for tensor in tensors_of(weight)) / 1e6


def peak(work: Callable[[int], object], n: int) -> float:
    """Megabytes that PyTorch had come to hold, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work(n)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda each: each.start_ns()))) / 1e6


def seconds(work: Callable[[int], object]) -> float:
    began = time.process_time()
    work(ROWS)
    return time.process_time() - began


def figures_of(settings: dict[str, Any]) -> list[float]:
    """In the order of ``COLUMNS``."""
    policy: Any = load_policy("emoji-flow", lora_rank=16, device="cpu", **settings)
    prompts, levels = [Prompt("a cat")] * ROWS, policy.grid(16).levels
    x = policy.start(prompts, range(ROWS))

    def update(n: int) -> None:
        x0, _ = policy.denoise(x[:n], levels[torch.full((n,), 8)], prompts[:n], 3.0)
        x0.square().mean().backward()

    def decode(n: int) -> None:
        policy.decode(x[:n], prompts[:n])

    parts = policy.pipeline.components
    weights = [megabytes(parts["transformer"]), sum(map(megabytes, encoders_of(parts).values()))]
    activations = [(peak(work, ROWS) - peak(work, 1)) / (ROWS - 1) for work in (decode, update)]
    return [*weights, *activations, *[min(seconds(work) for _ in range(3)) for work in (decode, update)]]


def main() -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    print(f"| | {' | '.join(COLUMNS)} |\n|{'---|' * (1 + len(COLUMNS))}")
    for name, settings in SETTINGS.items():
        if "quantization" in settings and find_spec("torchao") is None:
            print(f"| {name} | torchao is not installed |")
        else:
            print(f"| {name} | {' | '.join(f'{figure:.2f}' for figure in figures_of(settings))} |", flush=True)


if __name__ == "__main__":
    main()
