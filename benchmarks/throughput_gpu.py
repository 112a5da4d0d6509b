"""The GPU part of throughput.py: Stable Diffusion 1.5's exact UNet with random weights, 512 x 512, bf16, LoRA.

The weights do not matter for speed. Besides the ratios to TRL it reports the share of the card's measured bf16 matrix rate that
our step reaches, counting the multiplications of the UNet alone: one forward pass in sampling, and in the update one forward
and one backward pass to the activations (the base weights are frozen), each for both halves of the guidance.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from diffusionrl.data.prompts import load_prompts
from diffusionrl.emoji.recipe.diffusion import make_scheduler
from diffusionrl.emoji.recipe.tokenizer import train_tokenizer

HERE = Path(__file__).parent
FOLDER = HERE.parent / "runs" / "benchmarks" / "sd15_random"
SAMPLES, STEPS, UPDATES = 48, 10, 2
OUR_BATCHES = (24, 24)
TRL_BATCHES = {"TRL as recommended": (6, 3), "TRL, batches 24 and 12": (24, 12), "TRL, batches 24 and 24": (24, 24)}


def build_pipeline() -> Path:
    """A random pipeline with the configurations of runwayml/stable-diffusion-v1-5, saved once in float32."""
    if (FOLDER / "model_index.json").exists():
        return FOLDER
    tokenizer = train_tokenizer(FOLDER / "tokenizer")
    tokenizer.model_max_length = 77
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)  # the class's defaults otherwise
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(FOLDER)
    return FOLDER


def forward_flops(folder: Path) -> float:
    """Floating point operations of one UNet forward pass of one sample."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        with FlopCounterMode(display=False) as counter:
            unet(torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768))
    return float(counter.get_total_flops())


def matrix_rate() -> float:
    """bf16 floating point operations a second of a large matrix product on this card."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(50):
        a @ b
    torch.cuda.synchronize()
    return 50 * 2 * 8192**3 / (time.perf_counter() - began)


def compare_on_gpu() -> dict[str, Any]:
    """Prints the table and writes ``throughput_gpu.json``."""
    from throughput import environment, run

    folder, python = build_pipeline(), environment()
    prompts = FOLDER.parent / "prompts.txt"
    prompts.write_text("\n".join(prompt.text for prompt in load_prompts("ddpo-animals")))
    common = ["--model", str(folder), "--samples", str(SAMPLES), "--num-steps", str(STEPS), "--updates", str(UPDATES)]
    batches = ["--sample-batch", str(OUR_BATCHES[0]), "--train-batch", str(OUR_BATCHES[1])]
    ours = run(sys.executable, "throughput_ours.py", [*common, *batches, "--dtype", "bfloat16", "--device", "cuda"])
    work = 3 * SAMPLES * STEPS * 2 * forward_flops(folder)
    rate = matrix_rate()
    table: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "matrix_tflops": rate / 1e12,
        "share_of_matrix_rate": work / ours["step_seconds"] / rate,
        "diffusionrl": ours,
    }
    for name, (sample, train) in TRL_BATCHES.items():
        trl = [
            "--prompts",
            str(prompts),
            "--mixed-precision",
            "bf16",
            "--sample-batch",
            str(sample),
            "--train-batch",
            str(train),
        ]
        table[name] = run(python, "throughput_trl.py", [*common, *trl])
        print(f"{name}: ours is {table[name]['step_seconds'] / ours['step_seconds']:.2f} times as fast")
    print(f"share of the measured bf16 matrix rate ({rate / 1e12:.0f} TFLOP/s): {table['share_of_matrix_rate']:.0%}")
    (HERE / "throughput_gpu.json").write_text(json.dumps(table, indent=2) + "\n")
    return table
