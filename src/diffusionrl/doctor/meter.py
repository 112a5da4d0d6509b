"""Tensors without values, and what a computation on them would hold."""

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_ATEN = torch.ops.aten
_META, _CPU = torch.device("meta"), torch.device("cpu")
_CONVOLUTIONS = (_ATEN.convolution.default, _ATEN.convolution_backward.default)
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu
_OPERATIONS: dict[Any, Any] = {
    **flop_counter.flop_registry,
    _ATTENTION: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q.shape, k.shape, v.shape),  # type: ignore[no-untyped-call]
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, **__: (
        flop_counter.sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)  # type: ignore[no-untyped-call]
    ),
}
_layouts: dict[Any, Any] = {}
"""Of the results of operations that make new tensors, by what they were given: PyTorch takes a millisecond to find them."""


class Shape(Tensor):
    """A tensor on the CPU that has no values, only what PyTorch's meta tensor has that it stands for. What is computed with it
    has none either. (PyTorch's own fake tensors are ten times as slow.)

    Attributes:
        meta: that tensor.
    """

    meta: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, meta: Tensor) -> "Shape":
        made: Shape = torch.Tensor._make_wrapper_subclass(
            cls, meta.size(), meta.stride(), meta.storage_offset(), dtype=meta.dtype, device=_CPU
        )
        made.meta = meta
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on shapes, and on others among them. A value that is asked for is 1."""
    if func is _ATEN._local_scalar_dense.default:
        return 1
    if func is _ATEN.equal.default:
        return True
    given, tree = tree_flatten((args, kwargs))
    key = _key_of(func, given)
    if key in _layouts:
        return _made(_layouts[key])
    metas = [_in_meta(each) for each in given]
    args, kwargs = tree_unflatten(metas, tree)
    results = func(*args, **kwargs)
    layout = None if key is None else _layout_of(results, metas)
    if layout is not None:
        _layouts[key] = layout
        return _made(layout)  # not the results themselves, whose memory may be larger
    owners = {id(meta): own for meta, own in zip(metas, given, strict=True) if isinstance(own, Tensor)}

    def own_or_new(result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        return owners[id(result)] if id(result) in owners else Shape(result)

    return tree_map(own_or_new, results)


def _in_meta(value: Any) -> Any:
    if isinstance(value, Shape):
        return value.meta
    if isinstance(value, Tensor) and not value.is_meta:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=_META)
    return _META if isinstance(value, torch.device) else value


def _key_of(func: Any, given: list[Any]) -> Any:
    """None for an operation in place, or one that gives a view."""
    if any(each.alias_info is not None for each in (*func._schema.arguments, *func._schema.returns)):
        return None
    described = [(each.size(), each.stride(), each.dtype) if isinstance(each, Tensor) else (type(each), each) for each in given]
    return (func, torch.get_default_dtype(), *described)


def _layout_of(results: Any, metas: list[Any]) -> Any:
    """None where there is a result that is no tensor of its own."""
    tensors = results if isinstance(results, tuple | list) else (results,)
    storages = {meta.untyped_storage()._cdata for meta in metas if isinstance(meta, Tensor)}
    for each in tensors:
        if each is not None and (not isinstance(each, Tensor) or each.untyped_storage()._cdata in storages):
            return None
    layouts = [None if each is None else (each.size(), each.stride(), each.dtype) for each in tensors]
    return (type(results), layouts) if isinstance(results, tuple | list) else (None, layouts)


def _made(layout: Any) -> Any:
    kind, layouts = layout
    made = [None if each is None else Shape(torch.empty_strided(*each[:2], dtype=each[2], device=_META)) for each in layouts]
    return made[0] if kind is None else kind(made)


class Meter(TorchDispatchMode):
    """Within it, every operation's results count until they are gone.

    Attributes:
        held: bytes now, of what was made within it.
        peak: the most since ``restart``.
        operations: floating point operations so far, of products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = self.operations = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def restart(self) -> int:
        """Count the peak from here on. Returns what is held."""
        self.peak = self.held
        return self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        shapes = Shape in types or any(isinstance(each, Tensor) and each.is_meta for each in args)
        results = _run(func, args, kwargs) if shapes else func(*args, **kwargs)
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, Tensor):
                self._count(result)
        if func._overloadpacket in _OPERATIONS:
            self.operations += _OPERATIONS[func._overloadpacket](*args, **kwargs, out_val=results)
        if func in _CONVOLUTIONS:
            self.peak = max(self.peak, self.held + _scratch(args, results))
        return results

    def _count(self, tensor: Tensor) -> None:
        storage = (tensor.meta if isinstance(tensor, Shape) else tensor).untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def release(_: Any) -> None:
            self.held -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, release)
        self.held += size
        self.peak = max(self.peak, self.held)


def _scratch(args: Any, results: Any) -> int:
    """What a convolution holds while it runs: unless channels come last, the larger side in a layout of its own. So it is on
    the CPU (oneDNN); what cuDNN takes depends on what it finds to be fast."""
    backward = isinstance(results, tuple)
    given, weight, groups = args[0], args[2 if backward else 1], args[9 if backward else 8]
    made = results[0] if backward else results
    last = given.ndim == 4 and given.is_contiguous(memory_format=torch.channels_last)
    if last or groups > 1 or made is None or math.prod(weight.shape[2:]) == 1:
        return 0
    return int(max(given.nbytes, made.nbytes))
