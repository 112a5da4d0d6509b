"""Stable Diffusion 1.x and 2.x (epsilon and v prediction), and the embedded model, which is one of them.

Adapters and precision. In float32 an adapter is applied in weight space: each pass runs the plain network with weights
``W + B A``, through which the gradient reaches A and B. Sampling then costs what the base model costs, and sampling and
update are the same computation, so the ratio before the first update is exactly 1. In bfloat16 the small ``B A`` would drown
in the rounding of W; there the adapter runs beside its layer, as peft does it, from float32 weights.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from diffusionrl import processes
from diffusionrl.data.media import Show
from diffusionrl.data.prompts import Prompt, keep_newest
from diffusionrl.devices import handed
from diffusionrl.errors import UserError
from diffusionrl.policies.adapters import (
    Copies,
    add_lora,
    find_lora,
    find_targets,
    load_lora,
    lora_weights,
    save_memory,
    take_lora,
)
from diffusionrl.policies.base import chunks, describe, standard_noise
from diffusionrl.policies.encoders import WaitingEncoders
from diffusionrl.policies.identity import fingerprint_of
from diffusionrl.runs.usage import ABOUT_STABLE_DIFFUSION
from diffusionrl.transitions import Grid, NoiseLevels, to_x0_and_noise, variance_preserving_grid

_DECODE_BATCH = 16
_REMEMBERED = 2048  # prompt embeddings, a third of a megabyte each: there may be millions of prompts


class StableDiffusionPolicy:
    """A ``StableDiffusionPipeline`` as a policy. Only the UNet is trained; text encoder and VAE stay as they are.

    Args:
        lora_rank, lora_alpha: of a new adapter; no rank trains the whole UNet.
        lora_targets: see ``find_targets``.
        seed: seed of the adapter's initial weights.

    Raises:
        UserError: the pipeline's parts do not fit, or bfloat16 was asked for together with full fine-tuning.
    """

    edits = False
    sampling_rate: int | None = None
    show: Show | None = None

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        lora_rank: int | None = 4,
        lora_targets: str | Sequence[str] = "attention",
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
        source: str = "<pipeline handed over in Python>",
        gradient_checkpointing: bool = False,
        lora: Path | None = None,
        reference: str = "start",
        files: Mapping[str, Any] | None = None,
        offload_text_encoders: bool = False,
        lora_alpha: float | None = None,
    ) -> None:
        self.source, self._files = source, files or {}
        switches = {"gradient_checkpointing": gradient_checkpointing, "offload_text_encoders": offload_text_encoders}
        self.settings = describe(lora_rank, lora_alpha, lora_targets, dtype, device, lora, reference, (), **switches)
        self.pipeline, self.unet, self.device, self.dtype = pipeline, pipeline.unet, torch.device(device), dtype
        scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        self._alphas_cumprod = scheduler.alphas_cumprod
        kept = self._alphas_cumprod.float()
        self.noise_levels = NoiseLevels(torch.arange(len(kept)).float(), kept.sqrt(), (1 - kept).sqrt())
        self._final_alpha_cumprod = float(scheduler.final_alpha_cumprod)
        self._spacing, self._steps_offset = scheduler.config.timestep_spacing, scheduler.config.steps_offset
        self._prediction = scheduler.config.prediction_type
        size = self.unet.config.sample_size
        self.latent_shape: tuple[int, ...] = (self.unet.config.in_channels, size, size)
        self.sample_shape: tuple[int, ...] = (3, *[size * pipeline.vae_scale_factor] * 2)
        self._embeddings: dict[str, Tensor] = {}
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.requires_grad_(False).eval().to(self.device)
        waiting = {"text_encoder": pipeline.text_encoder} if offload_text_encoders else {}
        self._encoders = WaitingEncoders(waiting, self.device)
        pipeline.vae.to(torch.float32)
        self.memory_format = torch.channels_last  # the faster layout for convolutions, on CPUs too
        self.unet.to(dtype=dtype, memory_format=self.memory_format)
        self._adapted: dict[str, LoraLayer] = {}
        if lora is not None:
            load_lora(pipeline, find_lora(lora), source, ["unet"])
            self._adapted = take_lora(self.unet)
        elif lora_rank is not None:
            targets = list(find_targets(self.unet, lora_targets))
            self._adapted = add_lora(self.unet, lora_rank, targets, seed, alpha=lora_alpha)
        elif dtype != torch.float32:
            raise UserError("full fine-tuning needs policy.dtype float32: small updates are lost in bfloat16 weights")
        else:
            self.unet.requires_grad_(True)
        if gradient_checkpointing:
            for network in (self.unet, pipeline.vae):
                save_memory(network, "enable_gradient_checkpointing")
        # A checkpoint is computed again when the merged weights are gone.
        self._weight_space = bool(self._adapted) and dtype == torch.float32 and not gradient_checkpointing
        if self._weight_space:
            self.unet.disable_adapters()
            for parameter in self.trainable().values():  # which peft has just frozen
                parameter.requires_grad_(True)
        self.copies, self._start = Copies(self.trainable), Copies(self.trainable)
        if lora is not None and reference == "start":
            self._start.follow("start")

    def grid(self, num_steps: int) -> Grid:
        return variance_preserving_grid(
            self._alphas_cumprod, num_steps, self._spacing, self._steps_offset, self._final_alpha_cumprod
        )

    @cached_property
    def _weights(self) -> str:
        """Of the model before training, if it is asked for before."""
        return fingerprint_of(self.pipeline.components)

    @property
    def about(self) -> dict[str, Any]:
        return ABOUT_STABLE_DIFFUSION | {"format": "lora" if self._adapted else "full", "weights": self._weights, **self._files}

    def start(self, prompts: Sequence[Prompt], addresses: Sequence[int]) -> Tensor:
        return standard_noise(addresses, self.latent_shape).to(self.device)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings, (B, L, D), computed once for each prompt."""
        with self._encoders.together():
            for prompt in dict.fromkeys(prompts):
                if prompt not in self._embeddings:  # one by one, so that an embedding does not depend on its batch
                    self._warn_if_truncated(prompt)
                    self._embeddings[prompt] = self._embed(prompt)
        found = torch.cat([self._embeddings[prompt] for prompt in prompts])
        keep_newest(self._embeddings, _REMEMBERED)
        return found

    def _embed(self, prompt: str) -> Tensor:
        with self._encoders.needed():
            return self.pipeline.encode_prompt(prompt, self.device, 1, False)[0].to(self.dtype)

    def _warn_if_truncated(self, prompt: str) -> None:
        limit, length = self.pipeline.tokenizer.model_max_length, len(self.pipeline.tokenizer(prompt).input_ids)
        if length > limit:
            warnings.warn(f"the model reads {limit} of the {length} tokens of the prompt {prompt!r}", stacklevel=3)

    def denoise(
        self, x: Tensor, levels: NoiseLevels, prompts: Sequence[Prompt], guidance: float | None
    ) -> tuple[Tensor, Tensor]:
        _refuse_media(prompts)
        embeddings, timestep = self.embed([prompt.text for prompt in prompts]), handed(levels.timesteps, x.device)
        if guidance is None or guidance <= 1:  # as the pipeline has it
            output = self._network(x, timestep, embeddings)
        else:
            unconditional = self.embed([""]).expand_as(embeddings)
            both = self._network(torch.cat([x, x]), torch.cat([timestep, timestep]), torch.cat([unconditional, embeddings]))
            without, with_prompt = both.chunk(2)
            output = without + guidance * (with_prompt - without)
        return to_x0_and_noise(self._prediction, output, x, *levels.shaped(x))

    def _network(self, x: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
        x = x.to(self.dtype).contiguous(memory_format=self.memory_format)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            inputs = (x, timestep, embeddings)
            if self._weight_space:
                return torch.func.functional_call(self.unet, self._merged_weights(), inputs, tie_weights=False).sample
            return self.unet(*inputs).sample.float()

    def _merged_weights(self) -> dict[str, Tensor]:
        """W + B A of every adapted layer; a kernel counts as the matrix (out, in * height * width)."""
        merged = {}
        for name, layer in self._adapted.items():
            weight = layer.base_layer.weight
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            change = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
            merged[f"{name}.base_layer.weight"] = weight + layer.scaling["default"] * change
        return merged

    def after(
        self, y: Tensor, x: Tensor, levels: NoiseLevels, following: NoiseLevels | None, prompts: Sequence[Prompt]
    ) -> Tensor:
        return y

    def decode(self, latents: Tensor, prompts: Sequence[Prompt] = (), gradient: bool = False) -> Tensor:
        vae = self.pipeline.vae
        with torch.set_grad_enabled(gradient):
            scaled = latents / vae.config.scaling_factor
            decoded = [vae.decode(scaled[part]).sample for part in chunks(len(scaled), _DECODE_BATCH)]
            return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The mean of the VAE's posterior, which is narrow: no draw is needed, and an image has one latent."""
        vae = self.pipeline.vae
        scaled = 2 * images.to(self.device) - 1
        means = [vae.encode(scaled[part]).latent_dist.mean for part in chunks(len(scaled), _DECODE_BATCH)]
        return torch.cat(means) * vae.config.scaling_factor

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        if not self._adapted:
            return dict(self.unet.named_parameters())
        return lora_weights(self.unet)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Raises UserError under full fine-tuning, which keeps no copy of the original weights."""
        if not self._adapted:
            raise UserError("full fine-tuning keeps no reference model: train a LoRA (policy.training lora)")
        if "start" in self._start:
            with self._start.used("start"):
                yield
            return
        in_weight_space = self._weight_space
        if in_weight_space:
            self._weight_space = False
        else:
            self.unet.disable_adapters()
        try:
            yield
        finally:
            if in_weight_space:
                self._weight_space = True
            else:
                self.unet.enable_adapters()

    def shard(self) -> None:
        """FSDP2, a block of the UNet at a time; gradients are added up, not averaged."""
        self.memory_format = torch.contiguous_format  # which is what it takes
        self.unet.to(memory_format=self.memory_format)
        middle = [] if self.unet.mid_block is None else [self.unet.mid_block]  # small ones are made without
        for module in (*self.unet.down_blocks, *middle, *self.unet.up_blocks, self.unet):
            fully_shard(module)
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)

    def export(self, folder: Path) -> None:
        """A LoRA for ``pipe.load_lora_weights(folder)`` and under kohya's names; after full fine-tuning, a ``unet`` folder."""
        if not self._adapted:
            weights = processes.copies(self.unet.state_dict())
            if processes.is_main():
                with torch.device("meta"):
                    unet = type(self.unet).from_config(self.unet.config)
                unet.load_state_dict(weights, assign=True)
                unet.register_to_config(_name_or_path="")  # else the base model's folder on this machine is written down
                unet.save_pretrained(folder / "unet")
            return
        weights = {name: weight.contiguous() for name, weight in get_peft_model_state_dict(self.unet).items()}
        settings = self.unet.peft_config["default"].to_dict()
        settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=weights,
            unet_lora_adapter_metadata=settings,
        )
        # ComfyUI looks for diffusers' names of old, "attn1.processor.to_q"; kohya's it knows for every layer.
        renamed = convert_state_dict_to_kohya({f"unet.{name}": weight for name, weight in weights.items()})
        scale = next(iter(self._adapted.values())).scaling["default"]  # alpha over rank; kohya's alphas are set to the ranks
        renamed |= {name: scale * alpha for name, alpha in renamed.items() if name.endswith(".alpha")}
        save_file(renamed, folder / "comfyui.safetensors")


def _refuse_media(prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        if prompt.media:
            raise UserError(f"this model takes no {', '.join(prompt.media)}, which the prompt {prompt.text!r} names")


_BEHAVIOUR = {
    "unet": ("class_embed_type", "num_class_embeds", "addition_embed_type", "time_cond_proj_dim", "encoder_hid_dim_type"),
    "scheduler": ("thresholding", "use_flow_sigmas"),
}
"""Settings that change what a network is asked, or what is made of its answer, beyond what this policy does."""
_PREDICTIONS = (None, "epsilon", "v_prediction", "sample")


def understood(unet: Mapping[str, Any], vae: Mapping[str, Any], scheduler: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of an image where this policy follows all that these configurations say; None where the pipeline has to be
    asked itself."""
    plain = not any(unet.get(key) for key in _BEHAVIOUR["unet"]) and not any(
        scheduler.get(key) for key in _BEHAVIOUR["scheduler"]
    )
    channels = {unet.get("in_channels"), unet.get("out_channels", 4), vae.get("latent_channels", 4)}
    size, blocks = unet.get("sample_size"), vae.get("block_out_channels")
    flow = str(scheduler.get("_class_name", "")).startswith("FlowMatch")
    known = scheduler.get("prediction_type") in _PREDICTIONS and not flow
    if not (plain and known and len(channels) == 1 and isinstance(size, int) and isinstance(blocks, list | tuple)):
        return None
    return (3, *[size * 2 ** (len(blocks) - 1)] * 2)


def check_pipeline_folder(folder: Path) -> tuple[int, ...] | None:
    """``understood`` of a folder, from its JSON alone.

    Raises:
        UserError: a configuration is not there, or cannot be read.
    """
    found = []
    for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        try:
            found.append(json.loads((folder / name).read_text(encoding="utf-8-sig")))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder} is no complete diffusers pipeline: {name} cannot be read ({type(error).__name__}: {error})"
            ) from error
    return understood(*found)
