"""Models by name: the embedded ones, a folder, a hub id, or a single file."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffusionrl import devices
from diffusionrl.config import PolicyConfig, SamplingConfig
from diffusionrl.data.entries import content_of
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import UserError, require
from diffusionrl.foreign.names import check_code, is_code
from diffusionrl.policies.adapters import find_lora, save_memory
from diffusionrl.policies.asking import check_class
from diffusionrl.policies.base import Policy
from diffusionrl.policies.files import fetch, file_of, find_class, find_networks, left_out, load_network, read_index
from diffusionrl.policies.own import check_policy, load_own
from diffusionrl.policies.pipeline import PipelinePolicy
from diffusionrl.policies.quantization import check_quantization, is_quantized, quantization_settings
from diffusionrl.policies.schedules import kind_of
from diffusionrl.policies.single_file import SingleFile, find_file, load_file, look_into
from diffusionrl.policies.soundness import asking, check_sound
from diffusionrl.policies.stable_diffusion import StableDiffusionPolicy, check_pipeline_folder, understood
from diffusionrl.runs.hub import cached_first

_FAST = "StableDiffusionPipeline"  # which has a policy of its own


def check_model(model: str, config: str | None = None) -> tuple[int, ...] | None:
    """Check a model without loading its weights. Returns the shape of what it makes where its settings tell; None where it is
    known when it is loaded.

    Args:
        config: of a single file: see ``TrainConfig.model_config``.

    Raises:
        UserError: it is not there, or cannot be asked what a policy is asked; or a single file lacks weights, or holds others.
    """
    if is_code(model):
        require(config is None, f"model_config describes a single .safetensors file, and model {model!r} is code: leave it out")
        check_code("model", model)
        return None
    return _check_settings(configuration_of(model, config))


def configuration_of(model: str, config: str | None = None) -> str:
    """The folder or hub id that says what a model is: itself, or of a single file, that of its pipeline."""
    file = _look(model, config)
    return file.config if file else model


def _look(model: str, config: str | None) -> SingleFile | None:
    path = find_file(model)
    if path is not None:
        return look_into(path, config)
    if config is not None:
        raise UserError(f"model_config describes a single .safetensors file, and model {model!r} is none: leave it out")
    return None


def _check_settings(model: str) -> tuple[int, ...] | None:
    """See ``check_model``; of a folder or a hub id."""
    kind = find_class(model)
    if kind.__name__ == _FAST:
        for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
            file = file_of(model, name)
        shape = check_pipeline_folder(file.parent.parent)
        if shape is not None:
            return shape
    check_class(kind)
    file = file_of(model, "scheduler/scheduler_config.json")
    try:
        settings = json.loads(file.read_text())
        kind_of(str(settings["_class_name"]), settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} does not say what scheduler it is of: {type(error).__name__}: {error}") from error
    return None


def load_pipeline(model: str, dtype: torch.dtype = torch.float32, config: str | None = None, quantization: str = "none") -> Any:
    """The diffusers pipeline of "emoji" or "emoji-flow", of a folder, a hub id or a single file, safetensors only; autoencoders
    in float32.

    Args:
        config: of a single file: see ``TrainConfig.model_config``.
        quantization: of the denoising networks: see ``PolicyConfig``.

    Raises:
        UserError: see ``check_model``; it could not be loaded; or it lacks weights, or holds others.
    """
    return _open(model, dtype, config, quantization)[0]


def _open(model: str, dtype: torch.dtype, config: str | None, quantization: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and what ``Policy.about`` says of its files."""
    file = _look(model, config)
    source = file.config if file else model
    _check_settings(source)
    try:
        return cached_first(_load, source, file=file, dtype=dtype, quantization=quantization)
    except UserError as error:
        raise UserError(f"model {model!r} could not be loaded: {error}") from error
    except Exception as error:  # diffusers and transformers raise whatever they come across in a folder
        raise UserError(f"model {model!r} could not be loaded: {type(error).__name__}: {error}") from error


def _load(
    source: str,
    revision: str | None,
    local_files_only: bool = False,
    *,
    file: SingleFile | None,
    dtype: torch.dtype,
    quantization: str,
) -> tuple[Any, dict[str, Any]]:
    """See ``_open``. Raises OSError where something is not there."""
    kind, index = find_class(source), read_index(source)
    parts: dict[str, Any] = left_out(kind, source, index)
    variants = {}
    inside = file.inside if file else {}
    folder = fetch(kind, source, parts | dict.fromkeys(inside), local_files_only)
    networks = find_networks(index, parts)
    quantized = quantization_settings(networks, quantization, dtype)
    for name, network in networks.items():
        if name not in inside:
            precision = torch.float32 if name == "vae" else dtype
            parts[name], variants[name] = load_network(network, folder, name, precision, quantized.get(name))
    if "requires_safety_checker" in inspect.signature(kind).parameters:
        parts["requires_safety_checker"] = False
    about = {"variants": {name: variant for name, variant in variants.items() if variant}}
    if file is None:
        return kind.from_pretrained(str(folder), **parts), about
    return load_file(kind, file, folder, parts, dtype, quantized), about | {"single_file": file.about}


def make_policy(
    pipeline: Any,
    sampling: SamplingConfig | None = None,
    example: Prompt | None = None,
    networks: tuple[str, ...] = (),
    **settings: Any,
) -> StableDiffusionPolicy | PipelinePolicy:
    """A pipeline as a policy: Stable Diffusion by its own road where nothing else is asked of it and it is not quantised, any
    other by calling it.

    Args:
        sampling: whose sizes and arguments its calls have.
        example: a prompt of the kind that will be asked.
        settings: of either policy.
    """
    sampling = sampling or SamplingConfig()
    plain = not (sampling.arguments or sampling.negative_prompt or networks or (example and example.media))
    check_untouched(pipeline)
    if type(pipeline).__name__ == _FAST and plain and not is_quantized(pipeline.unet) and _is_understood(pipeline):
        return StableDiffusionPolicy(pipeline, **settings)
    return PipelinePolicy(
        pipeline,
        example,
        sampling.num_steps,
        sampling.guidance,
        sampling.arguments,
        sampling.negative_prompt,
        networks=networks,
        **settings,
    )


def _is_understood(pipeline: Any) -> bool:
    parts = [pipeline.components.get(name) for name in ("unet", "vae", "scheduler")]
    if any(part is None for part in parts):
        return False
    name = {"_class_name": type(pipeline.scheduler).__name__}
    return understood(pipeline.unet.config, pipeline.vae.config, pipeline.scheduler.config | name) is not None


def check_untouched(pipeline: Any) -> None:
    """Raises UserError where a live pipeline's networks are no longer as they were loaded: with adapters, or fused."""
    for name, part in pipeline.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        adapters = list(getattr(part, "peft_config", None) or ())
        if adapters:
            raise UserError(
                f"the pipeline's {name} has an adapter ({', '.join(map(str, adapters))}): train it further by its file "
                "(policy.lora), or make it part of the weights: pipeline.fuse_lora(), then pipeline.unload_lora_weights()"
            )
        if any(getattr(module, "fused_projections", False) for module in part.modules()):
            raise UserError(f"the pipeline's {name} has fused projections: call pipeline.unfuse_qkv_projections() first")


def load_policy(
    model: str,
    training: str = "lora",
    lora_rank: int = 4,
    lora_alpha: float | None = None,
    lora_targets: tuple[str, ...] = ("attention",),
    networks: tuple[str, ...] = (),
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
    sampling: SamplingConfig | None = None,
    example: Prompt | None = None,
    gradient_checkpointing: bool = False,
    vae_slicing: bool = False,
    vae_tiling: bool = False,
    lora: Path | None = None,
    reference: str = "start",
    model_config: str | None = None,
    offload_text_encoders: bool = False,
    quantization: str = "none",
) -> Policy:
    """A policy by name, folder, hub id or single file, or by the function that makes it. ``model_config`` is that of
    ``TrainConfig``; the other arguments are those of ``PolicyConfig`` and of ``make_policy``.

    Raises:
        UserError: the model is not there, or cannot be a policy.
    """
    settings = PolicyConfig(  # which checks them
        training=training,  # type: ignore[arg-type]
        networks=networks,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_targets=(lora_targets,) if isinstance(lora_targets, str) else tuple(lora_targets),
        lora=lora,
        reference=reference,  # type: ignore[arg-type]
        gradient_checkpointing=gradient_checkpointing,
        vae_slicing=vae_slicing,
        vae_tiling=vae_tiling,
        offload_text_encoders=offload_text_encoders,
        quantization=quantization,  # type: ignore[arg-type]
        dtype=dtype,  # type: ignore[arg-type]
        device=device,
    )
    steps = sampling.num_steps if sampling else SamplingConfig().num_steps
    if is_code(model):
        own = load_own(model, settings, seed)
        check_policy(own, example or Prompt(""), steps)
        return own
    chosen = devices.choose(device)
    check_quantization(quantization, chosen)
    began = {} if lora is None else {"lora": content_of(find_lora(lora))}
    pipeline, files = _open(model, getattr(torch, dtype), model_config, quantization)
    policy = policy_of(pipeline, settings, model, chosen, seed, sampling, example, files | began)
    check_sound(policy, pipeline, model, steps, example)
    return policy


def policy_of(
    pipeline: Any,
    settings: PolicyConfig,
    model: str,
    device: str,
    seed: int = 0,
    sampling: SamplingConfig | None = None,
    example: Prompt | None = None,
    files: Mapping[str, Any] | None = None,
) -> StableDiffusionPolicy | PipelinePolicy:
    """An open pipeline as a policy with these settings.

    Raises:
        UserError: it cannot be one.
    """
    for wanted, switch in ((settings.vae_slicing, "enable_slicing"), (settings.vae_tiling, "enable_tiling")):
        if wanted:
            save_memory(getattr(pipeline, "vae", None), switch)
    with asking(model):
        policy = make_policy(
            pipeline,
            sampling,
            example,
            settings.networks,
            lora_rank=settings.lora_rank if settings.training == "lora" else None,
            lora_alpha=settings.lora_alpha,
            lora_targets=settings.lora_targets,
            lora=settings.lora,
            reference=settings.reference,
            gradient_checkpointing=settings.gradient_checkpointing,
            offload_text_encoders=settings.offload_text_encoders,
            dtype=getattr(torch, settings.dtype),
            device=device,
            seed=seed,
            source=model,
            files=files,
        )
    policy.settings = settings
    return policy
