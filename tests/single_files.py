"""Tiny pipelines in the layout of the repositories that their models came from: one file, as other tools share it.

diffusers reads these layouts and writes none, so this is the way back, as far as the tests need it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import tiny_pipelines as tiny
import torch
from diffusers.loaders import single_file_utils
from torch import Tensor

Weights = dict[str, Tensor]
FAMILIES = {"sd1": "sd1", "sd2": "sd2_v", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux", "flux_whole": "flux"}
"""Which tiny pipeline each of them is."""
_KNOWN = single_file_utils.DIFFUSERS_TO_LDM_MAPPING  # diffusers' names to those of old
_OLD_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OLD_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def build(family: str) -> Any:
    """The tiny pipeline, with text encoders that diffusers can tell apart in one file: by their widths."""
    made = tiny.build(FAMILIES[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if family == "sdxl":
            made.text_encoder, made.text_encoder_2 = tiny.clip(24), tiny.clip(40, projected=True)
        if family == "sd3":
            made.text_encoder_2 = tiny.clip(24, projected=True)
            made.text_encoder.text_projection.weight.data = torch.eye(32)  # which diffusers puts there
    return made


def weights_of(family: str, pipeline: Any) -> Weights:
    """With what such files hold beside the weights that a pipeline needs."""
    make = {"sd1": _sd1, "sd2": _sd2, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux, "flux_whole": _flux_whole}
    return {name: weight.clone(memory_format=torch.contiguous_format) for name, weight in make[family](pipeline).items()}


def _under(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": weight for name, weight in weights.items()}


def _sd1(pipeline: Any) -> Weights:
    weights = _under("cond_stage_model.transformer.", _clip(pipeline.text_encoder))
    weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    weights |= {"alphas_cumprod": torch.rand(1000), "model_ema.diffusion_modelout2weight": torch.rand(4, 8, 3, 3)}
    return _unet(pipeline.unet) | _vae(pipeline.vae, "first_stage_model.") | weights


def _sd2(pipeline: Any) -> Weights:
    encoder = _open_clip(pipeline.text_encoder)
    encoder |= {"logit_scale": torch.tensor(4.6), "text_projection": torch.rand(32, 32)}
    encoder["transformer.resblocks.23.ln_1.weight"] = torch.rand(32)  # of the last layer, which no pipeline asks
    return _unet(pipeline.unet) | _vae(pipeline.vae, "first_stage_model.") | _under("cond_stage_model.model.", encoder)


def _sdxl(pipeline: Any) -> Weights:
    first = _under("conditioner.embedders.0.transformer.", _clip(pipeline.text_encoder))
    second = _under("conditioner.embedders.1.model.", _open_clip(pipeline.text_encoder_2) | {"logit_scale": torch.tensor(4.6)})
    return _unet(pipeline.unet) | _vae(pipeline.vae, "first_stage_model.") | first | second


def _sd3(pipeline: Any) -> Weights:
    first = _clip(pipeline.text_encoder)
    del first["text_projection.weight"]
    weights = _under("text_encoders.clip_l.transformer.", first)
    weights |= _under("text_encoders.clip_g.transformer.", _clip(pipeline.text_encoder_2))
    weights |= _under("model.diffusion_model.", _sd3_transformer(pipeline.transformer))
    weights["text_encoders.t5xxl.transformer.shared.weight"] = torch.rand(8, 8)  # of an encoder that the pipeline has none of
    return weights | _vae(pipeline.vae, "first_stage_model.")


def _flux(pipeline: Any) -> Weights:
    """The transformer alone, which is how it is shared most."""
    return _flux_transformer(pipeline.transformer)


def _flux_whole(pipeline: Any) -> Weights:
    encoder = pipeline.text_encoder_2.state_dict()
    del encoder["encoder.embed_tokens.weight"]  # which is shared.weight
    weights = _under("text_encoders.clip_l.transformer.", _clip(pipeline.text_encoder))
    weights |= _under("text_encoders.t5xxl.transformer.", encoder)
    weights |= _under("model.diffusion_model.", _flux_transformer(pipeline.transformer))
    return weights | _vae(pipeline.vae, "vae.")


def _replaced(name: str, renames: Mapping[str, str]) -> str:
    for old, new in renames.items():
        name = re.sub(rf"(^|\.){re.escape(old)}\.", rf"\1{new}.", name)
    return name


def _unet(unet: Any) -> Weights:
    config, found = unet.config, {}
    per_block = config.layers_per_block + 1
    heads = _KNOWN["unet"]["layers"] | (_KNOWN["unet"]["addition_embed_type"] if config.addition_embed_type else {})

    def renamed(name: str) -> str:
        if name in heads:
            return heads[name]
        if name.startswith("mid_block"):
            _, kind, index, rest = name.split(".", 3)
            place = f"middle_block.{2 * int(index) if kind == 'resnets' else 1}"
        else:
            side, block, kind, index, rest = name.split(".", 4)
            down = side == "down_blocks"
            first = int(block) * per_block + down
            if kind.endswith("samplers"):
                attended = f"{side}.{block}.attentions.0.norm.weight" in unet.state_dict()
                last = first + config.layers_per_block
                inner = "0.op" if down else f"{1 + attended}.conv"
                return f"{'input' if down else 'output'}_blocks.{last}.{inner}.{rest.removeprefix('conv.')}"
            place = f"{'input' if down else 'output'}_blocks.{first + int(index)}.{int(kind == 'attentions')}"
        return f"{place}.{_replaced(rest, _OLD_RESNET) if kind == 'resnets' else rest}"

    for name, weight in unet.state_dict().items():
        found[f"model.diffusion_model.{renamed(name)}"] = weight
    return found


def _vae(vae: Any, prefix: str) -> Weights:
    last, found = len(vae.config.block_out_channels) - 1, {}
    for name, weight in vae.state_dict().items():
        renamed = _KNOWN["vae"].get(name, name)
        renamed = re.sub(r"down_blocks\.(\d+)", r"down.\1", renamed)
        renamed = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", renamed)
        renamed = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", renamed)
        renamed = re.sub(r"(down|up)samplers\.0\.", r"\1sample.", renamed).replace("resnets.", "block.")
        if "mid_block.attentions.0." in renamed:
            renamed = _replaced(renamed.replace("mid_block.attentions.0.", "mid.attn_1."), _OLD_ATTENTION)
            weight = weight[:, :, None, None] if weight.ndim == 2 else weight
        found[prefix + renamed.replace("conv_shortcut", "nin_shortcut")] = weight
    return found


def _clip(encoder: Any) -> Weights:
    found = encoder.state_dict()
    return {name if name.startswith("text_") else f"text_model.{name}": weight for name, weight in found.items()}


def _open_clip(encoder: Any) -> Weights:
    """Under OpenCLIP's names; its projection is a matrix to multiply with from the right."""
    weights, found = _clip(encoder), {}
    for name, old in _KNOWN["openclip"]["layers"].items():
        if name in weights:
            weight = weights.pop(name)
            found[old] = weight.T if old == "text_projection" else weight
    inner = {new: old for new, old in _KNOWN["openclip"]["transformer"].items() if not new.startswith("transformer.")}
    for name, weight in _fused(weights, ("q_proj", "k_proj", "v_proj"), "in_proj").items():
        for new, old in inner.items():
            name = name.replace(new, old)
        found[f"transformer.{name.replace('in_proj.', 'in_proj_')}"] = weight
    return found


def _fused(weights: Weights, parts: Iterable[str], whole: str) -> Weights:
    """Layers that are one in the old layout."""
    first, *others = parts
    found = {}
    for name, weight in weights.items():
        words = name.split(".")
        if first in words:
            names = [name] + [".".join(other if word == first else word for word in words) for other in others]
            found[".".join(whole if word == first else word for word in words)] = torch.cat([weights[each] for each in names])
        elif not set(others) & set(words):
            found[name] = weight
    return found


def _swapped(weight: Tensor) -> Tensor:
    scale, shift = weight.chunk(2)
    return torch.cat([shift, scale])


def _sd3_transformer(network: Any) -> Weights:
    weights = _fused(network.state_dict(), ("to_q", "to_k", "to_v"), "x_block.attn.qkv")
    weights = _fused(weights, ("add_q_proj", "add_k_proj", "add_v_proj"), "context_block.attn.qkv")
    last, found = f"transformer_blocks.{network.config.num_layers - 1}.norm1_context.linear.", {}
    renames = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "transformer_blocks": "joint_blocks",
        "attn.x_block": "x_block",
        "attn.context_block": "context_block",
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    }
    for name, weight in weights.items():
        swapped = name.startswith(("norm_out.", last))
        found[_replaced(f"{name}.", renames)[:-1]] = _swapped(weight) if swapped else weight
    return found


def _flux_transformer(network: Any) -> Weights:
    weights = network.state_dict()
    single = {name: weight for name, weight in weights.items() if name.startswith("single_")}
    single = {name.replace("attn.to_", "to_"): weight for name, weight in single.items()}
    single = _fused(single, ("to_q", "to_k", "to_v", "proj_mlp"), "linear1")
    double = {name: weight for name, weight in weights.items() if not name.startswith("single_")}
    double = _fused(_fused(double, ("to_q", "to_k", "to_v"), "img_qkv"), ("add_q_proj", "add_k_proj", "add_v_proj"), "txt_qkv")
    found = {}
    renames = {
        "time_text_embed.timestep_embedder": "time_in",
        "time_text_embed.text_embedder": "vector_in",
        "time_text_embed.guidance_embedder": "guidance_in",
        "linear_1": "in_layer",
        "linear_2": "out_layer",
        "context_embedder": "txt_in",
        "x_embedder": "img_in",
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "attn.img_qkv": "img_attn.qkv",
        "attn.txt_qkv": "txt_attn.qkv",
        "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
        "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
        "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "transformer_blocks": "double_blocks",
    }
    of_single = {
        "single_transformer_blocks": "single_blocks",
        "norm.linear": "modulation.lin",
        "attn.norm_q.weight": "norm.query_norm.scale",
        "attn.norm_k.weight": "norm.key_norm.scale",
        "proj_out": "linear2",
    }
    for name, weight in double.items():
        renamed = _replaced(f"{name}.", renames | {"proj_out": "final_layer.linear"})[:-1]
        found[renamed] = _swapped(weight) if name.startswith("norm_out.") else weight
    return found | {_replaced(f"{name}.", of_single)[:-1]: weight for name, weight in single.items()}
