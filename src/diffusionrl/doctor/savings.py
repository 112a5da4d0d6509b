"""Settings of the policy that are off and would save memory, and how much."""

import torch

from diffusionrl.config import PolicyConfig
from diffusionrl.policies import Policy
from diffusionrl.policies.encoders import encoders_of
from diffusionrl.policies.quantization import is_denoiser, is_quantized

BITS = {"int8": 8.0, "nf4": 4.5}  # a weight, with its share of the scales


def savings(policy: Policy, config: PolicyConfig) -> dict[str, float]:
    """Bytes on the policy's device, by option: of weights and what belongs to them alone, not of activations."""
    parts = getattr(getattr(policy, "pipeline", None), "components", {})
    networks = [part for part in parts.values() if is_denoiser(type(part))]
    weights = [weight for network in networks for weight in network.parameters()]
    frozen = [weight for weight in weights if not weight.requires_grad]
    found: dict[str, float] = {}
    if config.training == "full":
        found["--policy.training lora"] = 3.0 * sum(weight.nbytes for weight in weights)  # gradients, and AdamW's moments
    elif config.quantization == "none":
        kind = "int8" if policy.device.type == "cpu" else "nf4"
        layers = [layer.weight for network in networks for layer in network.modules() if isinstance(layer, torch.nn.Linear)]
        bits = sum(weight.nbytes * 8 - weight.numel() * BITS[kind] for weight in layers if not weight.requires_grad)
        found[f"--policy.quantization {kind}"] = bits / 8
    if config.training == "lora" and config.dtype == "float32" and not any(map(is_quantized, networks)):
        found["--policy.dtype bfloat16"] = sum(weight.nbytes for weight in frozen) / 2
    if not config.offload_text_encoders and policy.device.type != "cpu":
        encoders = encoders_of(parts).values()
        found["--policy.offload-text-encoders"] = sum(weight.nbytes for part in encoders for weight in part.parameters())
    return found
