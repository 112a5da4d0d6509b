"""Stage 2: text encoder and UNet, trained together to denoise latents of captioned scenes.

Stable Diffusion's noise schedule, v prediction as in Stable Diffusion 2 (Salimans & Ho 2022), and one caption in ten left empty
for guidance. In terms of the error of x0 the loss has the weight min(SNR, 5) + 1: much at high noise, where sixteen redundant
latent channels decide a sprite's shape, and little on the last details.

For the same reason the latents are scaled to a standard deviation of 0.5, not 1 (Chen, arXiv 2301.10972): at 1, a sprite's
shape can still be read at a signal-to-noise ratio of 0.2, and most of the schedule would be spent on details.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusionrl import seeds
from diffusionrl.emoji.recipe.tokenizer import MAX_LENGTH, train_tokenizer
from diffusionrl.emoji.recipe.training import TrainingConfig, train_stage
from diffusionrl.emoji.recipe.vae import to_tensor
from diffusionrl.emoji.scenes import draw_images

CROSS_ATTENTION_DIM = 128
MAX_SNR = 5.0
LATENT_SCALE = 0.5


@dataclass(frozen=True)
class DiffusionConfig(TrainingConfig):
    """Train text encoder and UNet."""

    out: Path = Path("runs/emoji/diffusion")
    vae: Path = Path("runs/emoji/vae/vae")
    num_steps: int = 5000
    batch_size: int = 128
    learning_rate: float = 4e-3
    num_scenes: int = 24_000
    """Scenes encoded once and passed over several times, with fresh noise."""
    unconditional_share: float = 0.1
    channels: tuple[int, int] = (48, 96)


def make_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion, with v prediction as in 2.x."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CROSS_ATTENTION_DIM,
            intermediate_size=4 * CROSS_ATTENTION_DIM,
            projection_dim=CROSS_ATTENTION_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(latent_channels: int, channels: tuple[int, int]) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CROSS_ATTENTION_DIM,
        attention_head_dim=4,
        norm_num_groups=16,
    )


@torch.no_grad()
def encode_scenes(config: DiffusionConfig, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> dict[str, torch.Tensor]:
    """Scaled latents (float16) and caption tokens of the training scenes, kept in a file for the next start."""
    file = config.out / "scenes.safetensors"
    if not file.exists():
        latents, tokens = [], []
        for first in range(0, config.num_scenes, 500):
            images, scenes = draw_images(config.seed, range(first, first + 500))
            posterior = vae.encode(to_tensor(images, config.device)).latent_dist
            scaled = posterior.sample(torch.Generator(config.device).manual_seed(first)) * vae.config.scaling_factor
            latents.append(scaled.half().cpu())
            captions = [scene.caption for scene in scenes]
            tokens.append(tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": torch.cat(latents).contiguous(), "tokens": torch.cat(tokens).to(torch.int16)}, file)
        print(f"encoded {config.num_scenes} scenes", flush=True)
    return load_file(file)


def train_diffusion(config: DiffusionConfig) -> None:
    torch.manual_seed(config.seed)
    tokenizer = train_tokenizer(config.out / "tokenizer")
    vae = AutoencoderKL.from_pretrained(config.vae).to(config.device)
    vae.register_to_config(scaling_factor=LATENT_SCALE * vae.config.scaling_factor)
    scheduler = make_scheduler()
    text_encoder, unet = build_text_encoder(tokenizer), build_unet(vae.config.latent_channels, config.channels)
    model = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet}).to(config.device)
    scenes = encode_scenes(config, vae, tokenizer)
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids.to(torch.int16)
    noise_level = scheduler.alphas_cumprod

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        draw = seeds.torch_generator(config.seed, "diffusion", step)
        size = config.batch_size
        chosen = torch.randint(len(scenes["latents"]), (size,), generator=draw)
        clean = scenes["latents"][chosen].float()
        noise = torch.randn(clean.shape, generator=draw)
        stratum = (torch.arange(size) + torch.rand(size, generator=draw)) / size
        timesteps = (stratum * 1000).long()
        dropped = torch.rand(size, 1, generator=draw) < config.unconditional_share
        tokens = torch.where(dropped, empty, scenes["tokens"][chosen]).long().to(config.device)
        noisy = scheduler.add_noise(clean, noise, timesteps).to(config.device)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        predicted = unet(noisy, timesteps.to(config.device), text_encoder(tokens)[0]).sample
        velocity = scheduler.get_velocity(clean, noise, timesteps).to(config.device)
        errors = (predicted - velocity).square().mean((1, 2, 3))
        snr = noise_level[timesteps] / (1 - noise_level[timesteps])
        weights = ((snr.clamp(max=MAX_SNR) + 1) / (snr + 1)).to(config.device)
        return (errors * weights).mean(), {"loss": errors.mean().item(), "weighted_loss": (errors * weights).mean().item()}

    train_stage(model, loss, config)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(config.out / "pipeline")
    figures = {"training_samples": config.num_steps * config.batch_size}
    (config.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
