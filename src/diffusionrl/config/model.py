"""How a model is sampled, and what of it is trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusionrl.config.checks import check_values
from diffusionrl.config.files import parse_yaml
from diffusionrl.errors import UserError, require


@dataclass(frozen=True)
class SamplingConfig:
    """How images are sampled, in training and in evaluation."""

    num_steps: int = 50
    """Denoising steps."""
    guidance: float = 5.0
    """Guidance scale, as the pipeline takes it: classifier-free (1 switches it off), or embedded. It is part of the policy that
    is trained. docs/models.md says where it is odd."""
    sampler: Literal["ddim", "cps", "precise", "renoise", "ode", "flow_grpo", "dance_grpo"] = "ddim"
    """Row of the table in docs/transitions.md. The flow SDEs need a flow model."""
    eta: float = 1.0
    """Share of fresh noise. 1 with ddim is ancestral sampling; 0 leaves nothing for a policy gradient to use."""
    batch_size: int = 16
    """Images sampled at once: memory and speed, not results."""
    height: int | None = None
    """Pixels; by default the pipeline's own."""
    width: int | None = None
    num_frames: int | None = None
    """Of a video; by default the pipeline's own."""
    negative_prompt: str | None = None
    """What guidance leads away from; by default what the pipeline takes, which is an empty text."""
    call: tuple[str, ...] = ()
    """Other arguments of the pipeline's call, KEY=VALUE each, such as max_sequence_length=256; values are read as YAML."""

    def __post_init__(self) -> None:
        check_values(self, "sampling.")
        require(self.num_steps >= 1, f"sampling.num_steps must be at least 1, not {self.num_steps}")
        require(self.guidance >= 0, f"sampling.guidance must not be negative, not {self.guidance}")
        require(self.eta >= 0, f"sampling.eta must not be negative, not {self.eta}")
        require(self.batch_size >= 1, f"sampling.batch_size must be at least 1, not {self.batch_size}")
        for what in ("height", "width", "num_frames"):
            value = getattr(self, what)
            require(value is None or value >= 1, f"sampling.{what} must be at least 1, not {value}")
        _ = self.arguments

    @property
    def arguments(self) -> dict[str, Any]:
        """Of every call of the pipeline. Raises UserError for an entry of ``call`` that cannot be read."""
        sizes = {"height": self.height, "width": self.width, "num_frames": self.num_frames}
        found = {name: value for name, value in sizes.items() if value is not None}
        for entry in self.call:
            name, equals, value = entry.partition("=")
            require(bool(equals) and name.isidentifier(), f"sampling.call: {entry!r} is not KEY=VALUE")
            require(name not in _TAKEN, f"sampling.call: {name} is set by {_TAKEN.get(name)}")
            try:
                found[name] = parse_yaml(value)
            except ValueError as error:
                raise UserError(f"sampling.call: the value of {entry!r} cannot be read as YAML: {error}") from error
        return found


_TAKEN = {
    "prompt": "prompts",
    "num_inference_steps": "sampling.num_steps",
    "guidance_scale": "sampling.guidance",
    "true_cfg_scale": "sampling.guidance",
    "negative_prompt": "sampling.negative_prompt",
    "height": "sampling.height",
    "width": "sampling.width",
    "num_frames": "sampling.num_frames",
    **dict.fromkeys(("generator", "latents", "output_type", "return_dict", "timesteps", "sigmas"), "diffusionrl itself"),
    **dict.fromkeys(("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"), "samples_per_prompt"),
}
"""Arguments of a pipeline that are not for ``call``, and what sets them."""


@dataclass(frozen=True)
class PolicyConfig:
    """Which weights are trained, and in what precision."""

    training: Literal["lora", "full"] = "lora"
    """A LoRA adapter on the network, or all of it."""
    networks: tuple[str, ...] = ()
    """Which parts of the pipeline are trained, such as transformer_2; none named: those that its loop calls, and of these the
    ones that it loads LoRA files for, if there are any."""
    lora_rank: int = 4
    """Rank of the adapter."""
    lora_alpha: float | None = None
    """What the adapter adds is multiplied by alpha / rank; None: the rank, so by 1."""
    lora_targets: tuple[str, ...] = ("attention",)
    """"attention" (attention projections of every kind), "all" (feed-forward layers and convolutions of the blocks too),
    "every" (all linear layers and convolutions, whatever their names), or ends of the names of layers."""
    lora: Path | None = None
    """Go on from a LoRA: a .safetensors file, or a folder that holds one. Its rank, alpha and layers are kept."""
    reference: Literal["start", "base"] = "start"
    """What the policy is compared with: the model as training began, with that LoRA; or without it."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: a third slower, and a fraction of the memory."""
    vae_slicing: bool = False
    """Decode one sample after the other."""
    vae_tiling: bool = False
    """Decode a sample tile by tile, which may show where they meet."""
    offload_text_encoders: bool = False
    """They wait in main memory, and are on the GPU only while prompts are embedded that were not seen before."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Of what a LoRA leaves as it is: linear layers of the denoising networks, in 8 bits by torchao or in 4 by bitsandbytes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network. Latents, log-probabilities and trained weights are float32 always."""
    device: str = "auto"
    """cuda, mps or cpu; "auto" takes the first of them that is here."""

    def __post_init__(self) -> None:
        check_values(self, "policy.")
        require(self.lora_rank >= 1, f"policy.lora_rank must be at least 1, not {self.lora_rank}")
        require(self.lora_alpha is None or self.lora_alpha > 0, f"policy.lora_alpha must be positive, not {self.lora_alpha}")
        require(
            self.lora_alpha is None or (self.training == "lora" and self.lora is None),
            "policy.lora_alpha is of a new adapter: leave it out with policy.lora, whose own is kept, and in full fine-tuning",
        )
        require(
            self.training == "lora" or self.dtype == "float32",
            "policy.training 'full' needs policy.dtype float32: small updates are lost in bfloat16 weights",
        )
        require(
            self.training == "lora" or self.quantization == "none",
            "policy.training 'full' needs policy.quantization none: weights in few bits cannot be trained",
        )
        require(
            self.training == "lora" or self.lora is None, "policy.lora is trained further with policy.training 'lora' alone"
        )
