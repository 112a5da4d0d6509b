"""Restoration as generation in a few steps, and its steps as a policy (RGM: Choi, Park, Kang, ICML 2023, arXiv 2303.05456).

    python examples/papers/rgm.py              # some 45 minutes on a core, may be stopped and taken up again; --quick: two

A sample x is degraded in T steps to noise, y_k = (1 - s_k) x + s_k e with s_k = k / T (the paper: variance preserving).
A generator G restores it at once, xhat = G(y_k, k, z), z ~ N(0, I), by maximum a posteriori with a learned prior:

    L_D = softplus(-D(y_k, k)) + softplus(D(yhat_k, k)) + 0.02 R1        yhat_k = (1 - s_k) xhat + s_k e', from G(y_{k+1})
    L_G = softplus(-D(yhat_k, k)) + lambda |y_{k+1} - (1 - s_{k+1}) xhat|^2 / (2 s_{k+1}^2)      the second term: fidelity

A sample starts as noise; T times it is restored, and degraded to the level before: y_k ~ N((1 - s_k) xhat, s_k^2 I). These
closed Gaussian steps are the library's ``renoise`` sampler, so the model of four steps is a policy as it is. z is drawn anew
at each step: here it is two more dimensions of the latent, whose restoration is 0, so that re-noising draws them.

The paper's claim: four steps are far better than one (Frechet distance 3.04 against 21.2), fidelity and z help (3.87 without
them), and four steps are like a model of a thousand at a hundredth of its passes. Ours, in small: a grid of 25 Gaussians, five
seeds, the energy distance of 10,000 samples to fresh points; beside T = 1, 2, 4, 8 the arms without fidelity, without z, and a
denoiser of the same size in 400 ancestral steps. Then T = 4 is tuned (GRPO) to leave the left of the plane, where 10 of the 25
modes are: does the share of samples there fall, and do the 15 others stay? Beside it the same run on noise as reward.

Deviations: a linear path, two dimensions, an energy distance in place of Frechet's. lambda was chosen on seeds that are not
shown. docs/papers.md says what came out.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import softplus

from diffusionrl import NetworkPolicy, Prompt, TrainConfig, train
from diffusionrl.config import EvaluationConfig, GRPOConfig, OptimizerConfig, PolicyConfig, SamplingConfig
from diffusionrl.evaluation.intervals import mean_interval
from diffusionrl.rewards.noise import noise
from diffusionrl.sampling.rollout import collect
from diffusionrl.transitions import Grid

MODES = torch.cartesian_prod(torch.arange(-2.0, 3), torch.arange(-2.0, 3)) / 2**0.5  # 25, of standard deviation 1
SPREAD, LAMBDA, MANY = 0.05, 0.1, 400
ARMS = {  # name: (T, fidelity, z)
    "T = 1": (1, True, True),
    "T = 2": (2, True, True),
    "T = 4": (4, True, True),
    "T = 8": (8, True, True),
    "T = 4, no fidelity": (4, False, True),
    "T = 4, no z": (4, True, False),
}
DENOISER = f"denoiser, {MANY} steps"


def draw_points(count):
    return MODES[torch.randint(len(MODES), (count,))] + SPREAD * torch.randn(count, 2)


def path(num_steps):
    """Times s = 1 to 1 / T, each to the next; the network is told 1000 s."""
    s = torch.linspace(1, 0, num_steps + 1)
    return Grid(1000 * s[:-1], 1 - s[:-1], s[:-1], 1 - s[1:], s[1:])


class Layers(nn.Sequential):
    """Of a point, waves of it, and the rest: (B, inputs) -> (B, outputs)."""

    def __init__(self, inputs, outputs, width=128):
        hidden = [nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        super().__init__(nn.Linear(inputs + 16, width), nn.SiLU(), *hidden, nn.Linear(width, outputs))

    def forward(self, x):
        waves = torch.cat([x[:, :2] * k for k in (1, 2, 4, 8)], 1)
        return super().forward(torch.cat([x, waves.sin(), waves.cos()], 1))


class Generator(nn.Module):
    """(a point and s z, 1000 s) -> the point restored, and 0. Without z, the denoiser too: (a point, 1000 s) -> e - x."""

    def __init__(self, z):
        super().__init__()
        self.layers = Layers(5 if z else 3, 2)

    def forward(self, x, time, condition=None):
        s = time[:, None] / 1000
        y, z = x[:, :2], x[:, 2:] / s
        return torch.cat([self.layers(torch.cat([y, z, s], 1)), torch.zeros_like(z)], 1)


def degrade(x, s, noise):
    return (1 - s) * x + s * noise


def train_generator(num_steps, fidelity, z, seed, iterations):
    torch.manual_seed(seed)
    generator, judge = Generator(z), Layers(3, 1)
    of_generator = torch.optim.Adam(generator.parameters(), 5e-4, betas=(0.5, 0.9))
    of_judge = torch.optim.Adam(judge.parameters(), 5e-4, betas=(0.5, 0.9))
    schedules = [torch.optim.lr_scheduler.LinearLR(each, 1, 0.02, iterations) for each in (of_generator, of_judge)]
    average = torch.optim.swa_utils.AveragedModel(generator, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    for _ in range(iterations):
        x, k = draw_points(256), torch.randint(num_steps, (256, 1))
        s, following = k / num_steps, (k + 1) / num_steps
        y = degrade(x, following, torch.randn(256, 2))
        latents = torch.cat([y, following * torch.randn(256, 2)], 1) if z else y
        restored = generator(latents, 1000 * following[:, 0])[:, :2]
        made = torch.cat([degrade(restored, s, torch.randn(256, 2)), s], 1)
        real = torch.cat([degrade(x, s, torch.randn(256, 2)), s], 1).requires_grad_()

        verdict = judge(real)
        (slope,) = torch.autograd.grad(verdict.sum(), real, create_graph=True)
        loss = softplus(-verdict).mean() + softplus(judge(made.detach())).mean() + 0.01 * slope.square().sum(1).mean()
        of_judge.zero_grad()
        loss.backward()
        of_judge.step()

        loss = softplus(-judge(made)).mean()
        if fidelity:
            loss = loss + LAMBDA * ((y - (1 - following) * restored) / following).square().sum(1).mean() / 2
        of_generator.zero_grad()
        loss.backward()
        of_generator.step()
        average.update_parameters(generator)
        for schedule in schedules:
            schedule.step()
    return average.module


def train_denoiser(seed, iterations):
    torch.manual_seed(seed)
    network = Generator(z=False)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(iterations):
        x, noise, s = draw_points(256), torch.randn(256, 2), torch.rand(256, 1)
        loss = (network(degrade(x, s, noise), 1000 * s[:, 0]) - (noise - x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def point_of(latents):
    return latents[:, :2]


def show(points):
    """Each point, red, in the plane, (B, 2) -> (B, 3, 64, 64)."""
    pictures = torch.ones(len(points), 3, 64, 64)
    for picture, (x, y) in zip(pictures, (32 + 16 * points).round().long().clamp(1, 62).tolist(), strict=True):
        picture[1:, 62 - y : 65 - y, x - 1 : x + 2] = 0.1
    return pictures


def policy_of(network, prediction="sample", z=True, training="full", seed=0):
    settings = PolicyConfig(training=training, lora_targets=("every",), lora_rank=8)
    return NetworkPolicy(network, path, prediction, (4 if z else 2,), decode=point_of, show=show, settings=settings, seed=seed)


def samples(policy, num_steps, sampler, count, seed):
    sampling = SamplingConfig(num_steps=num_steps, sampler=sampler, eta=1.0, guidance=1.0, batch_size=2000)
    return collect(policy, no_reward, [Prompt("a point")] * count, sampling, seed, "samples", 0, needs="endpoints").images


def energy_distance(a, b):
    """2 E|A - B| - E|A - A'| - E|B - B'|, of points (N, 2)."""

    def apart(a, b):
        return torch.stack([torch.cdist(part, b).mean() for part in a.split(1000)]).mean().item()

    return 2 * apart(a, b) - apart(a, a) - apart(b, b)


# Tuning


def no_reward(points, prompts, metadata):
    return [0.0] * len(points)


def leave_the_left(points, prompts, metadata):
    """0 in the middle and on the right, below it the further a point is on the left; (B, 2) -> (B,)."""
    return (points[:, 0] + 0.35).clamp(max=0)


def on_the_left(points):
    return (points[:, 0] < -0.35).float().mean().item()


def modes_kept(points):
    """How many of the 15 modes that are not on the left have at least half a percent of the points."""
    nearest = torch.cdist(points, MODES).argmin(1)
    held = torch.bincount(nearest, minlength=len(MODES)) >= len(points) / 200
    return int(held[MODES[:, 0] > -0.35].sum())


def tune(network, reward, seed, steps, count, folder):
    policy = policy_of(network, training="lora", seed=seed)
    before = samples(policy, 4, "renoise", count, seed)
    config = TrainConfig(
        run_dir=folder,
        seed=seed,
        steps=steps,
        prompts_per_step=1,
        samples_per_prompt=64,
        sampling=SamplingConfig(num_steps=4, sampler="renoise", eta=1.0, guidance=1.0, batch_size=64),
        algorithm=GRPOConfig(clip_range=0.2, kl_weight=0.0, micro_batch_size=512),
        optimizer=OptimizerConfig(learning_rate=5e-4),
        evaluation=EvaluationConfig(every=10, num_samples=64),
    )
    train(config, policy=policy, reward=reward, prompts=["a point"])
    after = samples(policy, 4, "renoise", count, seed)
    figures = {"left before": on_the_left(before), "left after": on_the_left(after)}
    return figures | {"modes before": modes_kept(before), "modes after": modes_kept(after)}, after


# The table and the picture


def measure(folder, seed, sizes):
    """Every arm of a seed; what is there already is not made again."""
    file = folder / f"seed_{seed}.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    torch.manual_seed(10_000 + seed)
    fresh = draw_points(sizes.count)

    def keep(name, figures, points, network):
        save_file({"points": points, **network.state_dict()}, folder / f"{name} {seed}.safetensors")
        found[name] = figures
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"seed {seed}, {name}: {figures}", flush=True)

    for name, (num_steps, fidelity, z) in ARMS.items():
        if name not in found:
            network = train_generator(num_steps, fidelity, z, seed, sizes.iterations)
            points = samples(policy_of(network, z=z), num_steps, "renoise", sizes.count, seed)
            keep(name, energy_distance(points, fresh), points, network)
    if DENOISER not in found:
        network = train_denoiser(seed, sizes.iterations)
        points = samples(policy_of(network, "flow", z=False), MANY, "precise", sizes.count, seed)
        keep(DENOISER, energy_distance(points, fresh), points, network)
    for reward in (leave_the_left, noise):
        if reward.__name__ not in found:
            network = Generator(True)
            network.load_state_dict(load_file(folder / f"T = 4 {seed}.safetensors"), strict=False)
            run = folder / f"{reward.__name__}_{seed}"
            keep(reward.__name__, *tune(network, reward, seed, sizes.steps, sizes.count, run), network)
    drawn = {name: load_file(folder / f"{name} {seed}.safetensors")["points"] for name in found}
    figure, axes = plt.subplots(1, len(drawn) + 1, figsize=(2.2 * (len(drawn) + 1), 2.4))
    for axis, (name, points) in zip(axes, {"fresh": fresh, **drawn}.items(), strict=True):
        axis.scatter(*points[:2000].T, s=0.5)
        axis.set(title=name.replace("_", " "), xlim=(-2, 2), ylim=(-2, 2), aspect="equal", xticks=[], yticks=[])
    figure.savefig(folder / f"seed_{seed}.png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    return found


def interval(values):
    found = mean_interval(values)
    return f"{found.value:.3f}" + (f" ({found.low:.3f} to {found.high:.3f})" if len(values) > 1 else "")


def table(results):
    """Means over the seeds with 95 % intervals; differences are of the same seeds."""
    lines = ["| arm | energy distance | minus that of T = 4 |", "|---|---|---|"]
    for name in [*ARMS, DENOISER]:
        own = [found[name] for found in results]
        apart = [found[name] - found["T = 4"] for found in results]
        lines.append(f"| {name} | {interval(own)} | {'' if name == 'T = 4' else interval(apart)} |")
    lines += ["", "| reward | on the left | change | of 15 modes | change |", "|---|---|---|---|---|"]
    for name in (leave_the_left.__name__, noise.__name__):
        rows, cells = [found[name] for found in results], []
        for key in ("left", "modes"):
            cells.append(interval([row[f"{key} before"] for row in rows]))
            cells.append(interval([row[f"{key} after"] - row[f"{key} before"] for row in rows]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/papers/rgm"))
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--iterations", type=int, default=4_000)
    parser.add_argument("--steps", type=int, default=60, help="of tuning")
    parser.add_argument("--count", type=int, default=10_000, help="of samples")
    parser.add_argument("--quick", action="store_true", help="to see it work, not to measure")
    sizes = parser.parse_args(arguments)
    if sizes.quick:
        sizes.seeds, sizes.iterations, sizes.steps, sizes.count = [0], 500, 10, 1000
        sizes.out = sizes.out / "quick"
    sizes.out.mkdir(parents=True, exist_ok=True)
    print(table([measure(sizes.out, seed, sizes) for seed in sizes.seeds]))


if __name__ == "__main__":
    main()
