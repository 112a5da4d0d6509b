"""Worker of throughput.py and gpu.py: one training step of diffusionrl, timed; prints one line of JSON."""

import dataclasses
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from diffusionrl import devices
from diffusionrl.algorithms import DDPO, GRPO
from diffusionrl.config import DDPOConfig, GRPOConfig, OptimizerConfig, SamplingConfig
from diffusionrl.data.prompts import load_prompts
from diffusionrl.policies import load_policy
from diffusionrl.sampling.rollout import collect
from diffusionrl.training.optimization import Optimization

WAITS = ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""What makes the host wait for the device."""


@dataclass(frozen=True)
class Config:
    """One configuration to time; the same fields as the other workers' where they mean the same."""

    model: str = "emoji"
    objective: Literal["ddpo", "grpo"] = "ddpo"
    """As published: ancestral DDIM and groups of one, or the flow SDE, groups of ``group`` and the KL to the reference."""
    samples: int = 48
    group: int = 8
    num_steps: int = 16
    guidance: float = 5.0
    size: int | None = None
    """Pixels, both ways; by default the pipeline's own."""
    call: tuple[str, ...] = ()
    """As --sampling.call."""
    rank: int = 4
    sample_batch: int = 48
    train_batch: int = 48
    updates: int = 4
    repeats: int = 2
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    # One lever each.
    beside_layers: bool = False
    """Run the adapter beside its layers, as peft does, in place of merging it in weight space."""
    channels_first: bool = False
    compile: bool = False
    """Compile the networks' repeated blocks, as diffusers offers it (with beside_layers)."""
    cuda_graphs: bool = False
    """The same, with CUDA graphs."""
    fused: bool = False
    """AdamW in one kernel."""
    attention: str | None = None
    """One of diffusers' attention backends."""
    gradient_checkpointing: bool = False
    offload_text_encoders: bool = False
    quantization: str = "none"
    trace: Path | None = None
    """Profile one more step into this file, for chrome://tracing."""


def load(config: Config, sampling: SamplingConfig) -> tuple[Any, list[Any]]:
    """The policy with the levers pulled, and the networks that it calls."""
    memory = {name: getattr(config, name) for name in ("gradient_checkpointing", "offload_text_encoders", "quantization")}
    settings = {"lora_rank": config.rank, "dtype": config.dtype, "device": config.device, "sampling": sampling, **memory}
    policy: Any = load_policy(config.model, **settings)
    networks = [policy.pipeline.components[name] for name in getattr(policy, "networks", ["unet"])]
    if config.beside_layers and getattr(policy, "_weight_space", False):
        policy._weight_space = False
        policy.unet.enable_adapters()
    if config.channels_first:
        policy.memory_format = torch.contiguous_format
    for network in networks:
        if config.channels_first:
            network.to(memory_format=torch.contiguous_format)
        if config.attention is not None:
            network.set_attention_backend(config.attention)
        if config.compile or config.cuda_graphs:
            network.compile_repeated_blocks(mode="reduce-overhead" if config.cuda_graphs else None)
    return policy, networks


def forward_flops(policy: Any, sampling: SamplingConfig) -> int:
    """Floating point operations of one guided prediction of one sample."""
    prompt = load_prompts("ddpo-animals")[:1]
    with torch.no_grad():
        x, levels = policy.start(prompt, [0]), policy.grid(sampling.num_steps).levels[torch.tensor([0])]
        policy.denoise(x, levels, prompt, sampling.guidance)  # embeds the prompt
        with FlopCounterMode(display=False) as counter:
            policy.denoise(x, levels, prompt, sampling.guidance)
    return counter.get_total_flops()


class Step:
    """One of a run's, with a reward that costs nothing."""

    def __init__(self, config: Config, policy: Any, sampling: SamplingConfig) -> None:
        self.config, self.policy, self.sampling = config, policy, sampling
        shared = {"updates_per_step": config.updates, "micro_batch_size": config.train_batch}
        self.algorithm: Any = (
            DDPO(DDPOConfig(normalisation="batch", **shared), config.guidance)
            if config.objective == "ddpo"
            else GRPO(GRPOConfig(**shared), config.guidance)
        )
        self.group = 1 if config.objective == "ddpo" else config.group
        self.optimization = Optimization(policy.trainable(), OptimizerConfig(learning_rate=3e-4))
        if config.fused:
            self.optimization.adamw = torch.optim.AdamW(policy.trainable().values(), 3e-4, fused=True)
        every = load_prompts("ddpo-animals") * config.samples
        self.prompts = [prompt for prompt in every[: config.samples // self.group] for _ in range(self.group)]

    def __call__(self, number: int) -> tuple[float, float]:
        """Seconds of sampling and of the update."""
        began = time.perf_counter()
        rollout = collect(
            *(self.policy, lambda images, p, m: images.flatten(1).mean(1), self.prompts, self.sampling, 0, "bench", number),
            group_size=self.group,
        )
        synchronise(self.policy.device)
        sampled = time.perf_counter()
        advantages = self.algorithm.advantages(rollout)
        for rows in self.algorithm.updates(rollout, advantages, 0, number):
            self.optimization.update(self.algorithm, self.policy, rollout, rows, advantages)
        synchronise(self.policy.device)
        return sampled - began, time.perf_counter() - sampled


def profiled(step: Step, number: int, file: Path) -> dict[str, float]:
    """One more step under the profiler: how long the device was at work, and how often the host waited for it."""
    on_device = step.policy.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with profile(activities=activities) as found:
        began = time.perf_counter()
        step(number)
        seconds = time.perf_counter() - began
    file.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(file))
    events = found.key_averages()
    busy = sum(each.self_device_time_total for each in events) / 1e6 if on_device else seconds
    waits = {f"waits/{each.key.removeprefix('aten::')}": each.count for each in events if each.key in WAITS}
    return {"profiled_seconds": seconds, "device_busy": busy / seconds, **waits}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    sampler = ("ddim", 1.0) if config.objective == "ddpo" else ("flow_grpo", 0.7)
    sampling = SamplingConfig(
        config.num_steps, config.guidance, *sampler, config.sample_batch, config.size, config.size, call=config.call
    )
    began = time.perf_counter()
    policy, _ = load(config, sampling)
    loading = time.perf_counter() - began
    step = Step(config, policy, sampling)
    first = sum(step(0))  # with whatever is slow the first time
    times = [step(number) for number in range(1, config.repeats + 1)]
    result: dict[str, Any] = {
        "sampling_seconds": min(sampling for sampling, _ in times),
        "update_seconds": min(update for _, update in times),
        "step_seconds": min(sampling + update for sampling, update in times),
        "median_step_seconds": statistics.median(sampling + update for sampling, update in times),
        "loading_seconds": loading,
        "first_step_seconds": first,
        "peak_memory_gb": devices.peak_bytes(policy.device) / 1e9,
        "forward_flops": forward_flops(policy, sampling),
        "device_name": devices.name_of(policy.device),
    }
    if config.trace is not None:
        result |= profiled(step, config.repeats + 1, config.trace)
    print(json.dumps(dataclasses.asdict(config) | result, default=str))


if __name__ == "__main__":
    main(tyro.cli(Config))
