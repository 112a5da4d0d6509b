"""A model of one's own: points in the plane. A small flow network learns four modes, and then to prefer the one on the right.

    python examples/own_model.py                # half a minute on two cores; runs/own_model/report.html shows it

    diffusionrl train --model examples/own_model.py:make_policy --reward examples/own_model.py:to_the_right \\
        --policy.lora-targets every --sampling.sampler cps --sampling.eta 0.7 --algorithm.clip-range 0.2 --name points
"""

import torch
from torch import nn

from diffusionrl import NetworkPolicy, TrainConfig, train
from diffusionrl.config import EvaluationConfig, GRPOConfig, OptimizerConfig, PolicyConfig, SamplingConfig
from diffusionrl.transitions import flow_grid

MODES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])


class Velocity(nn.Module):
    """(x, time, condition) -> noise - x0."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x, time, condition):
        return self.layers(torch.cat([x, time[:, None] / 1000], 1))  # the grid's times run from 1000 to 0


def four_modes(steps=1500):
    """A network that has learned them by flow matching, the same at every start. Yours would load its weights."""
    torch.manual_seed(0)
    network = Velocity()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(steps):
        x0 = MODES[torch.randint(4, (256,))] + 0.15 * torch.randn(256, 2)
        noise, s = torch.randn(256, 2), torch.rand(256)
        predicted = network((1 - s[:, None]) * x0 + s[:, None] * noise, 1000 * s, None)
        optimizer.zero_grad()
        (predicted - (noise - x0)).square().mean().backward()
        optimizer.step()
    return network


def show(points):
    """A picture of each point, red, among all others, (B, 2) -> (B, 3, 64, 64)."""
    places = (32 + 18 * points).round().long().clamp(1, 62)
    plane = torch.ones(3, 64, 64)
    plane[:, 63 - places[:, 1], places[:, 0]] = 0.7
    pictures = plane.repeat(len(points), 1, 1, 1)
    for picture, (x, y) in zip(pictures, places.tolist(), strict=True):
        picture[1:, 62 - y : 65 - y, x - 1 : x + 2] = 0.1
    return pictures


def make_policy(settings, seed):
    return NetworkPolicy(four_modes(), flow_grid, "flow", (2,), show=show, settings=settings, seed=seed)


def to_the_right(points, prompts, metadata):
    """Minus the distance from the mode on the right, (B, 2) -> (B,)."""
    return -(points - MODES[0]).norm(dim=1)


def main(run_dir="runs/own_model", steps=20):
    config = TrainConfig(
        run_dir=run_dir,
        steps=steps,
        prompts_per_step=1,
        samples_per_prompt=64,
        sampling=SamplingConfig(num_steps=8, sampler="cps", eta=0.7, batch_size=64),
        algorithm=GRPOConfig(clip_range=0.2, step_weight_power=2.0, kl_weight=0.0, micro_batch_size=512),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        evaluation=EvaluationConfig(every=5, num_samples=64),
    )
    policy = make_policy(PolicyConfig(lora_targets=("every",), lora_rank=8), seed=0)
    result = train(config, policy=policy, reward=to_the_right, prompts=["a point"])
    print(f"{result.before.mean:.2f} before, {result.after.mean:.2f} after: {result.run_dir / 'report.html'}")


if __name__ == "__main__":
    main()
