"""What it costs to ask a pipeline by calling it: one ``denoise`` beside the bare network, and a training step of the embedded
model by either road.

    python benchmarks/pipeline_overhead.py     # writes pipeline_overhead.json beside itself; some minutes on two cores

Networks have random weights: speed does not ask what they know. Each figure is the median of ``--repeats`` pairs, in which the
two are timed one after the other, with the smallest and the largest.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline, UNet2DConditionModel
from transformers import CLIPTextModelWithProjection

from diffusionrl.algorithms import make_algorithm
from diffusionrl.config.presets import emoji
from diffusionrl.data.prompts import Prompt, load_prompts
from diffusionrl.policies import StableDiffusionPolicy, load_pipeline
from diffusionrl.policies.pipeline import PipelinePolicy
from diffusionrl.rewards import load_reward
from diffusionrl.training.trainer import Trainer

HERE = Path(__file__).parent
UNETS = {"small": (48, 96), "middle": (128, 256), "large": (256, 512)}
TRANSFORMERS = {"small": (4, 5), "middle": (8, 10), "large": (12, 16)}  # blocks, heads of 32
PROMPTS = [Prompt("a cat"), Prompt("a dog"), Prompt("an owl"), Prompt("a fox")]


@dataclass(frozen=True)
class Config:
    """What is timed."""

    batch_size: int = 16
    repeats: int = 7
    out: Path = HERE / "pipeline_overhead.json"


def main(config: Config) -> None:
    rows = []
    with torch.no_grad():
        for size, channels in UNETS.items():
            rows.append({"network": f"UNet, {size}"} | time_unet(channels, config))
        for size, (blocks, heads) in TRANSFORMERS.items():
            rows.append({"network": f"transformer, {size}"} | time_transformer(blocks, heads, config))
    found = {"denoise": rows, "step": time_roads(config), "threads": torch.get_num_threads()}
    config.out.write_text(json.dumps(found, indent=2) + "\n")
    print("| network | bare, ms | asked, ms | more |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['network']} | {row['bare_ms']:.1f} | {row['asked_ms']:.1f} | {row['more']:.1%} |")
    step = found["step"]
    print(
        f"\na training step of the embedded model: {step['fast_ms'] / 1000:.2f} s by its own road, "
        f"{step['general_ms'] / 1000:.2f} s by the general one, {step['more']:.1%} more "
        f"({step['least']:.1%} to {step['most']:.1%})"
    )


def pairs(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each, timed in turn, after one call of each that does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for call, kept in zip((first, second), times, strict=True):
            began = time.perf_counter()
            call()
            if repeat:
                kept.append(time.perf_counter() - began)
    return times


def compared(bare: Callable[[], Any], asked: Callable[[], Any], repeats: int) -> dict[str, float]:
    first, second = pairs(bare, asked, repeats)
    ratios = [two / one for one, two in zip(first, second, strict=True)]
    return {
        "bare_ms": 1000 * statistics.median(first),
        "asked_ms": 1000 * statistics.median(second),
        "more": statistics.median(ratios) - 1,
        "least": min(ratios) - 1,
        "most": max(ratios) - 1,
    }


def time_unet(channels: tuple[int, int], config: Config) -> dict[str, float]:
    """The embedded model with another UNet, without guidance."""
    pipeline = load_pipeline("emoji")
    settings = dict(pipeline.unet.config) | {"block_out_channels": channels}
    pipeline.unet = UNet2DConditionModel.from_config(settings)
    policy = PipelinePolicy(pipeline, PROMPTS[0], steps=4, guidance=1.0, lora_rank=None)
    x, levels, prompts = batch_of(policy, config)
    states = pipeline.text_encoder(torch.zeros(len(x), 16, dtype=torch.long))[0]
    return compared(
        lambda: policy.pipeline.unet(x, levels.timesteps, states),
        lambda: policy.denoise(x, levels, prompts, 1.0),
        config.repeats,
    )


def time_transformer(blocks: int, heads: int, config: Config) -> dict[str, float]:
    """A flow model on the embedded model's latents, without guidance."""
    parts = load_pipeline("emoji")
    parts.vae.register_to_config(shift_factor=0.0)
    encoders = [CLIPTextModelWithProjection(parts.text_encoder.config) for _ in range(2)]
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=blocks,
        num_attention_heads=heads,
        attention_head_dim=32,
        joint_attention_dim=256,
        caption_projection_dim=32 * heads,
        pooled_projection_dim=256,
        pos_embed_max_size=8,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=parts.vae,
        text_encoder=encoders[0],
        tokenizer=parts.tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=parts.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    arguments = {"max_sequence_length": 1}
    policy = PipelinePolicy(pipeline, PROMPTS[0], steps=4, guidance=1.0, arguments=arguments, lora_rank=None)
    x, levels, prompts = batch_of(policy, config)
    states, pooled = torch.randn(len(x), parts.tokenizer.model_max_length + 1, 256), torch.randn(len(x), 256)
    return compared(
        lambda: network(x, encoder_hidden_states=states, pooled_projections=pooled, timestep=levels.timesteps),
        lambda: policy.denoise(x, levels, prompts, 1.0),
        config.repeats,
    )


def batch_of(policy: PipelinePolicy, config: Config) -> tuple[torch.Tensor, Any, list[Prompt]]:
    prompts = (PROMPTS * config.batch_size)[: config.batch_size]
    x = policy.start(prompts, range(len(prompts)))
    return x, policy.grid(4).levels[torch.ones(len(prompts), dtype=torch.long)], prompts


def time_roads(config: Config) -> dict[str, Any]:
    """Whole training steps of the preset, by its own road and by the general one, step by step."""
    settings = emoji()
    sampling = settings.sampling
    prompts = load_prompts(settings.prompts)
    roads = (
        StableDiffusionPolicy(load_pipeline("emoji"), lora_rank=16),
        PipelinePolicy(load_pipeline("emoji"), prompts[0], sampling.num_steps, sampling.guidance, lora_rank=16),
    )
    fast, general = (
        Trainer(each, load_reward("compressibility"), prompts, make_algorithm(settings), settings) for each in roads
    )
    found = compared(lambda: fast.step(1), lambda: general.step(1), config.repeats)
    return {"fast_ms": found.pop("bare_ms"), "general_ms": found.pop("asked_ms")} | found


if __name__ == "__main__":
    main(tyro.cli(Config))
