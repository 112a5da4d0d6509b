"""What it costs to ask a pipeline by calling it: one ``denoise`` beside the bare network, and a run of the embedded model by
either road.

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

from diffusionrl.config import SamplingConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.policies import StableDiffusionPolicy, load_pipeline
from diffusionrl.policies.pipeline import PipelinePolicy
from diffusionrl.sampling.rollout import collect

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
    found = {"denoise": rows, "sampling": time_roads(config), "threads": torch.get_num_threads()}
    config.out.write_text(json.dumps(found, indent=2) + "\n")
    print("| network | bare, ms | asked, ms | more |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['network']} | {row['bare_ms']:.1f} | {row['asked_ms']:.1f} | {row['more']:.1%} |")
    roads = found["sampling"]
    print(
        f"\nsampling and scoring 32 images of the embedded model: the general road takes {roads['ratio']:.2f} "
        f"({roads['smallest']:.2f} to {roads['largest']:.2f}) of the fast one's time"
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


def time_roads(config: Config) -> dict[str, float]:
    """A rollout of the embedded model as its preset samples, by its own road and by the general one; time by time."""
    sampling = SamplingConfig(num_steps=16, guidance=3.0, batch_size=32)
    fast = StableDiffusionPolicy(load_pipeline("emoji"), lora_rank=16)
    general = PipelinePolicy(load_pipeline("emoji"), PROMPTS[0], steps=16, guidance=3.0, lora_rank=16)
    prompts = PROMPTS * 8

    def roll(policy: Any) -> None:
        collect(policy, lambda images, texts, metadata: images.mean((1, 2, 3)), prompts, sampling, 0, "bench", 0)

    first, second = pairs(lambda: roll(fast), lambda: roll(general), config.repeats)
    ratios = sorted(two / one for one, two in zip(first, second, strict=True))
    return {"ratio": statistics.median(ratios), "smallest": ratios[0], "largest": ratios[-1]}


if __name__ == "__main__":
    main(tyro.cli(Config))
