"""Tensors without values, and what a computation on them would hold."""

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_ATEN = torch.ops.aten
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu.default
_ATTENTION_BACKWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default
_META = torch.device("meta")
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


class Shape(Tensor):
    """A tensor on the CPU that has no values, only what PyTorch's meta tensor has that it stands for. What is computed with it
    has none either. It can be used within a ``Meter`` alone.

    Attributes:
        meta: that tensor.
    """

    meta: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, meta: Tensor) -> "Shape":
        made: Shape = torch.Tensor._make_wrapper_subclass(
            cls, meta.size(), meta.stride(), meta.storage_offset(), dtype=meta.dtype, device="cpu"
        )
        made.meta = meta
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on shapes, and on others among them. A value that is asked for is 1."""
    if func is _ATEN._local_scalar_dense.default:
        return 1
    if func is _ATEN.equal.default:
        return True
    given, tree = tree_flatten((args, kwargs))
    key = _key_of(func, given)
    if key in _RESULTS:
        return _made(_RESULTS[key])
    metas = [_meta_of(each) if isinstance(each, Tensor) else _META if isinstance(each, torch.device) else each for each in given]
    args, kwargs = tree_unflatten(metas, tree)
    results = func(*args, **kwargs)
    layout = None if key is None else _layout_of(results, metas)
    if layout is not None:
        _RESULTS[key] = layout
        return _made(layout)  # not the results themselves, whose memory may be larger
    owners = {id(meta): own for meta, own in zip(metas, given, strict=True) if isinstance(own, Tensor)}

    def shape(result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        own = owners.get(id(result))  # of an operation in place
        return Shape(result) if own is None else own

    if isinstance(results, Tensor):
        return shape(results)
    return tree_map(shape, results)


_RESULTS: dict[Any, Any] = {}
"""Layouts of the results of operations that make new tensors, by the layouts of what they were given: PyTorch takes a
millisecond to find them."""


_CONVOLUTIONS = (_ATEN.convolution.default, _ATEN.convolution_backward.default)


def _scratch(args: Any, results: Any) -> int:
    """What a convolution holds while it runs: unless channels come last, the larger side in a layout of its own. So it is on the
    CPU (oneDNN); what cuDNN takes depends on what it finds to be fast."""
    given, weight = args[0], args[2 if isinstance(results, tuple) else 1]
    made = results[0] if isinstance(results, tuple) else results
    groups = args[9 if isinstance(results, tuple) else 8]
    last = given.ndim == 4 and given.is_contiguous(memory_format=torch.channels_last)
    if last or groups > 1 or made is None or math.prod(weight.shape[2:]) == 1:
        return 0
    return max(given.nbytes, made.nbytes)


def _key_of(func: Any, given: list[Any]) -> Any:
    """None for an operation in place, or one that gives a view."""
    if func not in _PURE:
        schema = func._schema
        _PURE[func] = all(each.alias_info is None for each in (*schema.arguments, *schema.returns))
    if not _PURE[func]:
        return None
    key: list[Any] = [func, torch.get_default_dtype()]
    for each in given:
        if isinstance(each, Tensor):
            key.append((each.size(), each.stride(), each.dtype))
        else:
            key.append((type(each), each))
    return tuple(key)


_PURE: dict[Any, bool] = {}


def _layout_of(results: Any, metas: list[Any]) -> Any:
    """None where a result is none that could be made again by its layout."""
    tensors = results if isinstance(results, tuple | list) else (results,)
    if not all(each is None or isinstance(each, Tensor) for each in tensors):
        return None
    storages = {meta.untyped_storage()._cdata for meta in metas if isinstance(meta, Tensor)}
    if any(each is not None and each.untyped_storage()._cdata in storages for each in tensors):
        return None
    layouts = [None if each is None else (each.size(), each.stride(), each.dtype) for each in tensors]
    return type(results)(layouts) if isinstance(results, tuple | list) else layouts[0]


def _made(layout: Any) -> Any:
    if layout is None:
        return None
    if isinstance(layout, list) or not isinstance(layout[-1], torch.dtype):
        return type(layout)(map(_made, layout))
    size, stride, dtype = layout
    return Shape(torch.empty_strided(size, stride, dtype=dtype, device=_META))


def _meta_of(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Shape):
        return tensor.meta
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=_META)


class Meter(TorchDispatchMode):
    """Within it, every operation's results count until they are gone.

    Attributes:
        held: bytes now, of what was made within it.
        peak: the most since ``restart``.
        operations: floating point operations so far, of products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = self.operations = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def restart(self) -> int:
        """Count the peak from here on. Returns what is held."""
        self.peak = self.held
        return self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if Shape in types or any(isinstance(each, Tensor) and each.is_meta for each in args):
            results = _run(func, args, kwargs)
        else:
            results = func(*args, **kwargs)
        if isinstance(results, Tensor):
            self._count(results)
        elif isinstance(results, tuple | list):
            for result in results:
                if isinstance(result, Tensor):
                    self._count(result)
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            self.operations += counted(*args, **kwargs, out_val=results)
        elif func is _ATTENTION:
            self.operations += sdpa_flop_count(*(each.shape for each in args[:3]))
        elif func is _ATTENTION_BACKWARD:
            self.operations += sdpa_backward_flop_count(*(each.shape for each in args[:4]))
        if func in _CONVOLUTIONS:
            self.peak = max(self.peak, self.held + _scratch(args, results))
        return results

    def _count(self, tensor: Tensor) -> None:
        storage = (tensor.meta if isinstance(tensor, Shape) else tensor).untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def release(_: Any) -> None:
            self.held -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, release)
        self.held += size
        self.peak = max(self.peak, self.held)


class AsOnCard(TorchFunctionMode):
    """Normalisation in float32, where a network runs in few bits: so CUDA's autocast has it, and the CPU's has not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(lambda each: each.float() if isinstance(each, Tensor) else each, (args, kwargs))
        return func(*args, **kwargs)


_IN_FLOAT32 = (torch.nn.functional.group_norm, torch.nn.functional.layer_norm)
