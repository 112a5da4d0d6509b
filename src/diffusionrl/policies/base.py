"""What the rest of the package needs of a model, whatever its family."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusionrl.config import PolicyConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import UserError
from diffusionrl.policies.adapters import Copies
from diffusionrl.transitions import Grid, NoiseLevels


class Policy(Protocol):
    """A pipeline seen as a policy: it denoises, and decodes. It is asked in prompts; what it makes of one (embeddings, masks,
    ids, encoded images) it keeps for itself."""

    source: str
    """Where the model came from: what ``load_policy`` was given."""
    device: torch.device
    settings: PolicyConfig | None
    """What of it is trained and how, for the record; None where no settings say it."""

    @property
    def about(self) -> dict[str, Any]:
        """What env.json says of it, as JSON values: see ``runs.usage``; "weights" is a hash of the model's before training,
        "lora" one of the file that it went on from."""
        ...

    sample_shape: tuple[int, ...]
    """The shape of one sample: (3, H, W) of an image, (F, 3, H, W) of a video, (C, S) of sound; any where ``show`` is given."""
    show: Callable[[Tensor], Tensor] | None
    """Pictures for the report of samples that are no images, videos or sound: (B, *sample_shape), on the CPU, to (B, 3, H, W)
    in [0, 1]. None: they are."""
    sampling_rate: int | None
    """Of sounds, in Hz."""
    latent_shape: tuple[int, ...]
    """The shape of one latent, in the layout that the network's pipeline has: (C, h, w), (L, C), (C, f, h, w) ..."""
    edits: bool
    """Whether the pipeline changes a latent after each step, as inpainting does; see ``after``."""

    @property
    def noise_levels(self) -> NoiseLevels:
        """The levels that losses draw from, uniformly: those of the model's own fine grid."""
        ...

    def grid(self, num_steps: int) -> Grid:
        """The model's own time grid."""
        ...

    def start(self, prompts: Sequence[Prompt], addresses: Sequence[int]) -> Tensor:
        """Where sampling begins, (B, ...), float32: noise, and where the pipeline says so an image under it. What is drawn for
        a sample depends on its prompt and its address (``seeds.address``) alone."""
        ...

    def denoise(
        self, x: Tensor, levels: NoiseLevels, prompts: Sequence[Prompt], guidance: float | None
    ) -> tuple[Tensor, Tensor]:
        """Estimates of (x0, noise), float32, with guidance inside.

        Args:
            x: noisy latents, (B, ...), float32.
            levels: where each of them is, (B,).
            prompts: B of them.
            guidance: as the policy takes it; None: the prediction with the prompt alone.
        """
        ...

    def after(
        self, y: Tensor, x: Tensor, levels: NoiseLevels, following: NoiseLevels | None, prompts: Sequence[Prompt]
    ) -> Tensor:
        """What a pipeline that ``edits`` makes of y, the latents that a step from x gave; all (B, ...), without gradient.

        Args:
            levels: where the step began, the same for all.
            following: where the next one begins; None after the last one.
        """
        ...

    def decode(self, latents: Tensor, prompts: Sequence[Prompt], gradient: bool = False) -> Tensor:
        """Samples, float32, (B, *sample_shape): images and videos in [0, 1].

        Args:
            gradient: from the samples to the latents; else there is none.
        """
        ...

    def encode(self, images: Tensor) -> Tensor:
        """The latents of images as ``decode`` makes them, float32, without gradient.

        Raises:
            UserError: this policy cannot.
        """
        ...

    copies: Copies
    """Older sets of the trained weights; within ``copies.used(name)``, the policy is that older one."""

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


def describe(
    lora_rank: int | None,
    lora_alpha: float | None,
    lora_targets: str | Sequence[str],
    dtype: torch.dtype,
    device: str,
    lora: Path | None,
    reference: str,
    networks: Sequence[str] = (),
    **switches: bool,
) -> PolicyConfig | None:
    """``Policy.settings`` of what a policy was made with; None where a configuration cannot say it."""
    given: dict[str, Any] = {"lora": lora, "reference": reference, "lora_alpha": lora_alpha, **switches}
    if lora_rank is not None:
        given["lora_rank"] = lora_rank
    try:
        return PolicyConfig(
            training="full" if lora_rank is None and lora is None else "lora",
            lora_targets=(lora_targets,) if isinstance(lora_targets, str) else tuple(lora_targets),
            networks=tuple(networks),
            dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
            device=str(device),
            **given,
        )
    except UserError:
        return None


def standard_noise(addresses: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Drawn on the CPU by an address each, (B, *shape), float32."""
    return torch.stack([torch.randn(tuple(shape), generator=torch.Generator().manual_seed(each)) for each in addresses])


def chunks(total: int, size: int) -> Iterator[slice]:
    """``range(total)`` in slices of ``size``, the last one shorter if need be."""
    for first in range(0, total, size):
        yield slice(first, min(first + size, total))
