"""Which weights a model has: a run that is taken up must have the same."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def fingerprint_of(parts: Mapping[str, Any]) -> str:
    """Of the weights of a pipeline's networks: of each its name, shape and precision, and the sum of its bits as whole numbers,
    which is the same on any device in any order. Of quantised ones, whose bits may depend on the device, the names alone.

    It reads every weight once: it is asked by runs alone, not by what only samples."""
    digest = hashlib.sha256()
    for part, network in sorted(parts.items()):
        if isinstance(network, torch.nn.Module):
            for name, weight in network.named_parameters():
                if "lora_" in name:  # an adapter's, which training changes
                    continue
                plain = type(weight) is torch.nn.Parameter and type(weight.data) is Tensor
                digest.update(
                    f"{part}.{name} {tuple(weight.shape)} {weight.dtype} {_sum_of(weight) if plain else ''}\n".encode()
                )
    return digest.hexdigest()


def _sum_of(weight: Tensor) -> int:
    """Modulo 2^64."""
    bits = weight.detach().reshape(-1).clone().view(torch.uint8)
    whole = len(bits) // 8 * 8
    return int(bits[:whole].view(torch.int64).sum()) + int(bits[whole:].sum(dtype=torch.int64))
