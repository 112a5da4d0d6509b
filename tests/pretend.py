"""A device that is not the CPU, on the CPU: what is on the wrong one shows where no GPU is.

``pretend:0`` is PyTorch's Python backend for private devices. Its tensors wrap the CPU's own, so numbers are those of the CPU.
As on CUDA, mixing them with CPU tensors of one or more dimensions raises, ``.numpy()`` raises, and so does a CPU generator that
is asked for numbers there. It does not show kernels, memory, speed or streams.

Stricter than CUDA: a CPU index into a tensor there raises, and what is assigned to ``parameter.data`` does not arrive.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from diffusionrl import devices

NAME = "pretend"
_aten = torch.ops.aten
_BETWEEN_DEVICES = {_aten._to_copy.default, _aten.copy_.default}


class Backend:
    """``torch.pretend``: what torch, and code for CUDA, ask of a device's module."""

    here = False

    @classmethod
    def is_available(cls) -> bool:
        return cls.here

    is_initialized = is_available

    @classmethod
    def device_count(cls) -> int:
        return int(cls.here)

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_device_name(device: object = None) -> str:
        return NAME

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def synchronize(device: object = None) -> None: ...

    empty_cache = manual_seed_all = set_device = reset_peak_memory_stats = set_rng_state = synchronize

    @staticmethod
    def get_rng_state(device: object = None) -> Tensor:
        return torch.empty(0)

    @staticmethod
    def memory_reserved(device: object = None) -> int:
        return 1 << 20

    max_memory_reserved = memory_allocated = max_memory_allocated = memory_reserved

    @staticmethod
    def mem_get_info(device: object = None) -> tuple[int, int]:
        return 1 << 34, 1 << 35


class Pretend(Tensor):
    """A tensor there; ``own`` holds its values."""

    own: Tensor

    @staticmethod
    def __new__(cls, own: Tensor) -> "Pretend":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            own.size(),
            strides=own.stride(),
            storage_offset=own.storage_offset(),
            dtype=own.dtype,
            layout=own.layout,
            device=f"{NAME}:0",
            requires_grad=False,
        )
        made.own = own
        return made

    def __repr__(self, **named: object) -> str:  # type: ignore[override]
        return f"Pretend({self.own!r})"

    def tolist(self) -> Any:
        return self.own.tolist()

    @classmethod
    def __torch_dispatch__(cls, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(call, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees the calls without any tensor, such as ``torch.randn(device=...)``; in its own thread alone."""

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = _is_there(kwargs.get("device")) or any(isinstance(each, Pretend) for each in leaves(args, kwargs))
        return _run(call, args, kwargs) if there else call(*args, **kwargs)


def leaves(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """What a call was given; of lists, what is in them. PyTorch's own way takes longer than the call."""
    found: list[Any] = []
    for each in (*args, *kwargs.values()):
        if isinstance(each, list | tuple):
            found.extend(each)
        else:
            found.append(each)
    return found


def _own(value: Any) -> Any:
    """What the CPU has for it, of lists in the places of their items."""
    if isinstance(value, Pretend):
        return value.own
    return type(value)(map(_own, value)) if isinstance(value, list | tuple) else value


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(call: Any, args: Any, kwargs: Any) -> Any:
    tensors = [each for each in leaves(args, kwargs) if isinstance(each, Tensor)]
    inside = [each for each in tensors if isinstance(each, Pretend)]
    outside = [each for each in tensors if not isinstance(each, Pretend) and each.ndim > 0]
    device = kwargs.get("device")
    if inside and outside and call not in _BETWEEN_DEVICES:
        shapes = [[tuple(each.shape) for each in part] for part in (inside, outside)]
        raise RuntimeError(f"{call}: tensors on two devices, {NAME} {shapes[0]} and cpu {shapes[1]}")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu" and (inside or _is_there(device)):
        raise RuntimeError(f"{call}: a generator of the cpu cannot draw on {NAME}")
    if call is _aten._fused_sdp_choice.default:
        return 0  # attention by plain mathematics
    there = bool(inside) if device is None else _is_there(device)
    if call is _aten.copy_.default:
        there = isinstance(args[0], Pretend)
    own_kwargs = {key: _own(value) for key, value in kwargs.items()}
    found = call(*map(_own, args), **(own_kwargs if device is None else own_kwargs | {"device": "cpu"}))
    if not there or call is _aten._local_scalar_dense.default:
        return found
    found = Pretend(found) if isinstance(found, Tensor) else tree_map_only(Tensor, Pretend, found)
    return return_and_correct_aliasing(call, args, kwargs, found) if inside else found


def _empty(size: Sequence[int], *, dtype: torch.dtype | None = None, **ignored: object) -> Pretend:
    return Pretend(torch.empty(size, dtype=dtype))


def _empty_strided(
    size: Sequence[int], stride: Sequence[int], *, dtype: torch.dtype | None = None, **ignored: object
) -> Pretend:
    return Pretend(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, to: Pretend, non_blocking: bool = False) -> Pretend:
    to.own.copy_(source.own if isinstance(source, Pretend) else source)
    return to


def _lowered(call: Any) -> Callable[..., Any]:
    """What autocast makes of a product."""

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)
        args, kwargs = tree_map_only(Tensor, lambda each: each.to(dtype) if each.is_floating_point() else each, (args, kwargs))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return call(*args, **kwargs)

    return run


def _register() -> list[torch.library.Library]:
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend)
    own = torch.library.Library("aten", "IMPL")
    calls: dict[str, Callable[..., Any]] = {
        "empty.memory_format": _empty,
        "empty_strided": _empty_strided,
        "_copy_from": _copy_from,
        "_local_scalar_dense": lambda value: value.own.item(),
    }
    for name, call in calls.items():
        own.impl(name, call, "PrivateUse1")
    for name in ("linear", "matmul", "mm", "addmm", "bmm", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention"):
        own.impl(name, _lowered(getattr(torch.ops.aten, name)), "AutocastPrivateUse1")
    every = torch.library.Library("_", "IMPL")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return [own, every]


_LIBRARIES = _register()  # which last as long as they are held


@contextmanager
def best_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Inside, ``pretend`` is the best device there is."""
    monkeypatch.setattr(devices, "KINDS", (NAME, "cpu"))
    monkeypatch.setattr(Backend, "here", True)
    shared = safetensors.torch._find_shared_tensors

    def find_shared(tensors: dict[str, Tensor]) -> Any:  # before it brings them to the CPU, as those of any device
        return shared({name: each.own if isinstance(each, Pretend) else each for name, each in tensors.items()})

    monkeypatch.setattr(safetensors.torch, "_find_shared_tensors", find_shared)
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # as module.to needs it
    try:
        with _Mode():
            yield torch.device(f"{NAME}:0")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapped)
