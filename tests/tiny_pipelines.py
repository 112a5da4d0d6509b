"""Tiny random pipelines of many families, built without a network, and what their calls take beside a prompt.

Configurations follow the ones that diffusers tests its pipelines with. ``build(name)`` gives the pipeline, ``CALLS[name]`` the
arguments, ``EXAMPLES`` the media of those that take some.
"""

import json
import warnings
from collections.abc import Callable
from typing import Any

import diffusers as d
import numpy as np
import torch
import transformers as t
from PIL import Image

from diffusionrl.policies import EMBEDDED_MODEL

_BUILDERS: dict[str, Callable[[], Any]] = {}
SIZE = {"height": 16, "width": 16}
_WORDS = {"max_sequence_length": 16}
CALLS: dict[str, dict[str, Any]] = {}


def pipeline(**arguments: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Registers a builder under its name, with the arguments of its calls."""

    def keep(builder: Callable[[], Any]) -> Callable[[], Any]:
        _BUILDERS[builder.__name__] = builder
        CALLS[builder.__name__] = arguments
        return builder

    return keep


def build(name: str) -> Any:
    """With initial weights that depend on nothing else."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):  # of parts that diffusers deprecates
        torch.manual_seed(0)
        made = _BUILDERS[name]()
    for part in made.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    made.set_progress_bar_config(disable=True)
    return made


def picture(channel: int) -> Image.Image:
    """A ramp of one colour across, of the next one down."""
    ramp = np.arange(16) * 16
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[..., channel], pixels[..., (channel + 1) % 3] = ramp[None], ramp[:, None]
    return Image.fromarray(pixels)


MASK = Image.fromarray(np.repeat(np.arange(16)[:, None] < 8, 16, 1).astype(np.uint8) * 255)


def examples(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The media of two prompts."""
    if name.startswith("inpaint"):
        return {"image": picture(0), "mask_image": MASK}, {"image": picture(1), "mask_image": MASK}
    if name in ("controlnet", "instruct_pix2pix", "flux_kontext") or name.endswith("img2img"):
        return {"image": picture(0)}, {"image": picture(1)}
    return {}, {}


# Parts


def tokenizer(chat: bool = False) -> Any:
    made = t.CLIPTokenizer.from_pretrained(EMBEDDED_MODEL / "tokenizer")
    if chat:
        made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def clip(width: int = 32, projected: bool = False) -> Any:
    config = t.CLIPTextConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return t.CLIPTextModelWithProjection(config) if projected else t.CLIPTextModel(config)


def t5() -> Any:
    return t.T5EncoderModel(t.T5Config(vocab_size=1000, d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4))


def gemma(width: int, layers: int, head: int, window: int = 16) -> Any:
    return t.Gemma2Model(
        t.Gemma2Config(
            head_dim=head,
            hidden_size=width,
            intermediate_size=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_hidden_layers=layers,
            sliding_window=window,
            vocab_size=1000,
        )
    )


def kl(**settings: Any) -> Any:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    shape = {"block_out_channels": [8, 16], "norm_num_groups": 4, "latent_channels": 4, "sample_size": 32}
    return d.AutoencoderKL(**shape | blocks | settings)


def flat_kl(channels: int, blocks: int = 1) -> Any:
    """Latents as large as the image, as diffusers' tests of flow models have them; halved by every further block."""
    return kl(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )


def unet(**settings: Any) -> Any:
    shape = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "norm_num_groups": 4,
    }
    return d.UNet2DConditionModel(**shape | settings)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def ddim(**settings: Any) -> Any:
    return d.DDIMScheduler(**BETAS | {"clip_sample": False, "set_alpha_to_one": False} | settings)


def stable_diffusion(kind: Any, scheduler: Any, **unet_settings: Any) -> Any:
    return kind(
        vae=kl(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        unet=unet(**unet_settings),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# Stable Diffusion


@pipeline()
def sd1() -> Any:
    """With the scheduler that it comes with, of second order and more."""
    return stable_diffusion(d.StableDiffusionPipeline, d.PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False))


@pipeline()
def sd2_v() -> Any:
    scheduler = ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return stable_diffusion(d.StableDiffusionPipeline, scheduler)


@pipeline(strength=1.0)
def inpaint4() -> Any:
    return stable_diffusion(d.StableDiffusionInpaintPipeline, ddim())


@pipeline(strength=1.0)
def inpaint9() -> Any:
    return stable_diffusion(d.StableDiffusionInpaintPipeline, ddim(), in_channels=9)


@pipeline(strength=0.75, height=None, width=None)
def sd1_img2img() -> Any:
    return stable_diffusion(d.StableDiffusionImg2ImgPipeline, ddim())


@pipeline(image_guidance_scale=1.5, height=None, width=None)
def instruct_pix2pix() -> Any:
    return stable_diffusion(d.StableDiffusionInstructPix2PixPipeline, ddim(), in_channels=8)


@pipeline()
def controlnet() -> Any:
    control = d.ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=32,
        conditioning_embedding_out_channels=(16, 32),
        norm_num_groups=4,
    )
    for weight in control.controlnet_down_blocks.parameters():  # which begin at zero
        torch.nn.init.normal_(weight)
    plain = stable_diffusion(d.StableDiffusionPipeline, ddim())
    return d.StableDiffusionControlNetPipeline(**plain.components, controlnet=control, requires_safety_checker=False)


@pipeline()
def sdxl() -> Any:
    network = unet(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=16,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    return d.StableDiffusionXLPipeline(
        unet=network,
        scheduler=d.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading"),
        vae=kl(sample_size=128),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=clip(projected=True),
        tokenizer_2=tokenizer(),
        add_watermarker=False,
    )


@pipeline()
def sdxl_dpm() -> Any:
    made = sdxl()
    made.scheduler = d.DPMSolverMultistepScheduler.from_config(
        made.scheduler.config, solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )
    return made


# Flows


def flow(**settings: Any) -> Any:
    return d.FlowMatchEulerDiscreteScheduler(**settings)


@pipeline(**_WORDS)
def sd3() -> Any:
    network = d.SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    return d.StableDiffusion3Pipeline(
        transformer=network,
        scheduler=flow(shift=3.0),
        vae=flat_kl(4),
        text_encoder=clip(projected=True),
        tokenizer=tokenizer(),
        text_encoder_2=clip(projected=True),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


@pipeline(**_WORDS, strength=0.75, height=None, width=None)
def sd3_img2img() -> Any:
    return d.StableDiffusion3Img2ImgPipeline(**sd3().components)


@pipeline(**_WORDS)
def flux() -> Any:
    network = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    return d.FluxPipeline(
        transformer=network,
        scheduler=flow(use_dynamic_shifting=True),
        vae=flat_kl(1),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
    )


def _as(kind: Any, made: Any) -> Any:
    """The parts of a pipeline in another one."""
    names = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return kind(**{name: getattr(made, name) for name in names if hasattr(made, name)})


@pipeline(**_WORDS, strength=0.75)
def flux_img2img() -> Any:
    return _as(d.FluxImg2ImgPipeline, flux())


@pipeline(**_WORDS, _auto_resize=False, max_area=256)
def flux_kontext() -> Any:
    return _as(d.FluxKontextPipeline, flux())


@pipeline(**_WORDS, text_encoder_out_layers=(1,))
def flux2_klein() -> Any:
    network = d.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
    )
    vae = d.AutoencoderKLFlux2(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return d.Flux2KleinPipeline(
        transformer=network,
        scheduler=flow(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=t.Qwen3ForCausalLM(qwen3()),
        tokenizer=tokenizer(chat=True),
    )


def qwen3(**settings: Any) -> Any:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return t.Qwen3Config(**shape | {"num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 512} | settings)


@pipeline(**_WORDS)
def qwen_image() -> Any:
    network = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    vae = d.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1] * 4,
        latents_std=[1.3] * 4,
    )
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = shape | {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rope_scaling": rope,
        "rope_theta": 1e6,
        "vocab_size": 1000,
    }
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    ids = {"vision_end_token_id": 153, "vision_start_token_id": 152, "vision_token_id": 154}
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, hidden_size=16, vocab_size=1000, **ids)
    return d.QwenImagePipeline(
        transformer=network,
        vae=vae,
        scheduler=flow(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02),
        text_encoder=t.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer(),
    )


@pipeline(**_WORDS)
def z_image() -> Any:
    network = d.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for token in (network.x_pad_token, network.cap_pad_token):  # which begin as whatever the memory holds
        torch.nn.init.normal_(token)
    return d.ZImagePipeline(
        transformer=network,
        vae=kl(latent_channels=16, layers_per_block=1, scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=flow(shift=3.0),
        text_encoder=t.Qwen3Model(qwen3(head_dim=8)),
        tokenizer=tokenizer(chat=True),
    )


@pipeline(**_WORDS, use_resolution_binning=False, complex_human_instruction=None, height=32, width=32)
def sana() -> Any:
    network = d.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    vae = d.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    scheduler = d.DPMSolverMultistepScheduler(
        solver_order=1,
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
        use_flow_sigmas=True,
        flow_shift=3.0,
        prediction_type="flow_prediction",
    )
    return d.SanaPipeline(
        transformer=network, vae=vae, scheduler=scheduler, text_encoder=gemma(8, 1, 16), tokenizer=tokenizer()
    )


@pipeline(**_WORDS, use_resolution_binning=False, clean_caption=False)
def pixart_sigma() -> Any:
    network = d.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    scheduler = d.DDIMScheduler(clip_sample=False)
    return d.PixArtSigmaPipeline(transformer=network, vae=kl(), scheduler=scheduler, text_encoder=t5(), tokenizer=tokenizer())


@pipeline(max_sequence_length=32, height=32, width=32)
def lumina2() -> Any:
    network = d.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=[4, 2, 2],
        axes_lens=[128, 128, 128],
        cap_feat_dim=8,
    )
    encoder = gemma(8, 2, 4, window=2)
    return d.Lumina2Pipeline(
        transformer=network, vae=flat_kl(4, 4), scheduler=flow(), text_encoder=encoder, tokenizer=tokenizer()
    )


@pipeline(**_WORDS)
def auraflow() -> Any:
    network = d.AuraFlowTransformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    return d.AuraFlowPipeline(
        transformer=network, vae=kl(), scheduler=flow(shift=1.73), text_encoder=t5(), tokenizer=tokenizer()
    )


@pipeline(**_WORDS)
def cogview4() -> Any:
    network = d.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )
    shape = {"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    shift = {"base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 256, "time_shift_type": "linear"}
    return d.CogView4Pipeline(
        transformer=network,
        vae=kl(),
        scheduler=flow(use_dynamic_shifting=True, **shift),
        text_encoder=t.GlmForCausalLM(t.GlmConfig(**shape, vocab_size=1000, pad_token_id=0, eos_token_id=2)),
        tokenizer=tokenizer(),
    )


# Videos and sound


@pipeline(**_WORDS, num_frames=5)
def wan() -> Any:
    network = d.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = d.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = d.UniPCMultistepScheduler(
        solver_order=1,
        disable_corrector=list(range(100)),
        final_sigmas_type="zero",
        use_flow_sigmas=True,
        flow_shift=3.0,
        prediction_type="flow_prediction",
    )
    return d.WanPipeline(
        transformer=network, vae=vae, scheduler=scheduler, text_encoder=t5(), tokenizer=tokenizer(), transformer_2=None
    )


@pipeline(**_WORDS, num_frames=5, height=32, width=32)
def ltx() -> Any:
    network = d.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    vae = d.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    scheduler = flow(use_dynamic_shifting=True)
    return d.LTXPipeline(transformer=network, vae=vae, scheduler=scheduler, text_encoder=t5(), tokenizer=tokenizer())


@pipeline(**_WORDS, num_frames=5, prompt_template={"template": "{}", "crop_start": 0})
def hunyuan_video() -> Any:
    network = d.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    vae = d.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        mid_block_add_attention=True,
    )
    shape = {"hidden_size": 16, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 1000}
    llama = t.LlamaModel(t.LlamaConfig(**shape, bos_token_id=0, eos_token_id=2, pad_token_id=1))
    return d.HunyuanVideoPipeline(
        transformer=network,
        vae=vae,
        scheduler=flow(shift=7.0),
        text_encoder=llama,
        tokenizer=tokenizer(),
        text_encoder_2=clip(8),
        tokenizer_2=tokenizer(),
    )


@pipeline(audio_end_in_s=2.0, height=None, width=None)
def stable_audio() -> Any:
    network = d.StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    vae = d.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    scheduler = d.CosineDPMSolverMultistepScheduler(
        solver_order=1, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    )
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel  # whose module imports half of SciPy

    projection = StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32)
    return d.StableAudioPipeline(
        transformer=network,
        vae=vae,
        scheduler=scheduler,
        text_encoder=t5(),
        tokenizer=tokenizer(),
        projection_model=projection,
    )


def call_of(name: str) -> dict[str, Any]:
    """The arguments of a call beside prompt, steps and guidance."""
    return {
        key: value for key, value in (SIZE | CALLS[name]).items() if value is not None or key == "complex_human_instruction"
    }


NAMES = list(_BUILDERS)


# For the command line

QUICK = [
    *("--sampling.num-steps", "2", "--sampling.guidance", "2", "--sampling.sampler", "cps", "--sampling.eta", "0.7"),
    *("--sampling.batch-size", "4"),
]


def options_of(name: str) -> list[str]:
    sizes, others = [], []
    for key, value in call_of(name).items():
        if key in ("height", "width", "num_frames"):
            sizes += [f"--sampling.{key.replace('_', '-')}", str(value)]
        else:
            others.append(f"{key}={json.dumps(value)}")
    return [*sizes, *(["--sampling.call", *others] if others else [])]
