"""Seven models as published, by their configurations: folders in diffusers' format without weights, or with random ones.

    python benchmarks/shapes.py sdxl runs/shapes/sdxl               # settings alone, for diffusionrl plan
    python benchmarks/shapes.py sd15 runs/shapes/sd15 --weights     # random weights in float32, for speed: large

Configurations are those of the models' own config.json files as we know them, written from memory and from diffusers' and
transformers' defaults; the networks' sizes are held against the published ones by a test. The tokenizer is the embedded
world's, whose texts are longer or shorter than the models' own: it matters where embeddings are as long as their text
(Qwen-Image, Z-Image). Unsure: Z-Image's largest positions, and Qwen2.5-VL's vision tower, which no text passes.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers as d
import torch
import transformers as t

from diffusionrl.policies import EMBEDDED_MODEL

Parts = dict[str, Any]
"""Networks as (class, settings); tokenizers and schedulers as they are; None for parts that are left out."""


def tokenizer(length: int = 77) -> Any:
    made = t.CLIPTokenizer.from_pretrained(EMBEDDED_MODEL / "tokenizer", model_max_length=length)
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def clip_l(kind: Any = t.CLIPTextModel) -> tuple[Any, Any]:
    width = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return kind, t.CLIPTextConfig(**width, vocab_size=49408, projection_dim=768)


def clip_g() -> tuple[Any, Any]:
    width = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    return t.CLIPTextModelWithProjection, t.CLIPTextConfig(**width, vocab_size=49408, projection_dim=1280, hidden_act="gelu")


_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}


def t5() -> tuple[Any, Any]:
    return t.T5EncoderModel, t.T5Config(**_XXL, vocab_size=32128, tie_word_embeddings=False)


def kl(channels: int, size: int, **settings: Any) -> tuple[Any, Any]:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    widths = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    return d.AutoencoderKL, blocks | widths | {"latent_channels": channels, "sample_size": size} | settings


def kl16(scale: float, shift: float) -> tuple[Any, Any]:
    quant = {"use_quant_conv": False, "use_post_quant_conv": False}
    return kl(16, 1024, scaling_factor=scale, shift_factor=shift, **quant)


def betas(kind: Any, **settings: Any) -> Any:
    return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, **settings)


def sd15() -> tuple[Any, Parts]:
    unet = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # the class's defaults otherwise
    return d.StableDiffusionPipeline, {
        "unet": (d.UNet2DConditionModel, unet),
        "vae": kl(4, 512),
        "text_encoder": clip_l(),
        "tokenizer": tokenizer(),
        "scheduler": betas(d.DDIMScheduler, clip_sample=False, set_alpha_to_one=False),
        "safety_checker": None,
        "feature_extractor": None,
    }


def sdxl() -> tuple[Any, Parts]:
    unet = {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    return d.StableDiffusionXLPipeline, {
        "unet": (d.UNet2DConditionModel, unet),
        "vae": kl(4, 1024, scaling_factor=0.13025),
        "text_encoder": clip_l(),
        "text_encoder_2": clip_g(),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "scheduler": betas(d.EulerDiscreteScheduler, timestep_spacing="leading"),
        "image_encoder": None,
        "feature_extractor": None,
    }


def sd35_medium() -> tuple[Any, Parts]:
    network = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)),
        "qk_norm": "rms_norm",
    }
    return d.StableDiffusion3Pipeline, {
        "transformer": (d.SD3Transformer2DModel, network),
        "vae": kl16(1.5305, 0.0609),
        "text_encoder": clip_l(t.CLIPTextModelWithProjection),
        "text_encoder_2": clip_g(),
        "text_encoder_3": t5(),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "tokenizer_3": tokenizer(512),
        "scheduler": d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "image_encoder": None,
        "feature_extractor": None,
    }


def flux1_dev() -> tuple[Any, Parts]:
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 4096}
    return d.FluxPipeline, {
        "transformer": (d.FluxTransformer2DModel, {"guidance_embeds": True}),  # the class's defaults otherwise
        "vae": kl16(0.3611, 0.1159),
        "text_encoder": clip_l(),
        "text_encoder_2": t5(),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(512),
        "scheduler": d.FlowMatchEulerDiscreteScheduler(shift=3.0, **shift),
        "image_encoder": None,
        "feature_extractor": None,
    }


def z_image() -> tuple[Any, Parts]:
    width = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    text = t.Qwen3Config(**width, num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True)
    return d.ZImagePipeline, {
        "transformer": (d.ZImageTransformer2DModel, {"axes_lens": [1536, 512, 512]}),  # the class's defaults otherwise
        "vae": kl(16, 1024, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": (t.Qwen3Model, text),
        "tokenizer": tokenizer(512),
        "scheduler": d.FlowMatchEulerDiscreteScheduler(shift=6.0),
    }


def qwen_image() -> tuple[Any, Parts]:
    text = {
        **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
        **{"num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1e6},
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
    return d.QwenImagePipeline, {
        "transformer": (d.QwenImageTransformer2DModel, {}),  # the class's defaults
        "vae": (d.AutoencoderKLQwenImage, {}),
        "text_encoder": (t.Qwen2_5_VLForConditionalGeneration, t.Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        "tokenizer": tokenizer(1024),
        "scheduler": d.FlowMatchEulerDiscreteScheduler(shift_terminal=0.02, **shift),
    }


def wan_1_3b() -> tuple[Any, Parts]:
    flow = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    network = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
    return d.WanPipeline, {
        "transformer": (d.WanTransformer3DModel, network),  # the class's defaults otherwise
        "vae": (d.AutoencoderKLWan, {}),
        "text_encoder": (t.UMT5EncoderModel, t.UMT5Config(**_XXL, vocab_size=256384)),
        "tokenizer": tokenizer(512),
        "scheduler": d.UniPCMultistepScheduler(**flow),
        "transformer_2": None,
    }


MODELS: dict[str, Callable[[], tuple[Any, Parts]]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd3-medium": sd35_medium,
    "flux-dev": flux1_dev,
    "z-image": z_image,
    "qwen-image": qwen_image,
    "wan-1.3b": wan_1_3b,
}


def make(kind: Any, settings: Any) -> Any:
    """A network."""
    return kind(settings) if isinstance(settings, t.PretrainedConfig) else kind.from_config(settings)


def parameters(name: str) -> int:
    """Of the denoising network, counted without its weights."""
    parts = MODELS[name]()[1]
    with torch.device("meta"):
        network = make(*parts.get("unet", parts.get("transformer")))
    return sum(weight.numel() for weight in network.parameters())


def write(name: str, folder: Path, weights: bool = False) -> Path:
    """A model's folder in diffusers' format."""
    kind, parts = MODELS[name]()
    index: dict[str, Any] = {"_class_name": kind.__name__, "_diffusers_version": d.__version__}
    for part, found in parts.items():
        if found is None:
            index[part] = [None, None]
            continue
        made = found
        if isinstance(found, tuple):
            with torch.device("cpu" if weights else "meta"):
                made = make(*found)
        index[part] = ["transformers" if type(made).__module__.startswith("transformers") else "diffusers", type(made).__name__]
        settings = made.config if isinstance(made, t.PreTrainedModel) else made
        if weights or not isinstance(made, d.ModelMixin):
            (made if weights else settings).save_pretrained(folder / part)
        else:
            made.save_config(folder / part)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", action="store_true", help="random ones")
    given = parser.parse_args()
    print(f"{write(given.name, given.folder, given.weights)}: {parameters(given.name) / 1e9:.3f} B parameters in its network")


if __name__ == "__main__":
    main()
