"""A pipeline from its settings alone: its networks have every weight's shape, and no weights.

All but the weights, and what is computed with them, is real: tokens, masks, times, whatever a pipeline does between its
networks. What leaves a network is real again, and 1 all over. So a pipeline runs as it is, and no family is known.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from diffusionrl.doctor.meter import Meter, Shape
from diffusionrl.policies.files import find_class, find_networks, folder_of, left_out, read_index
from diffusionrl.runs.hub import cached_first

_SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja")  # all of a model but its weights


def build_pipeline(model: str, dtype: torch.dtype, meter: Meter, on_card: bool) -> Any:
    """The pipeline of a folder or a hub id; autoencoders in float32, as they are loaded.

    Args:
        on_card: networks in few bits normalise in float32, as CUDA's autocast has it and the CPU's has not.

    Raises:
        UserError: there is no such model, or none of diffusers.
        Exception: whatever diffusers and transformers raise of settings that do not fit.
    """
    kind, index = find_class(model), read_index(model)
    parts: dict[str, Any] = left_out(kind, model, index)
    folder = folder_of(model) or Path(cached_first(snapshot_download, model, allow_patterns=list(_SETTINGS)))
    for name, network in find_networks(index, parts).items():
        parts[name] = _without_weights(network, folder / name if (folder / name).is_dir() else folder, dtype)
        if on_card:
            _normalise_in_float32(parts[name])
        for method in ("encode", "decode") if hasattr(parts[name], "decode") else ("forward",):
            setattr(parts[name], method, _Answers(parts[name], getattr(parts[name], method), meter))
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False
    return kind.from_pretrained(str(folder), **parts)


def _without_weights(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        if issubclass(kind, PreTrainedModel):
            network = kind(kind.config_class.from_pretrained(folder))
        else:
            network = kind.from_config(kind.load_config(folder))
    network.to = _conversion(network)
    network.to(torch.float32 if hasattr(network, "decode") else dtype)
    return network


def _normalise_in_float32(network: torch.nn.Module) -> None:
    def precise(layer: torch.nn.Module, given: Any) -> Any:
        return (given[0].float(), *given[1:]) if torch.is_autocast_enabled("cpu") else None

    for layer in network.modules():
        if isinstance(layer, torch.nn.GroupNorm | torch.nn.LayerNorm):
            layer.register_forward_pre_hook(precise)


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
                for name, each in held.items():
                    if each is not None:
                        held[name] = convert(each)  # type: ignore[assignment]
        return network

    return to


class _Answers:
    """A network's method, whose results are real. Without gradient, what it gave and held for tensors of some shapes is kept,
    and given again: large networks are asked many times alike."""

    def __init__(self, network: torch.nn.Module, method: Callable[..., Any], meter: Meter) -> None:
        update_wrapper(self, method)
        self._network, self._method, self._meter = network, method, meter
        self._known: dict[Any, tuple[Any, int, int]] = {}

    def __call__(self, *given: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            return tree_map(_real, self._method(*given, **named))
        meter, key = self._meter, (len(list(self._network.parameters())), repr(tree_map(_described, (given, named))))
        if key not in self._known:
            before, operations, peak = meter.held, meter.operations, meter.peak
            meter.restart()
            made = self._method(*given, **named)
            described = tree_map(_described, made)
            held, meter.peak = meter.peak - before, max(meter.peak, peak)
            if not all(isinstance(each, _Described | str | int | float | None) for each in tree_leaves(described)):
                return tree_map(_real, made)
            self._known[key] = described, held, meter.operations - operations
        else:
            described, held, operations = self._known[key]
            meter.peak = max(meter.peak, meter.held + held)
            meter.operations += operations
        return tree_map(
            lambda each: torch.ones(each.shape, dtype=each.dtype) if isinstance(each, _Described) else each, described
        )


@dataclass(frozen=True)
class _Described:
    shape: torch.Size
    dtype: torch.dtype


def _described(value: Any) -> Any:
    return _Described(value.shape, value.dtype) if isinstance(value, Tensor) else value


def _real(value: Any) -> Any:
    """Ones in the place of a shape; of an object (a posterior), in the place of those that it has."""
    if isinstance(value, Shape):
        return _Ones.apply(value)  # type: ignore[no-untyped-call]
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
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
