"""What the rest of the package needs of a model, whatever its family."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diffusionrl.transitions import Grid


class Policy(Protocol):
    """A pipeline seen as a policy: it embeds prompts, denoises, and decodes."""

    source: str
    """Where the model came from: what ``load_policy`` was given."""
    device: torch.device
    image_size: int
    """Height and width of an image, in pixels."""
    latent_shape: tuple[int, ...]
    """The shape of one latent, (C, h, w)."""

    num_train_timesteps: int
    """The model was trained at the timesteps 0 ... num_train_timesteps - 1."""

    def noise_level(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of the path at timesteps of training, (B,) each, on the CPU."""
        ...

    def grid(self, num_steps: int) -> Grid:
        """The model's own time grid."""
        ...

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings, (B, L, D), computed once for each prompt."""
        ...

    def denoise(
        self, x: Tensor, timestep: Tensor, alpha: Tensor, sigma: Tensor, embeddings: Tensor, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """Estimates of (x0, noise), float32, with guidance inside.

        Args:
            x: noisy latents, (B, C, h, w), float32.
            timestep: (B,).
            alpha, sigma: the path's coefficients at that time, (B, 1, 1, 1).
            embeddings: (B, L, D).
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], float32, (B, 3, H, W), without gradient."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """The latents of images as ``decode`` makes them, float32, (B, C, h, w), without gradient."""
        ...

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by name, float32."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it, the policy is the model that training began from.

        Raises:
            UserError: it keeps no such model; one whose weights are sharded must not, as the main process measures alone.
        """
        ...

    def shard(self) -> None:
        """Keep a part of the trained weights on each process. Called for full fine-tuning on several, before the first use."""
        ...

    def export(self, folder: Path) -> None:
        """Write what was trained in the format that plain diffusers loads. The main process writes; where the weights are
        sharded, the others are needed too."""
        ...


def chunks(total: int, size: int) -> Iterator[slice]:
    """``range(total)`` in slices of ``size``, the last one shorter if need be."""
    for first in range(0, total, size):
        yield slice(first, min(first + size, total))
