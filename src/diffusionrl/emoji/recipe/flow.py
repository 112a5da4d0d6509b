"""``emoji-flow``: the transformer of a ``StableDiffusion3Pipeline``, trained to follow a linear flow to the scenes' latents.

x_s = (1 - s) x0 + s noise, and the network predicts the velocity noise - x0 (Esser et al., arXiv 2403.03206), on the latents of
the first pipeline's VAE, scaled as there. The logit of a training time is normal, as in Stable Diffusion 3.

Nothing but the transformer is trained. Text comes from two frozen CLIP text encoders, because the pipeline's class wants two:
that of the first pipeline, and the text tower of the world's CLIP. The pipeline takes the hidden states before the last layer
of each, side by side, and both pooled outputs. So the second, of a single layer, is given a last layer that changes nothing.

Without T5 the pipeline appends ``max_sequence_length`` rows of zeros to the text, 256 unless it is told otherwise, and does not
mask them. So batches have some such rows, from none to 256. The fast setting is 1, and most batches are like that.

What is published is the moving average of the weights.
"""

import copy
import json
import math
from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate, cycle
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusionrl import seeds
from diffusionrl.emoji.recipe.training import TrainingConfig, train_stage
from diffusionrl.emoji.recipe.vae import to_tensor
from diffusionrl.emoji.scenes import draw_images

SHIFT = 2.0
"""Of the sampling grid, whose points it moves towards noise."""
TIME_MEAN, TIME_DEVIATION = 0.5, 1.2
"""Of the logit of the times in training."""
TEXT_SCALE = 1 / 8
"""Of the first encoder's hidden states, which have a standard deviation of 6; a power of two, so that no weight is rounded."""
NEIGHBOURS = (((1, 0), (-1, 0)), ((0, 1), (0, -1)))
"""Where the first heads of a block look to begin with, columns and rows away; the blocks take turns."""
POOLED_DIM = 64
"""Of the first encoder's pooled output, as much as is kept."""
ZERO_ROWS = {0: 0.10, 1: 0.70, 16: 0.12, 64: 0.04, 256: 0.04}
"""Rows of zeros after the text: share of the batches."""


@dataclass(frozen=True)
class FlowConfig(TrainingConfig):
    """Train the transformer of the flow pipeline."""

    out: Path = Path("runs/emoji/flow")
    pipeline: Path = Path("runs/emoji/diffusion/pipeline")
    """Whose VAE, text encoder and tokenizer are taken."""
    clip: Path = Path("runs/emoji/clip/clip")
    """Whose text tower is the second text encoder."""
    num_steps: int = 8000
    batch_size: int = 64
    learning_rate: float = 6e-3
    num_scenes: int = 24_000
    """Scenes encoded once and passed over several times, with fresh noise."""
    unconditional_share: float = 0.1
    teacher_weight: float = 0.8
    """Of the target, as much is the prediction of the first pipeline's UNet; the rest is the velocity that was drawn."""
    num_layers: int = 4
    num_heads: int = 4
    head_dim: int = 32


def build_text_encoder(
    text_model: CLIPTextModel, projection: Tensor, scale: float = 1.0, more_layers: int = 0
) -> CLIPTextModelWithProjection:
    """The same encoder with a projection of its pooled output.

    Args:
        scale: of the hidden states. Layer norms do not notice: all that adds to the hidden states is scaled, and their epsilon.
        more_layers: that change nothing, so that the hidden states before the last layer are those after it.
    """
    values = text_model.config.to_dict() | {"projection_dim": len(projection)}
    values["layer_norm_eps"] *= scale**2
    values["num_hidden_layers"] += more_layers
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**values))
    state = {f"text_model.{name}": weight for name, weight in text_model.state_dict().items()}
    missing = encoder.load_state_dict(state | {"text_projection.weight": projection}, strict=False).missing_keys
    adds = ("embedding.weight", "out_proj.weight", "out_proj.bias", "fc2.weight", "fc2.bias")
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if name.endswith(adds):
                weight.mul_(0 if name in missing else scale)
    return encoder.to(torch.float16).float().eval().requires_grad_(False)  # as it will be published


def build_transformer(config: FlowConfig, text_dim: int, pooled_dim: int, channels: int) -> SD3Transformer2DModel:
    """Blocks that begin as the identity, and a prediction that begins as zero (DiT's adaLN-Zero, arXiv 2212.09748)."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=channels,
        num_layers=config.num_layers,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.num_heads,
        joint_attention_dim=text_dim,
        caption_projection_dim=config.num_heads * config.head_dim,
        pooled_projection_dim=pooled_dim,
        out_channels=channels,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    modulations += [block.norm1_context.linear for block in transformer.transformer_blocks]
    for layer in [*modulations, transformer.norm_out.linear, transformer.proj_out]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    sharpen_positions(transformer.pos_embed.pos_embed)
    for block, places in zip(transformer.transformer_blocks, cycle(NEIGHBOURS), strict=False):
        for head, place in zip(range(config.num_heads), places, strict=False):
            look_at(place, block.attn, head, config.head_dim)
    return transformer


def sharpen_positions(table: Tensor) -> None:
    """Half of the frequencies of the fixed position table, in place: those that stand nearly still on 8 x 8 places turn fast.

    The class's own frequencies are of 1 radian a place and less, too slow to tell a place from its neighbours.
    """
    places = torch.arange(8.0)
    kinds = table.view(8, 8, 2, 2, -1)  # row, column; of the column or the row; sine or cosine; frequency
    slow = kinds[..., kinds.shape[-1] // 2 :]
    count = slow.shape[-1]
    turns = places[:, None] * torch.linspace(1, math.pi, count + 1)[1:]
    waves = torch.stack([turns.sin(), turns.cos()], 1)
    slow[:, :, 0] = waves[None]
    slow[:, :, 1] = waves[:, None]


@torch.no_grad()
def look_at(place: tuple[int, int], attention: Attention, head: int, head_dim: int) -> None:
    """Let a head begin by looking at a neighbour, ``place`` columns and rows away, as a convolution does.

    Its keys are waves of the position table, and its queries the same waves, turned by that many places.
    """
    frequencies = attention.to_q.in_features // 4
    chosen = torch.linspace(0, 0.8 * frequencies, head_dim // 4).long()
    classes_own = 10000.0 ** -(torch.arange(frequencies) / frequencies)
    fast = torch.linspace(1, math.pi, frequencies // 2 + 1)[1:]
    waves = torch.cat([classes_own[: frequencies - len(fast)], fast])[chosen]
    keys, queries = torch.zeros(2, 2, 2, len(chosen), attention.to_q.in_features)  # axis; sine or cosine; frequency
    for axis, shift in enumerate(place):
        sine, cosine = torch.eye(attention.to_q.in_features).view(2, 2, frequencies, -1)[axis][:, chosen]
        keys[axis] = torch.stack([sine, cosine])
        turn = (shift * waves)[:, None]
        queries[axis] = torch.stack([turn.cos() * sine + turn.sin() * cosine, turn.cos() * cosine - turn.sin() * sine])
    rows = slice(head * head_dim, (head + 1) * head_dim)
    for layer, weights in ((attention.to_q, queries), (attention.to_k, keys)):
        layer.weight[rows] = weights.view(head_dim, -1)
        layer.bias[rows] = 0


def build_pipeline(config: FlowConfig) -> StableDiffusion3Pipeline:
    """The pipeline before training."""
    vae = AutoencoderKL.from_pretrained(config.pipeline / "vae")
    vae.register_to_config(shift_factor=0.0)  # which this pipeline's class wants
    first = CLIPTextModel.from_pretrained(config.pipeline / "text_encoder", dtype=torch.float32)
    clip = CLIPModel.from_pretrained(config.clip, dtype=torch.float32)
    text_encoder = build_text_encoder(first, torch.eye(POOLED_DIM, first.config.hidden_size), TEXT_SCALE)
    text_encoder_2 = build_text_encoder(clip.text_model, clip.text_projection.weight, more_layers=1)
    encoders = (text_encoder.config, text_encoder_2.config)
    text_dim, pooled_dim = sum(c.hidden_size for c in encoders), sum(c.projection_dim for c in encoders)
    return StableDiffusion3Pipeline(
        transformer=build_transformer(config, text_dim, pooled_dim, vae.config.latent_channels),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(config.pipeline / "tokenizer"),
        text_encoder_2=text_encoder_2,
        tokenizer_2=CLIPTokenizer.from_pretrained(config.clip),
        text_encoder_3=None,
        tokenizer_3=None,
    )


@torch.no_grad()
def encode_captions(pipeline: StableDiffusion3Pipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """What the transformer gets of each caption, by the pipeline itself: rows of text without rows of zeros, and pooled."""
    found = [
        pipeline.encode_prompt(part, None, None, do_classifier_free_guidance=False, max_sequence_length=0)
        for part in (captions[first : first + 500] for first in range(0, len(captions), 500))
    ]
    return torch.cat([text for text, *_ in found]), torch.cat([pooled for _, _, pooled, _ in found])


class Teacher:
    """What the first pipeline expects of a noisy latent, as a velocity of the flow.

    A point of the flow, divided by the root of (1 - s)^2 + s^2, is one of Stable Diffusion's path with as much noise for the
    signal. The time in between its steps is that of the same logarithm of signal over noise.
    """

    def __init__(self, folder: Path, captions: list[str], device: str) -> None:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        self.unet = unet.to(device, memory_format=torch.channels_last).eval()
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).to(device)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        with torch.no_grad():
            self.texts = torch.cat([encoder(part)[0] for part in torch.split(tokens, 500)])
        signal = DDIMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod.double()
        self.steps = torch.arange(len(signal)).flip(0).numpy()
        self.ratios = (signal / (1 - signal)).log().flip(0).numpy()

    @torch.no_grad()
    def velocity(self, noisy: Tensor, times: Tensor, caption: Tensor) -> tuple[Tensor, Tensor]:
        """The expected noise - x0, and where the UNet knows that much noise or that little."""
        ratio = 2 * torch.log((1 - times.double()) / times.double()).cpu().numpy()
        known = torch.from_numpy((self.ratios[0] <= ratio) & (ratio <= self.ratios[-1])).to(noisy.device)
        steps = torch.from_numpy(np.interp(ratio, self.ratios, self.steps)).float().to(noisy.device)
        times = times[:, None, None, None]
        scale = ((1 - times) ** 2 + times**2).sqrt()
        signal, sigma, x = (1 - times) / scale, times / scale, noisy / scale
        v = self.unet(x.contiguous(memory_format=torch.channels_last), steps, self.texts[caption]).sample
        return (sigma * x + signal * v) - (signal * x - sigma * v), known


@torch.no_grad()
def encode_scenes(config: FlowConfig, vae: AutoencoderKL) -> tuple[Tensor, Tensor, list[str]]:
    """Scaled latents (float16) of the training scenes, the number of each one's caption, and the captions; "" is the first.

    Kept in files for the next start.
    """
    file, names = config.out / "scenes.safetensors", config.out / "captions.json"
    if not file.exists():
        latents, captions, numbers = [], {"": 0}, []
        for first in range(0, config.num_scenes, 500):
            images, scenes = draw_images(config.seed, range(first, min(first + 500, config.num_scenes)))
            posterior = vae.encode(to_tensor(images, config.device)).latent_dist
            noise = seeds.torch_generator(config.seed, "posterior", first)
            scaled = posterior.mean.cpu() + posterior.std.cpu() * torch.randn(posterior.mean.shape, generator=noise)
            latents.append((scaled * vae.config.scaling_factor).half())
            numbers += [captions.setdefault(scene.caption, len(captions)) for scene in scenes]
        file.parent.mkdir(parents=True, exist_ok=True)
        names.write_text(json.dumps(list(captions)))
        save_file({"latents": torch.cat(latents).contiguous(), "captions": torch.tensor(numbers)}, file)
        print(f"encoded {config.num_scenes} scenes", flush=True)
    kept = load_file(file)
    return kept["latents"], kept["captions"], json.loads(names.read_text())


def zero_rows(config: FlowConfig, step: int) -> tuple[int, int]:
    """Rows of zeros after the text in this step's batch, and as many samples as take no longer than a full batch without."""
    draw = torch.rand((), generator=seeds.torch_generator(config.seed, "zero rows", step)).item()
    place = bisect(list(accumulate(ZERO_ROWS.values())), draw)
    rows = list(ZERO_ROWS)[min(place, len(ZERO_ROWS) - 1)]
    tokens = 80  # of image and text
    return rows, max(1, round(config.batch_size * tokens / (tokens + rows)))


def train_flow(config: FlowConfig) -> None:
    torch.manual_seed(config.seed)  # initial weights only
    pipeline = build_pipeline(config).to(config.device)
    transformer = pipeline.transformer
    latents, caption_of, captions = encode_scenes(config, pipeline.vae)
    texts, pooled = encode_captions(pipeline, captions)
    teacher = Teacher(config.pipeline, captions, config.device) if config.teacher_weight else None

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        draw = seeds.torch_generator(config.seed, "flow", step)
        rows, size = zero_rows(config, step)
        chosen = torch.randint(len(latents), (size,), generator=draw)
        clean = latents[chosen].float()
        noise = torch.randn(clean.shape, generator=draw)
        even = (torch.arange(size) + torch.rand(size, generator=draw)) / size
        times = torch.sigmoid(TIME_MEAN + TIME_DEVIATION * torch.special.ndtri(even.clamp(1e-5, 1 - 1e-5)))
        dropped = torch.rand(size, generator=draw) < config.unconditional_share
        caption = torch.where(dropped, 0, caption_of[chosen]).to(config.device)
        text = torch.nn.functional.pad(texts[caption], (0, 0, 0, rows))
        times, target = times.to(config.device), (noise - clean).to(config.device)
        noisy = clean.lerp(noise, times.cpu()[:, None, None, None]).to(config.device)
        predicted = transformer(noisy, text, pooled[caption], 1000 * times).sample
        metrics = {"loss": (predicted.detach() - target).square().mean().item()}
        if teacher:
            taught, known = teacher.velocity(noisy, times, caption)
            target = target.lerp(taught, config.teacher_weight * known[:, None, None, None].float())
        value = (predicted - target).square().mean()
        return value, metrics | {"taught_loss": value.item()}

    average = copy.deepcopy(transformer).requires_grad_(False)
    train_stage(transformer, loss, config, average)
    pipeline.register_modules(transformer=average)
    pipeline.save_pretrained(config.out / "pipeline")
    figures = {"flow_training_samples": sum(zero_rows(config, step)[1] for step in range(config.num_steps))}
    (config.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
