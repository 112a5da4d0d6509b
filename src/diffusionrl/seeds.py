"""Every random number of the package comes from here.

Randomness is addressed, not carried: a draw is named by (run seed, purpose, coordinates) and a stable hash turns that address
into a generator. So a sample depends neither on its batch nor on what was drawn before it, and a checkpoint holds no generator
state. Python's ``hash`` is salted, hence BLAKE2.
"""

import hashlib

import numpy as np
import torch


def address(seed: int, purpose: str, *coordinates: int) -> int:
    """A 63-bit integer that depends on nothing but its arguments."""
    text = "/".join([str(seed), purpose, *map(str, coordinates)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def torch_generator(seed: int, purpose: str, *coordinates: int) -> torch.Generator:
    """A CPU generator: draws are made on the CPU, so they are the same on every device."""
    return torch.Generator().manual_seed(address(seed, purpose, *coordinates))


def numpy_generator(seed: int, purpose: str, *coordinates: int) -> np.random.Generator:
    return np.random.default_rng(address(seed, purpose, *coordinates))


def normal(seed: int, purpose: str, step: int, indices: list[int], shape: tuple[int, ...], *more: int) -> torch.Tensor:
    """Standard normal noise, one independent draw a sample.

    Args:
        indices: global sample indices, one a row.
        shape: the shape of one sample.
        more: further coordinates, such as the denoising step.

    Returns:
        Float32 tensor on the CPU, (len(indices), *shape).
    """
    return torch.stack([torch.randn(shape, generator=torch_generator(seed, purpose, step, i, *more)) for i in indices])
