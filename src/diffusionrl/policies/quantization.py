"""A frozen base in few bits, under a LoRA in float32: the denoising networks' linear layers, as diffusers quantises them."""

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import diffusers
import torch

from diffusionrl.errors import UserError, require

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


def check_quantization(quantization: str, device: str) -> None:
    """Raises UserError where its package is missing, or the device is none that it can run on."""
    package = PACKAGES.get(quantization)
    if package is not None and find_spec(package) is None:
        raise UserError(f"policy.quantization {quantization} needs {package}: pip install 'diffusionrl[{quantization}]'")
    if quantization == "nf4" and device == "cpu":
        raise UserError("policy.quantization nf4 needs a GPU, on which bitsandbytes quantises: int8 runs here too")


def quantization_settings(networks: Mapping[str, Any], quantization: str, dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` of each denoising network takes to load it quantised, by name.

    Args:
        networks: a pipeline's, by name: their classes.
        dtype: in which their layers compute.

    Raises:
        UserError: none is one.
    """
    if quantization == "none":
        return {}
    found = {name: _config(quantization, dtype) for name, kind in networks.items() if is_denoiser(kind)}
    require(bool(found), f"policy.quantization: none of {', '.join(networks)} is a network that diffusers quantises")
    return found


def is_denoiser(kind: Any) -> bool:
    """Whether a class is a network of diffusers, and no autoencoder."""
    return isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin) and not hasattr(kind, "decode")


def is_quantized(part: Any) -> bool:
    return bool(getattr(part, "is_quantized", False))


def _config(quantization: str, dtype: torch.dtype) -> Any:
    if quantization == "nf4":
        return diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Int8WeightOnlyConfig

    # peft warns that such layers cannot be merged, which nothing here does.
    warnings.filterwarnings("ignore", message=".*was instantiated without `get_apply_tensor_subclass`")
    return diffusers.TorchAoConfig(Int8WeightOnlyConfig())
