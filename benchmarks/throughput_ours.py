"""Worker of throughput.py: one DDPO step of diffusionrl, timed; prints one line of JSON."""

import dataclasses
import json
import time
from dataclasses import dataclass

import torch
import tyro

from diffusionrl import devices, seeds
from diffusionrl.algorithms import DDPO
from diffusionrl.config import DDPOConfig, SamplingConfig
from diffusionrl.data.prompts import load_prompts
from diffusionrl.policies import load_policy
from diffusionrl.sampling.rollout import collect
from diffusionrl.training.optimization import accumulate_gradient


@dataclass(frozen=True)
class Config:
    """One configuration to time; the same fields as the TRL worker's where they mean the same."""

    model: str = "emoji"
    samples: int = 48
    num_steps: int = 16
    guidance: float = 5.0
    rank: int = 4
    sample_batch: int = 48
    train_batch: int = 48
    updates: int = 4
    repeats: int = 2
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    beside_layers: bool = False
    """Run the adapter beside its layers, as peft does, in place of merging it in weight space."""
    channels_first: bool = False
    compile: bool = False
    """Compile the UNet's forward for sampling (with beside_layers)."""


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    policy = load_policy(config.model, lora_rank=config.rank, dtype=config.dtype, device=config.device)
    if config.beside_layers and policy._weight_space:
        policy._weight_space = False
        policy.unet.enable_adapters()
    if config.channels_first:
        policy.memory_format = torch.contiguous_format
        policy.unet.to(memory_format=policy.memory_format)
    if config.compile:
        policy.unet.compile()
    sampling = SamplingConfig(config.num_steps, config.guidance, batch_size=config.sample_batch)
    settings = DDPOConfig(updates_per_step=config.updates, micro_batch_size=config.train_batch, normalisation="batch")
    algorithm = DDPO(settings, config.guidance)
    parameters = list(policy.trainable().values())
    optimizer = torch.optim.AdamW(parameters, 3e-4)
    prompts = (load_prompts("ddpo-animals") * config.samples)[: config.samples]

    def step(number: int) -> tuple[float, float]:
        began = time.perf_counter()
        rollout = collect(policy, lambda images, p, m: images.mean((1, 2, 3)), prompts, sampling, 0, "bench", number)
        synchronise(config.device)
        sampled = time.perf_counter()
        advantages = algorithm.advantages(rollout)
        order = torch.randperm(config.samples, generator=seeds.torch_generator(0, "order", number))
        for part in order.chunk(config.updates):
            pairs = algorithm.pairs(rollout, part, 0, number)
            accumulate_gradient(algorithm, policy, rollout, pairs, advantages)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        synchronise(config.device)
        return sampled - began, time.perf_counter() - sampled

    step(0)
    times = [step(number) for number in range(1, config.repeats + 1)]
    result = {
        "sampling_seconds": min(sampling for sampling, _ in times),
        "update_seconds": min(update for _, update in times),
        "step_seconds": min(sampling + update for sampling, update in times),
        "peak_memory_gb": devices.peak_bytes(policy.device) / 1e9,
    }
    print(json.dumps(dataclasses.asdict(config) | result))


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(tyro.cli(Config))
