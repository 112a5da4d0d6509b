"""A torch network of one's own as a policy: ``network(x, time, condition) -> prediction``. docs/own_model.md says how."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_model
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from diffusionrl import devices, processes
from diffusionrl.config import PolicyConfig
from diffusionrl.data.media import Show, kind_of
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import UserError, describe, require
from diffusionrl.policies.adapters import Copies, add_lora, find_targets, lora_weights, save_lora, switched_off
from diffusionrl.policies.base import standard_noise
from diffusionrl.policies.identity import fingerprint_of
from diffusionrl.policies.precision import set_precision
from diffusionrl.transitions import Grid, NoiseLevels, Prediction, to_x0_and_noise

_PIPELINES_ALONE = ("networks", "lora", "reference", "vae_slicing", "vae_tiling", "offload_text_encoders", "quantization")


def _nothing(prompts: Sequence[Prompt]) -> None:
    """The condition of a network that takes none."""


class NetworkPolicy:
    """A network as a policy. All of its weights are trained, or a LoRA beside its linear layers and convolutions.

    Args:
        network: called with latents (B, *latent_shape), times (B,), both float32, and a condition; returns (B, *latent_shape).
            It is put on the device, and in evaluation mode.
        path: number of steps -> time grid; what the grid calls ``timesteps`` is what the network is told. ``flow_grid``,
            ``partial(variance_preserving_grid, alphas_cumprod)``, ``karras_grid``, or a function of your own.
        prediction: what the network returns: "epsilon" (the noise), "v_prediction" (alpha * noise - sigma * x0), "sample" (x0),
            or "flow" (the velocity noise - x0, on a linear path).
        latent_shape: of one latent.
        condition: prompts -> the network's third argument, for so many samples: a tensor (B, ...), or several in a list, tuple
            or dict, which are put on the device; or what you like. Called at every step, without gradient.
        decode: latents -> samples; by default they are the samples.
        show: pictures of samples that are no images, videos or sound; see ``Policy.show``.
        encode: images -> latents, for losses on images from disk; by default there is none, but where nothing is decoded.
        unconditional: the prompt that classifier-free guidance leads away from; without one there is no guidance.
        sampling_rate: of sounds, in Hz.
        noise_levels: how many of them losses draw from: those of so many steps.
        settings: which weights are trained, and where.
        seed: of a LoRA's initial weights.
        source: a name for it.

    Raises:
        UserError: the path, the samples or the settings are not for such a policy.
    """

    edits = False

    def __init__(
        self,
        network: torch.nn.Module,
        path: Callable[[int], Grid],
        prediction: Prediction,
        latent_shape: Sequence[int],
        condition: Callable[[Sequence[Prompt]], Any] = _nothing,
        decode: Callable[[Tensor], Tensor] | None = None,
        show: Show | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
        unconditional: Prompt | None = None,
        sampling_rate: int | None = None,
        noise_levels: int = 200,
        settings: PolicyConfig | None = None,
        seed: int = 0,
        source: str = "<network handed over in Python>",
    ) -> None:
        self.settings: PolicyConfig | None = settings or PolicyConfig(lora_targets=("every",))
        asked, default = self.settings, {field.name: field.default for field in fields(PolicyConfig)}
        for name in _PIPELINES_ALONE:
            require(getattr(asked, name) == default[name], f"policy.{name} is for diffusers pipelines: leave it out")
        self.source, self.device = source, torch.device(devices.choose(asked.device))
        self.grid, self.prediction, self.latent_shape = path, prediction, tuple(latent_shape)
        self.noise_levels: NoiseLevels = path(noise_levels).levels
        if prediction == "flow" and not self.noise_levels.linear:
            raise UserError("the prediction 'flow' is a velocity on a linear path, alpha = 1 - sigma, and this path is none")
        self.network = network.requires_grad_(False).eval().to(self.device)
        set_precision(self.network, getattr(torch, asked.dtype), self.device)
        self._condition, self._unconditional, self._checkpoints = condition, unconditional, asked.gradient_checkpointing
        self._decode, self._encode, self.show, self.sampling_rate = decode, encode, show, sampling_rate
        self._adapted: list[LoraLayer] = []
        if asked.training == "full":
            network.requires_grad_(True)
        else:
            targets = list(find_targets(network, asked.lora_targets))
            self._adapted = list(add_lora(network, asked.lora_rank, targets, seed, alpha=asked.lora_alpha).values())
        self.copies = Copies(self.trainable)
        self.sample_shape: tuple[int, ...] = self._try_to_decode()
        known = len(self.sample_shape) in (3, 4) and self.sample_shape[-3] == 3
        require(
            show is not None or known or (len(self.sample_shape) == 2 and sampling_rate is not None),
            f"samples of the shape {self.sample_shape} are no images (3, H, W), videos (F, 3, H, W), or sound (C, S) with a "
            "sampling_rate: give show, which makes pictures (B, 3, H, W) of them",
        )

    def _try_to_decode(self) -> tuple[int, ...]:
        """The shape of a sample. Raises UserError where decode fails."""
        start = self.start([Prompt("")], [0])
        try:
            return tuple(self.decode(start, [Prompt("")]).shape[1:])
        except Exception as error:  # whatever it raises is the answer
            raise UserError(f"decode fails on latents {tuple(start.shape)} on {self.device}: {describe(error)}") from error

    @cached_property
    def _weights(self) -> str:
        """Of the model before training, if it is asked for before."""
        return fingerprint_of({"network": self.network})

    @property
    def about(self) -> dict[str, Any]:
        lora = bool(self._adapted)
        peft = ["from peft import PeftModel", "network = PeftModel.from_pretrained(network, EXPORT)"]
        plain = ["from pathlib import Path", "from safetensors.torch import load_model"]
        return {
            "network": type(self.network).__name__,
            "format": "lora" if lora else "full",
            "weights": self._weights,
            "makes": "sample" if self.show else kind_of(self.sample_shape),
            "loading": peft if lora else [*plain, 'load_model(network, Path(EXPORT) / "model.safetensors")'],
        }

    def start(self, prompts: Sequence[Prompt], addresses: Sequence[int]) -> Tensor:
        return standard_noise(addresses, self.latent_shape).to(self.device)

    def denoise(
        self, x: Tensor, levels: NoiseLevels, prompts: Sequence[Prompt], guidance: float | None
    ) -> tuple[Tensor, Tensor]:
        output = self._predict(x, levels, prompts)
        if self._unconditional is not None and guidance not in (None, 1.0):
            without = self._predict(x, levels, [self._unconditional] * len(prompts))
            output = without + guidance * (output - without)
        return to_x0_and_noise(self.prediction, output, x, *levels.shaped(x))

    def _predict(self, x: Tensor, levels: NoiseLevels, prompts: Sequence[Prompt]) -> Tensor:
        with torch.no_grad():
            condition = tree_map(lambda each: each.to(x.device) if isinstance(each, Tensor) else each, self._condition(prompts))
        inputs = (x, devices.handed(levels.timesteps, x.device), condition)
        remade = self._checkpoints and torch.is_grad_enabled()
        output: Tensor = checkpoint(self.network, *inputs, use_reentrant=False) if remade else self.network(*inputs)
        told = f"the network gives {tuple(output.shape)} for latents {tuple(x.shape)}: it has to give as many numbers"
        require(output.shape == x.shape, told)
        return output.float()

    def after(
        self, y: Tensor, x: Tensor, levels: NoiseLevels, following: NoiseLevels | None, prompts: Sequence[Prompt]
    ) -> Tensor:
        return y

    def decode(self, latents: Tensor, prompts: Sequence[Prompt], gradient: bool = False) -> Tensor:
        with torch.set_grad_enabled(gradient):
            return latents if self._decode is None else self._decode(latents).float()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        if self._decode is None:
            return images.to(self.device)
        if self._encode is None:
            raise UserError("this network has no encode, which makes latents of images from disk: give one to NetworkPolicy")
        return self._encode(images.to(self.device)).float()

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return lora_weights(self.network) if self._adapted else dict(self.network.named_parameters())

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Raises UserError under full fine-tuning, which keeps no copy of the original weights."""
        if not self._adapted:
            raise UserError("full fine-tuning keeps no reference model: train a LoRA (policy.training lora)")
        with switched_off(self._adapted):
            yield

    def shard(self) -> None:
        raise UserError("a network of one's own is not sharded: on several processes train a LoRA (policy.training lora)")

    def export(self, folder: Path) -> None:
        """A LoRA for ``peft.PeftModel.from_pretrained(network, folder)``; after full fine-tuning, ``model.safetensors`` for
        ``safetensors.torch.load_model(network, file)``."""
        if not processes.is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self._adapted:
            save_lora(self.network, folder)
        else:
            save_model(self.network, str(folder / "model.safetensors"))
