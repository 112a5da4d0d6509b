"""Everything that is to be measured on a GPU, in one call, in order of worth.

    python benchmarks/gpu.py --minutes 14                  # docs/throughput.md says what each part is
    python benchmarks/gpu.py --minutes 14 --only tests rate sd15
    python benchmarks/gpu.py --toy                         # every part at toy size, on the CPU

Each part is a process of its own with a limit of its own; its result is written as soon as it is there (gpu.json in ``--out``,
and a table on the screen). What is there already is not measured again: the same command goes on. Networks have random weights
of the published shapes (shapes.py): speed does not ask what they know. Peers are run where their packages are installed.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tyro

HERE = Path(__file__).parent
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "trl",
    "torchao",
    "bitsandbytes",
    "flash-attn",
    "xformers",
)
LEAST = 20.0  # seconds: what is left below that is not begun with
MATRIX = 8192


@dataclass(frozen=True)
class Config:
    """Measure."""

    minutes: float = 14.0
    """For everything, this time; what is left is for the next call."""
    out: Path = HERE.parent / "runs" / "benchmarks" / "gpu"
    only: tuple[str, ...] = ()
    """Parts whose names begin so."""
    toy: bool = False
    """On the CPU, with the embedded models, a step or two."""
    trl_python: str = sys.executable
    """Of an environment with TRL 0.23.1."""


@dataclass(frozen=True)
class Part:
    """Attributes:
    work: gives its result, given the seconds that it may take.
    limit: seconds that it may take at most.
    """

    work: Callable[["Config", float], dict[str, Any]]
    limit: float


@dataclass(frozen=True)
class Case:
    """A model's shape, and how a step of it is timed.

    Attributes:
        options: of throughput_ours.py on a card.
        toy: the embedded model in its place.
    """

    options: list[str]
    toy: str
    levers: dict[str, list[str]] = field(default_factory=dict)


_SHARED = ["--dtype", "bfloat16", "--device", "cuda"]
_FLOW = ["--objective", "grpo", "--num-steps", "10", "--guidance", "4.5", "--rank", "32", "--updates", "2", *_SHARED]
CASES = {
    "sd15": Case(
        [*_SHARED, "--num-steps", "10", "--updates", "2", "--sample-batch", "24", "--train-batch", "24"],
        "emoji",
        {
            "batches of 8": ["--sample-batch", "8", "--train-batch", "8"],
            "batches of 48": ["--sample-batch", "48", "--train-batch", "48"],
            "compiled": ["--beside-layers", "--compile"],
            "CUDA graphs": ["--beside-layers", "--cuda-graphs"],
            "channels first": ["--channels-first"],
            "fused AdamW": ["--fused"],
            "gradient checkpointing": ["--gradient-checkpointing"],
            "text encoders off the card": ["--offload-text-encoders"],
        },
    ),
    "sd3-medium": Case(
        [*_FLOW, "--size", "512", "--sample-batch", "16", "--train-batch", "16"],
        "emoji-flow",
        {
            "batches of 8": ["--sample-batch", "8", "--train-batch", "8"],
            "batches of 32": ["--sample-batch", "32", "--train-batch", "32"],
            "compiled": ["--compile"],
            "cuDNN's attention": ["--attention", "_native_cudnn"],
            "flash attention": ["--attention", "_native_flash"],
            "gradient checkpointing": ["--gradient-checkpointing"],
            "text encoders off the card": ["--offload-text-encoders"],
            "a base in int8": ["--quantization", "int8"],
            "a base in nf4": ["--quantization", "nf4"],
        },
    ),
    "sdxl": Case(
        [*_SHARED, "--samples", "16", "--num-steps", "10", "--updates", "2", "--sample-batch", "8", "--train-batch", "8"],
        "emoji",
    ),
    "flux-dev": Case(
        [*_FLOW, "--samples", "8", "--size", "512", "--sample-batch", "4", "--train-batch", "4", "--gradient-checkpointing"],
        "emoji-flow",
    ),
}
TRL_BATCHES = {"as documented": (6, 3), "batches 24 and 12": (24, 12), "batches 24 and 24": (24, 24)}
PEER_BATCHES = (8, 16)
COMPILED = ("compiled", "CUDA graphs")
TOY = ["--samples", "4", "--group", "2", "--num-steps", "2", "--sample-batch", "4", "--train-batch", "4", "--updates", "1"]
TOY += ["--repeats", "1", "--guidance", "2", "--device", "cpu", "--dtype", "float32"]


def run(command: list[str], seconds: float) -> str:
    """What a command says. Raises RuntimeError with its last words where it fails or takes longer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=HERE.parent)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no end within {seconds:.0f} s") from error
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), done.stdout[-200:])
        raise RuntimeError(f"exit code {done.returncode}: {last[:400]}")
    return done.stdout


def worker(script: str, options: list[str], seconds: float, python: str = sys.executable) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run([python, str(HERE / script), *options], seconds).strip().splitlines()[-1])
    return found


def folder_of(name: str, config: Config) -> Path:
    """A pipeline of that shape with random weights; at toy size, the embedded one."""
    folder = config.out / "models" / (CASES[name].toy if config.toy else name)
    if not (folder / "model_index.json").is_file():
        if config.toy:
            from diffusionrl.policies import load_pipeline

            load_pipeline(CASES[name].toy).save_pretrained(folder)
        else:
            run([sys.executable, str(HERE / "shapes.py"), name, str(folder), "--weights"], 600)
    return folder


def options_of(name: str, config: Config) -> list[str]:
    case = CASES[name]
    more = TOY if config.toy else []
    tokens = ["--call", "max_sequence_length=1"] if config.toy and "grpo" in case.options else []
    sized = without(case.options, "--size") if config.toy else case.options
    return ["--model", str(folder_of(name, config)), *sized, *more, *tokens]


# The parts


def tests(config: Config, seconds: float) -> dict[str, Any]:
    said = run([sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-p", "no:cacheprovider"], seconds)
    return {"said": said.strip().splitlines()[-1]}


def rate(config: Config, seconds: float) -> dict[str, Any]:
    """bf16 operations a second of a large matrix product, and bytes a second of a copy on the device."""
    import torch

    device, size = ("cpu", 256) if config.toy else ("cuda", MATRIX)
    wait = (lambda: None) if config.toy else torch.cuda.synchronize

    def timed(work: Callable[[], Any], times: int = 20) -> float:
        for _ in range(3):
            work()
        wait()
        began = time.perf_counter()
        for _ in range(times):
            work()
        wait()
        return (time.perf_counter() - began) / times

    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    c = torch.empty(size * size, device=device)
    name = "cpu" if config.toy else torch.cuda.get_device_name()
    copied = 2 * c.nbytes / timed(lambda: c.clone())
    return {"device": name, "flops": 2 * size**3 / timed(lambda: a @ b), "bytes": copied}


def ours(name: str) -> Callable[[Config, float], dict[str, Any]]:
    def work(config: Config, seconds: float) -> dict[str, Any]:
        return worker("throughput_ours.py", options_of(name, config), seconds)

    return work


def lever(name: str, options: list[str]) -> Callable[[Config, float], dict[str, Any]]:
    def work(config: Config, seconds: float) -> dict[str, Any]:
        return worker("throughput_ours.py", [*options_of(name, config), *options], seconds)

    return work


def trace(name: str) -> Callable[[Config, float], dict[str, Any]]:
    def work(config: Config, seconds: float) -> dict[str, Any]:
        more = ["--repeats", "1", "--trace", str(config.out / f"{name}.trace.json.gz")]
        return worker("throughput_ours.py", [*options_of(name, config), *more], seconds)

    return work


def without(options: list[str], *names: str) -> list[str]:
    """Options less those that a peer's worker does not take, each with its value."""
    left, skip = [], False
    for each in options:
        if not skip and each not in names:
            left.append(each)
        skip = each in names
    return left


def trl(batches: tuple[int, int]) -> Callable[[Config, float], dict[str, Any]]:
    def work(config: Config, seconds: float) -> dict[str, Any]:
        from diffusionrl.data.prompts import load_prompts

        prompts = config.out / "prompts.txt"
        prompts.write_text("\n".join(prompt.text for prompt in load_prompts("ddpo-animals")))
        options = without(options_of("sd15", config), "--dtype", "--device", "--group")
        sizes = ["--sample-batch", str(min(batches[0], 4 if config.toy else 99)), "--train-batch", str(batches[1])]
        more = ["--prompts", str(prompts), "--mixed-precision", "no" if config.toy else "bf16"]
        return worker("throughput_trl.py", [*options, *more, *sizes], seconds, config.trl_python)

    return work


def flow_grpo(batch: int) -> Callable[[Config, float], dict[str, Any]]:
    def work(config: Config, seconds: float) -> dict[str, Any]:
        options = without(options_of("sd3-medium", config), "--objective", "--call")
        sizes = [] if config.toy else ["--sample-batch", str(batch), "--train-batch", str(batch)]
        return worker("throughput_flow_grpo.py", [*options, *sizes], seconds)

    return work


def demo(config: Config, seconds: float) -> dict[str, Any]:
    """The README's first command, from a cold start."""
    folder = config.out / "demo"
    small = ["--steps", "1", "--prompts-per-step", "2", "--evaluation.num-samples", "2"] if config.toy else []
    began = time.perf_counter()
    run([sys.executable, "-m", "diffusionrl", "train", "--run-dir", str(folder), *small], seconds)
    return {"seconds": time.perf_counter() - began}


def world(stage: str) -> Callable[[Config, float], dict[str, Any]]:
    """The embedded model trained on for what time is left; state and log stay in the folder, and the next call goes on."""

    def work(config: Config, seconds: float) -> dict[str, Any]:
        folder = config.out / stage
        steps = ["--num-steps", "1", "--batch-size", "2"] if config.toy else ["--batch-size", "512"]
        try:
            run([sys.executable, "-m", "diffusionrl.emoji.recipe", stage, "--out", str(folder), *steps], seconds)
        except RuntimeError as error:
            if "no end" not in str(error):
                raise
        lines = (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").is_file() else []
        return json.loads(lines[-1]) if lines else {"step": 0}

    return work


PARTS: dict[str, Part] = {
    "tests": Part(tests, 120),
    "rate": Part(rate, 30),
    "sd15": Part(ours("sd15"), 120),
    **{f"sd15/TRL, {name}": Part(trl(batches), 120) for name, batches in TRL_BATCHES.items()},
    "sd3-medium": Part(ours("sd3-medium"), 150),
    **{f"sd3-medium/rebuilt loop of flow_grpo, batch {batch}": Part(flow_grpo(batch), 150) for batch in PEER_BATCHES},
    "sdxl": Part(ours("sdxl"), 150),
    **{f"{name}/trace": Part(trace(name), 90) for name in ("sd15", "sd3-medium")},
    **{
        f"{name}/{what}": Part(lever(name, options), 100)
        for name, case in CASES.items()
        for what, options in case.levers.items()
    },
    "flux-dev": Part(ours("flux-dev"), 240),
    "demo": Part(demo, 300),
    "flow": Part(world("flow"), 3600),
}


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def table(results: dict[str, Any]) -> str:
    """A row a step that was timed: images a second, memory, and how many times ours is as fast, or the lever as slow."""
    peak = results.get("rate", {}).get("flops")
    columns = ["part", "images/s", "sampling", "update", "GB", "of the matrix rate", "ours as a multiple"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, found in results.items():
        if "error" in found or "step_seconds" not in found:
            continue
        rates = [found["samples"] / found[f"{part}_seconds"] for part in ("step", "sampling", "update")]
        work = (
            3 * found.get("forward_flops", 0) * found["samples"] * found["num_steps"]
        )  # forward; forward, and back to activations
        share = f"{work / found['step_seconds'] / peak:.0%}" if work and peak else ""
        beside = results.get(name.partition("/")[0], {}).get("step_seconds")
        ratio = f"{found['step_seconds'] / beside:.2f}" if beside and "/" in name else ""
        figures = [*(f"{each:.2f}" for each in rates), f"{found['peak_memory_gb']:.1f}", share, ratio]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    lines += [f"\n{name}: {json.dumps(found)}" for name, found in results.items() if "step_seconds" not in found]
    return "\n".join(lines)


def main(config: Config) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    file = config.out / ("toy.json" if config.toy else "gpu.json")
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    results["versions"] = versions()
    ends = time.monotonic() + 60 * config.minutes
    for name, part in PARTS.items():
        asked = not config.only or any(name.startswith(each) for each in config.only)
        asked = asked and not (config.toy and name.endswith(COMPILED))  # which takes minutes
        left = ends - time.monotonic()
        if not asked or left < LEAST or "error" not in results.get(name, {"error": ""}):
            continue
        began = time.monotonic()
        try:
            results[name] = part.work(config, min(left, part.limit))
        except Exception as error:  # the next part may do better
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        results[name]["wall_seconds"] = time.monotonic() - began
        said = results[name].get("error") or f"{results[name].get('step_seconds', results[name]['wall_seconds']):.2f} s"
        print(f"{name}: {said}", flush=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Config))
