"""Any diffusers pipeline as a policy. It is asked by calling it (``asking.py``), so nothing here knows a family.

What is trained are the networks that the pipeline's loop calls, found by listening; where the pipeline says for which of its
parts it loads LoRA files, those among them. Adapters run beside their layers, as peft has them, from float32 weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from diffusionrl import processes, seeds
from diffusionrl.data.media import kind_of
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import UserError
from diffusionrl.policies.adapters import (
    Copies,
    add_lora,
    find_lora,
    find_targets,
    load_lora,
    lora_weights,
    save_memory,
    take_lora,
    without_part,
)
from diffusionrl.policies.asking import AskedPipeline
from diffusionrl.policies.base import chunks, describe
from diffusionrl.policies.distilled import distillation
from diffusionrl.policies.encoders import WaitingEncoders, encoders_of, run_on
from diffusionrl.policies.identity import fingerprint_of
from diffusionrl.policies.precision import set_precision
from diffusionrl.policies.trials import Trials
from diffusionrl.transitions import Grid, NoiseLevels

ADAPTER = "adapter_model.safetensors"  # peft's name
_DECODE_BATCH = 16
_SAME_PIXEL = 1e-3  # in [0, 1]
_OF_A_CALL = (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError)
_SIZES = ("height", "width", "num_frames")
_FINE = 200  # steps of the grid that losses draw from


class PipelinePolicy:
    """A pipeline of any family as a policy.

    Args:
        example: a prompt of the kind that will be asked, to try the pipeline with.
        steps: denoising steps of a call.
        guidance: at which it is tried.
        arguments: of every call of the pipeline: height, width, num_frames, and others.
        lora_rank, lora_alpha: of a new adapter; no rank trains the whole networks.
        lora_targets: see ``find_targets``.
        networks: names of the parts that are trained; none named: see above.
        seed: seed of the adapter's initial weights.
        lora: an adapter to go on from, in the place of a new one.
        reference: "start" is the model as training began, "base" the model without any adapter.
        offload_text_encoders: they are on the device only while prompts are embedded.

    Raises:
        UserError: the pipeline cannot be asked, does not take the arguments, or has nothing to train.
    """

    def __init__(
        self,
        pipeline: Any,
        example: Prompt | None = None,
        steps: int = 50,
        guidance: float = 5.0,
        arguments: Mapping[str, Any] | None = None,
        negative_prompt: str | None = None,
        lora_rank: int | None = 4,
        lora_targets: str | Sequence[str] = "attention",
        networks: Sequence[str] = (),
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
        source: str = "<pipeline handed over in Python>",
        gradient_checkpointing: bool = False,
        lora: Path | None = None,
        reference: str = "start",
        files: Mapping[str, Any] | None = None,
        offload_text_encoders: bool = False,
        lora_alpha: float | None = None,
    ) -> None:
        self.source, self.pipeline, self.device, self.dtype = source, pipeline, torch.device(device), dtype
        self._files = files or {}
        switches = {"gradient_checkpointing": gradient_checkpointing, "offload_text_encoders": offload_text_encoders}
        self.settings = describe(lora_rank, lora_alpha, lora_targets, dtype, device, lora, reference, networks, **switches)
        self.example, self._guidance = example or Prompt("a photograph"), guidance
        if lora_rank is None and dtype != torch.float32:
            raise UserError("full fine-tuning needs policy.dtype float32: small updates are lost in bfloat16 weights")
        waiting = encoders_of(pipeline.components) if offload_text_encoders else {}
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
                set_precision(part if name in waiting else part.to(self.device), dtype, self.device)
        run_on(pipeline, self.device)
        encoders = WaitingEncoders(waiting, self.device)
        self.asked = AskedPipeline(pipeline, steps, arguments or {}, negative_prompt, encoders)
        self._grids: dict[int, Grid] = {}
        self._fine: NoiseLevels | None = None
        grid, first, called = self._first_call()
        self._grids[steps] = grid
        self.latent_shape: tuple[int, ...] = tuple(first.shape[1:])
        self._trials = Trials(self.asked, self.example, guidance, grid.levels, self.device, dtype == torch.float32)
        self.asked.ways = self._trials.ways()
        self.edits = self._trials.edits()
        self.sample_shape: tuple[int, ...] = tuple(self.decode(self.start([self.example], [0]), [self.example]).shape[1:])
        self._check_sizes()
        self.sampling_rate: int | None = None
        if len(self.sample_shape) == 2:
            self.sampling_rate = int(pipeline.vae.config.sampling_rate)
        self.networks = self._choose(called, networks)
        self._called = [pipeline.components[name] for name in called]
        if lora is None:
            self._adapted = self._adapt(lora_rank, lora_alpha, lora_targets, seed)
        else:
            load_lora(pipeline, find_lora(lora), source, self.networks)
            self._adapted = [layer for network in self._parts().values() for layer in take_lora(network).values()]
        if gradient_checkpointing:
            for network in self._parts().values():
                save_memory(network, "enable_gradient_checkpointing")
            for part in pipeline.components.values():  # decoders, of which not all can, and not all are differentiated
                if hasattr(part, "decode") and getattr(part, "_supports_gradient_checkpointing", False):
                    part.enable_gradient_checkpointing()
        self.copies, self._start = Copies(self.trainable), Copies(self.trainable)
        if lora is not None and reference == "start":
            self._start.follow("start")

    # What the pipeline can do, found by trying

    def _first_call(self) -> tuple[Grid, Tensor, list[str]]:
        try:
            return self.asked.run_through(self.example, self._guidance)
        except (UserError, torch.OutOfMemoryError):
            raise
        except _OF_A_CALL as error:  # of its own check of what it is given, or for want of one
            given = ", ".join(f"{name} {value!r}" for name, value in self.asked.arguments.items()) or "no arguments"
            raise UserError(
                f"{type(self.pipeline).__name__} refuses a call with {given} (sampling.height, width, num_frames, call): "
                f"{type(error).__name__}: {error}"
            ) from error

    def _check_sizes(self) -> None:
        """A pipeline may round the sizes that it is given."""
        made = dict(zip(("width", "height", "channels", "num_frames"), reversed(self.sample_shape), strict=False))
        for name, asked in self.asked.arguments.items():
            if name in _SIZES and len(self.sample_shape) > 2 and made.get(name, 1) != asked:
                raise UserError(
                    f"sampling.{name} is {asked}, and {type(self.pipeline).__name__} makes {made.get(name, 1)} of it"
                )

    # What is trained

    def _choose(self, called: Sequence[str], asked: Sequence[str]) -> list[str]:
        missing = [name for name in asked if name not in called]
        if missing or not called:
            named = f"{', '.join(missing)}: no such part is called" if missing else "no network of its own is called"
            raise UserError(f"policy.networks: in the loop of {type(self.pipeline).__name__}, {named} ({', '.join(called)})")
        loadable = [name for name in called if name in (getattr(self.pipeline, "_lora_loadable_modules", None) or ())]
        return list(asked) or loadable or list(called)

    def _parts(self) -> dict[str, Any]:
        return {name: self.pipeline.components[name] for name in self.networks}

    def _adapt(self, rank: int | None, alpha: float | None, asked: str | Sequence[str], seed: int) -> list[LoraLayer]:
        if rank is None:
            for network in self._parts().values():
                network.requires_grad_(True)
            return []
        targets = {name: find_targets(network, asked) for name, network in self._parts().items()}
        full = {name: sorted({layer for layers in ends.values() for layer in layers}) for name, ends in targets.items()}
        parts = {f"{name}.{layer}": self._parts()[name].get_submodule(layer) for name in full for layer in full[name]}
        idle = without_part(parts, self._trials.at_both_ends)
        added: list[LoraLayer] = []
        for index, (name, network) in enumerate(self._parts().items()):
            purpose = "lora" if index == 0 else f"lora/{name}"
            used = [layer for layer in full[name] if f"{name}.{layer}" not in idle]
            ends = list(targets[name]) if used == full[name] else used
            added += add_lora(network, rank, ends, seed, purpose, alpha).values()
        return added

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        found: dict[str, torch.nn.Parameter] = {}
        for name, network in self._parts().items():
            own = lora_weights(network) if self._adapted else dict(network.named_parameters())
            found |= {f"{name}.{key}": weight for key, weight in own.items()}
        return found

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Raises UserError under full fine-tuning, which keeps no copy of the original weights."""
        if not self._adapted:
            raise UserError("full fine-tuning keeps no reference model: train a LoRA (policy.training lora)")
        if "start" in self._start:
            with self._start.used("start"):
                yield
            return
        try:
            for layer in self._adapted:
                layer._disable_adapters = True  # enable_adapters would also switch gradients off
            yield
        finally:
            for layer in self._adapted:
                layer._disable_adapters = False

    # The policy

    @cached_property
    def _weights(self) -> str:
        """Of the model before training, if it is asked for before."""
        return fingerprint_of(self.pipeline.components)

    @property
    def about(self) -> dict[str, Any]:
        schedule = self.asked.listener.schedule
        loads_files = hasattr(type(self.pipeline), "save_lora_weights")
        return {
            "pipeline": type(self.pipeline).__name__,
            "scheduler": schedule.name,
            "first_order": schedule.first_order,
            "networks": self.networks,
            "format": "full" if not self._adapted else "lora" if loads_files else "peft",
            "guidance": self.asked.guidance_argument,
            "negative_prompt": self.asked.given_negative_prompt,
            "calls": list(self.asked.ways),
            "arguments": self.asked.arguments,
            "distilled": distillation(self.pipeline, self.source),
            "weights": self._weights,
            **self._files,
            "makes": kind_of(self.sample_shape),
        }

    @property
    def noise_levels(self) -> NoiseLevels:
        if self._fine is None:
            self._fine = self.grid(_FINE).levels
        return self._fine

    def grid(self, num_steps: int) -> Grid:
        if num_steps not in self._grids:
            steps, self.asked.steps = self.asked.steps, num_steps
            try:
                self._grids[num_steps] = self.asked.run_through(self.example, self._guidance)[0]
            finally:
                self.asked.steps = steps
        return self._grids[num_steps]

    def start(self, prompts: Sequence[Prompt], addresses: Sequence[int]) -> Tensor:
        """Raises UserError where latents have another shape than those of the example, which names the prompts."""
        draws = [seeds.address(each, "start") for each in addresses]
        try:
            made = self.asked.start(prompts, draws, self._guidance, self.device).float()
        except RuntimeError:  # which do not fit together either
            for prompt, draw in zip(prompts, draws, strict=True):
                self._check_shape(self.asked.start([prompt], [draw], self._guidance, self.device), prompt)
            raise
        self._check_shape(made, prompts[0])
        return made

    def _check_shape(self, latents: Tensor, prompt: Prompt) -> None:
        shape = tuple(latents.shape[1:])
        if shape != self.latent_shape:
            named = [f"{each.text!r} ({', '.join(map(str, each.media.values()))})" for each in (prompt, self.example)]
            raise UserError(
                f"latents of {named[0]} have the shape {shape}, and those of {named[1]} {self.latent_shape}, as their images "
                "differ in size: give images of one size, or sampling.height and sampling.width where the pipeline takes them"
            )

    def denoise(
        self, x: Tensor, levels: NoiseLevels, prompts: Sequence[Prompt], guidance: float | None
    ) -> tuple[Tensor, Tensor]:
        if guidance is None:
            guidance = self._trials.plain_guidance(self._called)
        levels = levels[torch.arange(len(x), device=x.device)]
        output = self._at_their_times(
            lambda rows, repeats: self.asked.denoise(
                x[rows], levels[rows], [prompts[i] for i in rows.tolist()], guidance, repeats
            ),
            levels,
            guidance,
        )
        return self.asked.listener.schedule.split(output.float(), x, *levels.shaped(x))

    def _at_their_times(self, ask: Callable[[Tensor, int], Tensor], levels: NoiseLevels, guidance: float) -> Tensor:
        times, of = torch.unique(levels.timesteps, return_inverse=True)
        everything = torch.arange(len(levels), device=levels.timesteps.device)
        if len(times) == 1:
            return ask(everything, 1)
        repeats = self._trials.repeats(guidance)
        if repeats:
            return ask(everything, repeats)
        order = torch.argsort(of, stable=True)
        sorted_rows = torch.cat([ask((of == index).nonzero().flatten(), 1) for index in range(len(times))])
        return sorted_rows[torch.argsort(order)]

    @torch.no_grad()
    def after(
        self, y: Tensor, x: Tensor, levels: NoiseLevels, following: NoiseLevels | None, prompts: Sequence[Prompt]
    ) -> Tensor:
        return self.asked.after(y, x, levels, following, prompts, self._guidance).float()

    def decode(self, latents: Tensor, prompts: Sequence[Prompt], gradient: bool = False) -> Tensor:
        with torch.set_grad_enabled(gradient):
            parts = chunks(len(latents), _DECODE_BATCH)
            return torch.cat([self.asked.decode(latents[part], prompts[part], self._guidance).float() for part in parts])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The mean of the VAE's posterior, shifted and scaled as the VAE's settings say. No call of a pipeline makes latents of
        an image, so this is believed only where the pipeline decodes them to what the VAE alone makes of the mean."""
        vae: Any = getattr(self.pipeline, "vae", None)
        scale = getattr(getattr(vae, "config", None), "scaling_factor", None)
        if scale is None or len(self.sample_shape) != 3:
            raise self._cannot_encode()
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scaled = 2 * images.to(self.device) - 1
        try:
            means = torch.cat([vae.encode(scaled[part])[0].mean for part in chunks(len(scaled), _DECODE_BATCH)])
            latents = (means - shift) * scale
            alone, own = vae.decode(means[:1])[0] / 2 + 0.5, self.decode(latents[:1], [self.example])
        except (AttributeError, TypeError, RuntimeError, ValueError) as error:  # another kind of VAE, or of layout
            raise self._cannot_encode() from error
        if own.shape != alone.shape or (own - alone.clamp(0, 1)).abs().max() > _SAME_PIXEL:
            raise self._cannot_encode()
        return latents

    def _cannot_encode(self) -> UserError:
        return UserError(
            f"{type(self.pipeline).__name__} makes no latents of an image that it would decode to the same: its VAE, or the "
            "layout of its latents, is not of the kind of Stable Diffusion's or SD3's. Images from disk need them"
        )

    def shard(self) -> None:
        raise UserError(
            "full fine-tuning on several processes needs Stable Diffusion 1.x or 2.x: train a LoRA (policy.training lora)"
        )

    def export(self, folder: Path) -> None:
        """A LoRA for ``pipe.load_lora_weights(folder)`` where the pipeline has that, or else one a network for
        ``peft.PeftModel.from_pretrained(network, folder / name)``; after full fine-tuning, a folder a network."""
        if not processes.is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not self._adapted:
            for name, network in self._parts().items():
                network.register_to_config(_name_or_path="")  # else the base model's folder on this machine is written down
                network.save_pretrained(folder / name)
            return
        save = getattr(type(self.pipeline), "save_lora_weights", None)
        layers: dict[str, Any] = {}
        for name, network in self._parts().items():
            weights = {key: weight.contiguous() for key, weight in get_peft_model_state_dict(network).items()}
            settings = replace(network.peft_config["default"], inference_mode=True)
            if save is None:
                (folder / name).mkdir(exist_ok=True)
                save_file({f"base_model.model.{key}": weight for key, weight in weights.items()}, folder / name / ADAPTER)
                settings.save_pretrained(folder / name)
                continue
            layers[f"{name}_lora_layers"] = weights
            described = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.to_dict().items()}
            layers[f"{name}_lora_adapter_metadata"] = described
        if save is not None:
            save(folder, **layers)
