"""A tiny network of one's own, which the tests share, as a user's file has it: points in the plane, told where to go."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusionrl import NetworkPolicy, Prompt
from diffusionrl.config import PolicyConfig
from diffusionrl.rewards import differentiable
from diffusionrl.transitions import flow_grid

LORA = PolicyConfig(lora_targets=("every",), lora_rank=2)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(torch.cat([x, time[:, None] / 1000, condition], 1))))


def where(prompts: Sequence[Prompt]) -> Tensor:
    """(B, 2)."""
    return torch.stack([torch.as_tensor(prompt.metadata.get("place", (0.0, 0.0))).float() for prompt in prompts])


def show(points: Tensor) -> Tensor:
    return points.sigmoid().mean(1)[:, None, None, None].expand(-1, 3, 8, 8)


def network() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network()


def make_policy(settings: PolicyConfig, seed: int, **more: Any) -> NetworkPolicy:
    given = {"path": flow_grid, "prediction": "flow", "latent_shape": (2,), "condition": where, "show": show}
    return NetworkPolicy(network(), settings=settings, seed=seed, **(given | more))


def paint(points: Tensor) -> Tensor:
    """Red for the first coordinate, blue for the second."""
    red, blue = points.sigmoid().T
    return torch.stack([red, (red + blue) / 2, blue], 1)[..., None, None].expand(-1, -1, 8, 8)


def make_painter() -> NetworkPolicy:
    """A policy of pictures, for what does not hang on its network: points as colours, many times as fast as a tiny UNet. Its
    adapter is moved off zero, so that it matters."""
    policy = make_policy(LORA, 0, decode=paint, show=None, unconditional=Prompt(""))
    for index, (name, weight) in enumerate(policy.trainable().items()):
        if "lora_B" in name:
            weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
    return policy


@differentiable
def to_the_right(points: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    return points[:, 0]
