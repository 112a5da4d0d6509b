"""What a pipeline makes of a prompt, kept per prompt: embeddings, masks, ids, encoded images.

A pipeline's method (``encode_prompt``, ``prepare_latents``) is called for one row at a time, and what it gives is put together
for as many rows as a call has. How that is done is learned from what it gives when it is called for several rows at once:
tensors that then have as many times the rows, and lists that have as many times the entries, are of rows; all else is shared.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from diffusionrl.errors import UserError

Layout = Any
"""Of a method's result: "rows", "blocks" (the first rows of all, then the second ones: a prompt and its negative), "list",
"shared", or of a tuple, a tuple of them."""


class Ragged(Exception):
    """Results of several prompts that do not fit together, such as embeddings of different lengths."""


def learn_layout(singles: Sequence[Any], together: Any) -> Layout:
    """From the results for single rows, and that for all of them at once."""
    first, count = singles[0], len(singles)
    if isinstance(first, Tensor):
        if together.ndim == 0 or len(together) != count * len(first):
            return "shared"
        blocks = put_together("blocks", singles)
        return "blocks" if len(first) > 1 and torch.allclose(blocks.float(), together.float(), atol=1e-4) else "rows"
    if isinstance(first, list) and len(together) == count * len(first):
        return "list"
    if isinstance(first, tuple | list):
        parts = zip(*singles, strict=True)
        return tuple(learn_layout(part, whole) for part, whole in zip(parts, together, strict=True))
    return "shared"


def put_together(layout: Layout, singles: Sequence[Any]) -> Any:
    """The results of single rows as one result.

    Raises:
        Ragged: they do not fit together.
    """
    first = singles[0]
    if layout in ("rows", "blocks"):
        if any(each.shape != first.shape for each in singles):
            raise Ragged
        return torch.cat(list(singles)) if layout == "rows" else torch.stack(list(singles), 1).flatten(0, 1)
    if layout == "list":
        return [entry for each in singles for entry in each]
    if isinstance(layout, tuple):
        if any((each is None) != (own is None) for single in singles for each, own in zip(single, first, strict=True)):
            raise Ragged
        parts = [put_together(part, [each[index] for each in singles]) for index, part in enumerate(layout)]
        return type(first)(parts)
    if isinstance(first, Tensor) and any(each.shape != first.shape for each in singles):
        raise Ragged
    return first


def bytes_in(results: Any) -> int:
    """Of all tensors in it."""
    return sum(each.nbytes for each in tree_leaves(results) if isinstance(each, Tensor))


def find_place(first: Tensor, made: Any) -> int | None:
    """Where in a result the latents are that reached the first step; None: they are the result.

    Raises:
        UserError: they are nowhere in it.
    """
    if isinstance(made, Tensor):
        return None
    found = [
        i for i, each in enumerate(made) if isinstance(each, Tensor) and each.shape == first.shape and torch.equal(each, first)
    ]
    if not found:
        raise UserError(
            "the pipeline cannot be asked where sampling starts: its first step sees other latents than it prepared"
        )
    return found[0]


def replace_leaf(result: Any, place: int | None, value: Tensor) -> Any:
    """A result with another tensor in one place of it; None: it is the tensor itself."""
    if place is None:
        return value
    return type(result)(value if index == place else each for index, each in enumerate(result))
