"""A pipeline from its settings alone: its networks have every weight's shape, and no weights.

All but the weights, and what is computed with them, is real: tokens, masks, times, whatever a pipeline does between its
networks. What leaves a network is real again, and 1 all over. So a pipeline runs as it is, and no family is known.
"""

import copy
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from diffusionrl.doctor.meter import Shape
from diffusionrl.policies.files import find_class, find_networks, folder_of, left_out, read_index
from diffusionrl.runs.hub import cached_first

_SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja")  # all of a model but its weights


def build_pipeline(model: str, dtype: torch.dtype) -> Any:
    """The pipeline of a folder or a hub id; autoencoders in float32, as they are loaded.

    Raises:
        UserError: there is no such model, or none of diffusers.
        Exception: whatever diffusers and transformers raise of settings that do not fit.
    """
    kind, index = find_class(model), read_index(model)
    parts: dict[str, Any] = left_out(kind, model, index)
    folder = folder_of(model) or Path(cached_first(snapshot_download, model, allow_patterns=list(_SETTINGS)))
    for name, network in find_networks(index, parts).items():
        parts[name] = _without_weights(network, folder / name if (folder / name).is_dir() else folder, dtype)
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False
    return kind.from_pretrained(str(folder), **parts)


def _without_weights(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        if issubclass(kind, PreTrainedModel):
            network = kind(kind.config_class.from_pretrained(folder))
        else:
            network = kind.from_config(kind.load_config(folder))
    is_autoencoder = hasattr(network, "decode")
    network.to = _conversion(network)
    network.to(torch.float32 if is_autoencoder else dtype)
    for name in ("encode", "decode") if is_autoencoder else ("forward",):
        setattr(network, name, _really(getattr(network, name)))
    return network


def _conversion(network: torch.nn.Module) -> Callable[..., torch.nn.Module]:
    """Of precision and layout, and of weights to shapes."""

    def to(*given: Any, **named: Any) -> torch.nn.Module:
        _, dtype, _, layout = torch._C._nn._parse_to(*given, **named)
        done: dict[Tensor, Tensor] = {}  # tied weights stay tied

        def convert(tensor: Tensor) -> Tensor:
            if tensor not in done:
                wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                if layout is not None and tensor.ndim == 4:
                    meta = torch.empty(tensor.shape, dtype=wanted, device="meta", memory_format=layout)
                else:
                    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=wanted, device="meta")
                done[tensor] = Shape(meta)
                if isinstance(tensor, torch.nn.Parameter):
                    done[tensor] = torch.nn.Parameter(done[tensor], tensor.requires_grad)
            return done[tensor]

        for module in network.modules():
            for held in (module._parameters, module._buffers):
                held.update({name: convert(each) for name, each in held.items() if each is not None})
        return network

    return to


def _really(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*given: Any, **named: Any) -> Any:
        return tree_map(_real, method(*given, **named))

    return call


def _real(value: Any) -> Any:
    """Ones in the place of a shape; of an object (a posterior), in the place of those that it has."""
    if isinstance(value, Shape):
        return _Ones.apply(value)
    held = {name: each for name, each in getattr(value, "__dict__", {}).items() if isinstance(each, Shape)}
    if not held:
        return value
    value = copy.copy(value)
    vars(value).update({name: _real(each) for name, each in held.items()})
    return value


class _Ones(torch.autograd.Function):
    """Real ones, whose gradient goes on to the shape."""

    @staticmethod
    def forward(ctx: Any, shape: Tensor) -> Tensor:
        return torch.ones(shape.shape, dtype=shape.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient
