"""The aesthetic reward: a head on CLIP's image embedding that predicts how people rate an image, from 1 to 10.

LAION's predictor, as DDPO uses it (arXiv 2305.13301, Sec. 5.2): the embedding of OpenAI's CLIP ViT-L/14, brought to length 1,
through five linear layers without nonlinearities. Its weights are published as a pickle, which this package does not read:
``examples/convert_to_safetensors.py`` converts it. Differentiable in the images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.errors import UserError
from diffusionrl.rewards.base import Reward, differentiable, register
from diffusionrl.rewards.clip import CLIP, EMBEDDED_CLIP

EMBEDDED_HEAD = EMBEDDED_CLIP.parent / "aesthetic_head.safetensors"


def load_head(file: Path, width: int) -> nn.Sequential:
    """The linear layers ``layers.N.weight`` and ``layers.N.bias``, in the order of N; dropouts between them do nothing here.

    Args:
        width: length of the embedding that goes in.

    Raises:
        UserError: no such file, no safetensors, or not a chain of linear layers from ``width`` to 1.
    """
    if not file.is_file():
        raise UserError(f"aesthetic head {file}: no such file")
    if file.suffix != ".safetensors":
        raise UserError(
            f"aesthetic head {file} is no safetensors file; examples/convert_to_safetensors.py of the repository converts one "
            f"that you trust: python convert_to_safetensors.py {file} head.safetensors"
        )
    try:
        tensors = load_file(file)
        numbers = sorted(int(name.split(".")[1]) for name in tensors if name.endswith(".weight"))
        layers = []
        for number in numbers:
            weight, bias = tensors[f"layers.{number}.weight"].float(), tensors[f"layers.{number}.bias"].float()
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers.append(layer)
    except (SafetensorError, KeyError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"aesthetic head {file} is not made of layers.N.weight and layers.N.bias: {error!r}") from error
    widths = [width, *(layer.out_features for layer in layers)]
    if not layers or [layer.in_features for layer in layers] != widths[:-1] or widths[-1] != 1:
        shapes = ", ".join(f"{layer.in_features} -> {layer.out_features}" for layer in layers)
        raise UserError(f"aesthetic head {file} ({shapes}) does not lead from the model's {width} features to one score")
    return nn.Sequential(*layers).requires_grad_(False)


@register("aesthetic")
def aesthetic(config: RewardsConfig) -> Reward:
    """A rating from about 1 to 10; not clipped, as in the original."""
    settings = config.aesthetic
    head_file = settings.head or (EMBEDDED_HEAD if settings.model == "emoji" else None)
    if head_file is None:
        raise UserError("rewards.aesthetic.head is needed beside rewards.aesthetic.model: a file; see docs/rewards.md")
    clip = CLIP(settings.model, settings.revision)
    head = load_head(Path(head_file), clip.model.config.projection_dim)

    @differentiable
    def aesthetic(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return head(clip.embed_images(images))[:, 0]

    return aesthetic
