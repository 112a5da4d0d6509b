"""Worker of gpu.py: a step of Flow-GRPO on a Stable Diffusion 3 pipeline in the form of its authors' loop, rebuilt on diffusers
and peft; prints one line of JSON.

Rebuilt from what is published about it, not their code: prompts are embedded batch by batch; sampling runs the guided network
once a step on a batch; the update goes over micro-batches of samples and, inside, over denoising steps, guidance and the
reference (adapter off, for the KL) included, in bf16 autocast; gradients are added up over samples and steps.
"""

import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import tyro
from peft import LoraConfig
from throughput_ours import synchronise
from torch import Tensor

from diffusionrl import devices
from diffusionrl.data.prompts import load_prompts
from diffusionrl.policies import load_pipeline

TARGETS = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v"]
ETA, CLIP, KL, RATE = 0.7, 1e-4, 0.04, 3e-4


@dataclass(frozen=True)
class Config:
    """Fields as in throughput_ours.py."""

    model: str
    samples: int = 48
    group: int = 8
    num_steps: int = 16
    guidance: float = 5.0
    size: int | None = None
    rank: int = 32
    sample_batch: int = 8
    train_batch: int = 8
    updates: int = 2
    repeats: int = 2
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2


class Loop:
    def __init__(self, config: Config) -> None:
        self.config, self.device, self.dtype = config, torch.device(config.device), getattr(torch, config.dtype)
        self.pipeline: Any = load_pipeline(config.model, self.dtype)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.to(self.device)
        self.pipeline.vae.to(torch.float32)
        for part in self.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False)
        self.network: Any = self.pipeline.transformer
        self.network.add_adapter(LoraConfig(r=config.rank, lora_alpha=2 * config.rank, target_modules=TARGETS))
        self.trained = [weight for weight in self.network.parameters() if weight.requires_grad]
        for weight in self.trained:
            weight.data = weight.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, RATE)
        self.pipeline.scheduler.set_timesteps(config.num_steps, device=self.device)
        self.sigmas = self.pipeline.scheduler.sigmas.to(self.device).float()
        self.times = self.pipeline.scheduler.timesteps
        self.size = config.size or self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        every = load_prompts("ddpo-animals") * config.samples
        self.prompts = [prompt.text for prompt in every[: config.samples // config.group] for _ in range(config.group)]

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()

    def velocity(self, x: Tensor, step: int, embedded: Tensor, pooled: Tensor) -> Tensor:
        both = torch.cat([x, x]).to(self.dtype)
        time = self.times[step].expand(len(both))
        with self.autocast():
            said = self.network(both, embedded, pooled, time, return_dict=False)[0].float()
        plain, prompted = said.chunk(2)
        return plain + self.config.guidance * (prompted - plain)

    def step_of(self, x: Tensor, step: int, velocity: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next latent (``y`` where it is known), its log-probability, the mean and the standard deviation."""
        sigma, following = self.sigmas[step], self.sigmas[step + 1]
        dt = following - sigma
        deviation = ETA * (sigma / (1 - torch.where(sigma == 1, self.sigmas[1], sigma))).sqrt()
        drift = deviation**2 / (2 * sigma)
        mean = x * (1 + drift * dt) + velocity * (1 + drift * (1 - sigma)) * dt
        noise = deviation * (-dt).sqrt()
        y = mean + noise * torch.randn_like(mean) if y is None else y
        density = -((y - mean) ** 2) / (2 * noise**2) - noise.log()
        return y, density.mean((1, 2, 3)), mean, noise

    @torch.no_grad()
    def sample(self) -> tuple[list[dict[str, Tensor]], Tensor]:
        found, rewards = [], []
        for first in range(0, len(self.prompts), self.config.sample_batch):
            prompts = self.prompts[first : first + self.config.sample_batch]
            embedded, without, pooled, nothing = self.pipeline.encode_prompt(prompts, prompts, prompts, device=self.device)
            embedded, pooled = torch.cat([without, embedded]), torch.cat([nothing, pooled])
            side = self.size // self.pipeline.vae_scale_factor
            x = torch.randn(len(prompts), self.network.config.in_channels, side, side, device=self.device)
            latents, densities = [x], []
            for step in range(self.config.num_steps):
                x, density, _, _ = self.step_of(x, step, self.velocity(x, step, embedded, pooled))
                latents.append(x)
                densities.append(density)
            scale = self.pipeline.vae.config
            images = self.pipeline.vae.decode(x / scale.scaling_factor + scale.shift_factor, return_dict=False)[0]
            rewards.append(images.flatten(1).mean(1))
            halves = [part.reshape(2, len(prompts), *part.shape[1:]).transpose(0, 1) for part in (embedded, pooled)]
            parts = {"latents": torch.stack(latents, 1), "densities": torch.stack(densities, 1)}
            parts |= {"embedded": halves[0], "pooled": halves[1]}
            found += [{name: part[i] for name, part in parts.items()} for i in range(len(prompts))]
        scores = torch.cat(rewards).view(-1, self.config.group)
        advantages = (scores - scores.mean(1, keepdim=True)) / (scores.std() + 1e-4)
        return found, advantages.flatten()

    def learn(self, samples: list[dict[str, Tensor]], advantages: Tensor) -> None:
        order = torch.randperm(len(samples))
        for part in order.chunk(self.config.updates):
            micro = part.split(self.config.train_batch)
            for chosen in micro:
                batch = {name: torch.stack([samples[i][name] for i in chosen]) for name in samples[0]}
                embedded, pooled = (batch[name].transpose(0, 1).flatten(0, 1) for name in ("embedded", "pooled"))
                for step in range(self.config.num_steps - 1):  # the last one is deterministic
                    x, y = batch["latents"][:, step], batch["latents"][:, step + 1]
                    _, density, mean, noise = self.step_of(x, step, self.velocity(x, step, embedded, pooled), y)
                    with torch.no_grad():
                        self.network.disable_adapters()
                        _, _, there, _ = self.step_of(x, step, self.velocity(x, step, embedded, pooled), y)
                        self.network.enable_adapters()
                    ratio = (density - batch["densities"][:, step]).exp()
                    weight = advantages[chosen].to(ratio)
                    loss = torch.maximum(-weight * ratio, -weight * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
                    loss = loss + KL * ((mean - there) ** 2 / (2 * noise**2)).mean()
                    (loss / (len(micro) * (self.config.num_steps - 1))).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def __call__(self) -> tuple[float, float]:
        began = time.perf_counter()
        samples, advantages = self.sample()
        synchronise(self.device)
        sampled = time.perf_counter()
        self.learn(samples, advantages)
        synchronise(self.device)
        return sampled - began, time.perf_counter() - sampled


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    loop = Loop(config)
    loop()
    times = [loop() for _ in range(config.repeats)]
    result = {
        "sampling_seconds": min(sampling for sampling, _ in times),
        "update_seconds": min(update for _, update in times),
        "step_seconds": min(sampling + update for sampling, update in times),
        "peak_memory_gb": devices.peak_bytes(loop.device) / 1e9,
    }
    print(json.dumps(asdict(config) | result))


if __name__ == "__main__":
    main(tyro.cli(Config))
