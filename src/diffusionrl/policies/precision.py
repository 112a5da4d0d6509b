"""The parts of a pipeline in few bits, and float32 between them."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from diffusionrl.policies.quantization import is_quantized

_NORMS = (torch.nn.GroupNorm, torch.nn.LayerNorm)


def set_precision(part: Any, dtype: torch.dtype, device: torch.device) -> None:
    """A network in ``dtype``, but for an autoencoder; what it gives is float32."""
    is_autoencoder = hasattr(part, "decode")
    wanted = torch.float32 if is_autoencoder else dtype
    if not is_quantized(part) and any(weight.dtype != wanted for weight in part.parameters()):
        part.to(wanted)
    if dtype == torch.float32:
        return
    if is_autoencoder:  # pipelines hand it images and latents in the precision of their other networks
        for name in ("encode", "decode"):
            setattr(part, name, _in_float32(getattr(part, name)))
        return
    _cast_inputs(part, (*_NORMS, torch.nn.Linear) if is_quantized(part) else _NORMS, wanted)
    forward = part.forward

    @wraps(forward)
    def precise(*given: Any, **named: Any) -> Any:
        with torch.autocast(device.type, dtype):
            return _floats(forward(*given, **named))

    part.forward = precise


def _cast_inputs(network: torch.nn.Module, kinds: tuple[type, ...], dtype: torch.dtype) -> None:
    """What autocast leaves undone: in quantised layers, and on the CPU in normalisation, where float32 from another network
    (a ControlNet) meets weights in ``dtype``."""
    for layer in network.modules():
        if isinstance(layer, kinds) and getattr(layer, "weight", None) is not None:
            layer.register_forward_pre_hook(lambda layer, given: (given[0].to(dtype), *given[1:]))


def _in_float32(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*given: Any, **named: Any) -> Any:
        return method(*_floats(given), **_floats(named))

    return call


def _floats(values: Any) -> Any:
    """All tensors of fewer bits in float32."""
    return tree_map(lambda each: each.float() if isinstance(each, Tensor) and each.is_floating_point() else each, values)
