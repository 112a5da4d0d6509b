"""How a model is sampled, and what of it is trained."""

from dataclasses import dataclass
from typing import Literal

from diffusionrl.errors import require


@dataclass(frozen=True)
class SamplingConfig:
    """How images are sampled, in training and in evaluation."""

    num_steps: int = 50
    """Denoising steps."""
    guidance: float = 5.0
    """Classifier-free guidance scale; 1 switches guidance off. Guidance is part of the policy that is trained."""
    sampler: Literal["ddim", "cps", "precise", "renoise", "ode", "flow_grpo", "dance_grpo"] = "ddim"
    """Row of the table in docs/transitions.md. The flow SDEs need a flow model."""
    eta: float = 1.0
    """Share of fresh noise. 1 with ddim is ancestral sampling; 0 leaves nothing for a policy gradient to use."""
    batch_size: int = 16
    """Images sampled at once: memory and speed, not results."""

    def __post_init__(self) -> None:
        require(self.num_steps >= 1, f"sampling.num_steps must be at least 1, not {self.num_steps}")
        require(self.guidance >= 1, f"sampling.guidance must be at least 1 (1 is off), not {self.guidance}")
        require(self.eta >= 0, f"sampling.eta must not be negative, not {self.eta}")
        require(self.batch_size >= 1, f"sampling.batch_size must be at least 1, not {self.batch_size}")


@dataclass(frozen=True)
class PolicyConfig:
    """Which weights are trained, and in what precision."""

    training: Literal["lora", "full"] = "lora"
    """A LoRA adapter on the UNet, or all of the UNet."""
    lora_rank: int = 4
    """Rank of the adapter; its alpha equals the rank, so the update is not rescaled."""
    lora_targets: Literal["attention", "all"] = "attention"
    """Attention projections, or all projections, convolutions and feed-forward layers of the UNet's blocks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network. Latents, log-probabilities and trained weights are float32 always."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes a GPU if there is one."""

    def __post_init__(self) -> None:
        require(self.lora_rank >= 1, f"policy.lora_rank must be at least 1, not {self.lora_rank}")
        require(
            self.training == "lora" or self.dtype == "float32",
            "policy.training 'full' needs policy.dtype float32: small updates are lost in bfloat16 weights",
        )
