"""What is trained: LoRA adapters on any network, and older copies of the trained weights."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.errors import UserError
from diffusionrl.paths import expand

ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj"),
    *("to_q_a", "to_kv_a", "qkv", "q_proj", "k_proj", "v_proj"),
)
"""Names of attention projections in diffusers' networks."""
_DOWN = re.compile(r"(lora_A|lora_down|lora\.down)(\.default)?\.weight$")  # of each layer in a file, one
_EVERY = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
REST = ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv")


def find_targets(network: torch.nn.Module, asked: str | Sequence[str]) -> dict[str, list[str]]:
    """Layers that get an adapter: ends of names, and the full names that each of them stands for.

    Args:
        asked: "attention", "all" (feed-forward layers and convolutions too), "every" (whatever their names), or ends of names.

    Raises:
        UserError: a name matches no linear layer or convolution.
    """
    known = {"attention": ATTENTION, "all": ATTENTION + REST}
    every = {name: [name] for name, module in network.named_modules() if isinstance(module, _EVERY)}
    layers = [name for name in every if isinstance(network.get_submodule(name), torch.nn.Linear | torch.nn.Conv2d)]
    found: dict[str, list[str]] = {}
    for entry in (asked,) if isinstance(asked, str) else asked:
        ends = {end: [name for name in layers if f".{name}".endswith(f".{end}")] for end in known.get(entry, (entry,))}
        ends = every if entry == "every" else ends
        if not any(ends.values()):
            last = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers}))
            raise UserError(
                f"policy.lora_targets: {type(network).__name__} has no layer {entry!r}; its layers' names end in {last}; "
                "every takes all of them"
            )
        found |= {end: names for end, names in ends.items() if names}
    return found


def without_part(layers: Mapping[str, torch.nn.Module], run: Callable[[], Tensor]) -> list[str]:
    """Names of the layers that change nothing of what ``run`` gives: those of a last block's context, which is thrown away."""
    device = next(next(iter(layers.values())).parameters()).device
    shifts = {name: torch.zeros((), device=device, requires_grad=True) for name in layers}

    def shifted(shift: Tensor) -> Callable[..., Tensor]:
        def add(module: torch.nn.Module, given: Any, output: Tensor) -> Tensor:
            ramp = torch.linspace(-1, 1, output.shape[1], device=output.device)  # all keys alike, attention stays as it is
            return output + (shift * ramp.view(-1, *[1] * (output.ndim - 2))).to(output.dtype)

        return add

    handles = [layer.register_forward_hook(shifted(shifts[name])) for name, layer in layers.items()]
    try:
        gradients = torch.autograd.grad(run().square().sum(), list(shifts.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, gradient in zip(layers, gradients, strict=True) if gradient is None or not gradient]


def add_lora(
    network: Any, rank: int, targets: Sequence[str], seed: int, purpose: str = "lora", alpha: float | None = None
) -> dict[str, LoraLayer]:
    """A new adapter in float32, its alpha by default its rank: layers by name. Its initial weights depend on the seed alone."""
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets))
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator; its draws are replaced below
        if hasattr(network, "add_adapter"):
            network.add_adapter(config)
        else:
            inject_adapter_in_model(config, network)
    layers = take_lora(network)
    with torch.no_grad():
        for index, layer in enumerate(layers.values()):
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            generator = seeds.torch_generator(seed, purpose, index)
            down.copy_(torch.empty(down.shape).normal_(std=1 / rank, generator=generator))
            up.zero_()
    return layers


def find_lora(path: Path) -> Path:
    """A safetensors file, or that of a folder, under diffusers' or peft's name. Raises UserError where there is none."""
    path = expand(path)
    file = path
    if path.is_dir():
        file = next(
            (path / name for name in (LORA_WEIGHT_NAME_SAFE, SAFETENSORS_WEIGHTS_NAME) if (path / name).is_file()), path
        )
    if file.is_file() and file.suffix.lower() == ".safetensors":
        return file
    asked = f"give a .safetensors file, or a folder with {LORA_WEIGHT_NAME_SAFE} in it"
    if file.is_file():
        raise UserError(
            f"LoRA {path} is there, and is no .safetensors file: convert it once, if you trust it, by the script in the "
            "repository's examples/: python convert_to_safetensors.py"
        )
    if (path / "config.yaml").is_file():
        raise UserError(f"LoRA {path} is a run folder: give {path / 'export'}, or the run as the model")
    if path.is_dir():
        found = sorted(each.name for each in path.glob("*.safetensors"))
        said = f"it holds {', '.join(found[:3])}: name the file" if found else "it holds no .safetensors file"
        raise UserError(f"LoRA {path} is a folder without {LORA_WEIGHT_NAME_SAFE}; {said}")
    raise UserError(f"LoRA {path} was not found: {asked}")


def load_lora(pipeline: Any, file: Path, name: str, networks: Sequence[str] | None = None) -> None:
    """A LoRA file, under diffusers', peft's or kohya's names, as the adapter "default".

    Args:
        name: of the model, for errors.
        networks: parts of the pipeline that it may be for; None: any.

    Raises:
        UserError: the pipeline loads none, the file is of another model, or a part of it matches nothing.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        raise UserError(f"{type(pipeline).__name__} of {name} loads no LoRA file")
    try:
        source: Any = file.parent
        given: dict[str, Any] = {"weight_name": file.name, "use_safetensors": True}
        if (file.parent / CONFIG_NAME).is_file():
            source, given = _from_peft(pipeline, file, networks), {}
        found = type(pipeline).lora_state_dict(source, **given)
        keys = [key for key in (found[0] if isinstance(found, tuple) else found) if _DOWN.search(key)]
        pipeline.load_lora_weights(source, adapter_name="default", **given)
    except Exception as error:  # diffusers and peft raise whatever they come across in a file that is no LoRA of this model
        raise UserError(f"the LoRA of {name} could not be loaded: {type(error).__name__}: {error}") from error
    parts = {key: part for key, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    layers = {key: len(lora_layers(part)) for key, part in parts.items()}
    loaded = sum(layers.values())
    others = [key for key, count in layers.items() if count and networks is not None and key not in networks]
    if others:
        raise UserError(
            f"{file} is for {', '.join(others)} too, and only {', '.join(networks or ())} is trained: take these layers out"
        )
    if loaded < len(keys) or not keys:
        raise UserError(
            f"{file} holds {len(keys)} layers, and {loaded} of them are of {name}: is it a LoRA of another model? It begins "
            f"with {', '.join(keys[:2]) or 'nothing of a LoRA'}"
        )


def _from_peft(pipeline: Any, file: Path, networks: Sequence[str] | None) -> dict[str, Tensor]:
    """A LoRA as peft saves it beside its adapter_config.json, under the names of its network in the pipeline. Its alpha is in
    its weights then: diffusers takes the rank for it."""
    config = LoraConfig.from_pretrained(str(file.parent))
    if config.use_dora:
        raise UserError("it is a DoRA, which is read from diffusers' format alone")
    name = next(each for each in (*(networks or ()), "unet", "transformer") if getattr(pipeline, each, None) is not None)
    found = {}
    for key, weight in load_file(file).items():
        key = key.removeprefix("base_model.model.")
        if key.endswith("lora_B.weight"):
            layer, rank = key.removesuffix(".lora_B.weight"), weight.shape[1]
            alpha = next((a for end, a in config.alpha_pattern.items() if layer.endswith(end)), config.lora_alpha)
            weight = weight * (alpha / (rank**0.5 if config.use_rslora else rank))
        found[f"{name}.{key}"] = weight
    return found


def take_lora(network: torch.nn.Module) -> dict[str, LoraLayer]:
    """The layers of an adapter, by name, to be trained in float32."""
    layers = lora_layers(network)
    for layer in layers.values():
        for part in (layer.lora_A, layer.lora_B):
            part["default"].float().requires_grad_(True)
    return layers


def lora_layers(network: torch.nn.Module) -> dict[str, LoraLayer]:
    """By name, those that hold the adapter "default"."""
    found = {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}
    return {name: layer for name, layer in found.items() if "default" in layer.lora_A}


class Copies:
    """Older sets of the trained weights, by name: exponential averages, or the weights of some step.

    Args:
        trainable: gives the trained parameters by name.
    """

    def __init__(self, trainable: Callable[[], Mapping[str, Tensor]]) -> None:
        self._trainable = trainable
        self._sets: dict[str, dict[str, Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._sets

    @torch.no_grad()
    def follow(self, name: str, decay: float = 0.0) -> None:
        """decay * copy + (1 - decay) * weights; a copy that is not there begins as the weights are."""
        weights = self._trainable()
        if name not in self._sets:
            self._sets[name] = {key: weight.detach().clone() for key, weight in weights.items()}
            return
        for key, weight in weights.items():
            self._sets[name][key].lerp_(weight.detach(), 1 - decay)

    @contextmanager
    def used(self, name: str) -> Iterator[None]:
        """Within it, the trained weights are the copy's. Only without gradient: they are exchanged in place.

        Raises:
            KeyError: there is no such copy.
        """
        self._exchange(self._sets[name])
        try:
            yield
        finally:
            self._exchange(self._sets[name])

    def _exchange(self, copy: Mapping[str, Tensor]) -> None:
        for key, weight in self._trainable().items():
            before = weight.data.clone()
            weight.data.copy_(copy[key])
            copy[key].copy_(before)

    def tensors(self) -> dict[str, Tensor]:
        """Of all copies, "COPY/PARAMETER"."""
        return {f"{name}/{key}": tensor for name, tensors in self._sets.items() for key, tensor in tensors.items()}

    def load(self, tensors: Mapping[str, Tensor], like: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Be as when ``tensors`` was called. ``like`` puts a tensor where a parameter is.

        Raises:
            ValueError: they are of other parameters.
        """
        weights = self._trainable()
        self._sets = {}
        for full, tensor in tensors.items():
            name, _, key = full.partition("/")
            if key not in weights or (tensor.shape, tensor.dtype) != (weights[key].shape, weights[key].dtype):
                raise ValueError(f"{full} is {tuple(tensor.shape)} of {tensor.dtype}, and of no parameter that is so")
            self._sets.setdefault(name, {})[key] = like(weights[key], tensor.clone())


@contextmanager
def switched_off(layers: Iterable[LoraLayer]) -> Iterator[None]:
    """Without what these adapters add."""
    layers = list(layers)
    try:
        for layer in layers:
            layer._disable_adapters = True  # enable_adapters would also switch gradients off
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def save_lora(network: Any, folder: Path) -> None:
    """An adapter as ``peft.PeftModel.from_pretrained(network, folder)`` takes it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"base_model.model.{key}": each.contiguous() for key, each in get_peft_model_state_dict(network).items()}
    save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME)
    replace(network.peft_config["default"], inference_mode=True).save_pretrained(folder)


def lora_weights(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's trained parameters by name."""
    return {name: weight for name, weight in network.named_parameters() if ".lora_" in name}


def save_memory(network: Any, switch: str) -> None:
    """Call ``network.enable_gradient_checkpointing()`` and the like. Raises UserError where there is no such method."""
    try:
        getattr(network, switch)()
    except (AttributeError, ValueError) as error:  # ValueError: diffusers', of a network that has no checkpoints
        raise UserError(f"{type(network).__name__} has no {switch}: leave that setting off ({error})") from error
