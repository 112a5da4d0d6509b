"""Paths, time grids, sampler tables, Gaussian densities. Pure functions on tensors; of the project, devices are all they know.

A noisy sample is ``x = alpha * x0 + sigma * noise``. Every sampler goes from one time to the next by keeping the signal and
splitting the noise into a part that is kept and a part that is fresh::

    x' = alpha' * x0 + kept * noise + fresh * z,        z ~ N(0, I)

so a sampler is a table with three columns, one row a step, and the one-step density is the Gaussian with mean
``alpha' * x0 + kept * noise`` and standard deviation ``fresh``. Rows with ``fresh == 0`` are deterministic and carry no
log-probability. Nothing downstream knows which sampler it was.

Sources: DDIM eta (Song et al. 2021, Eq. 12, 16), used by DDPO; flow SDE (Flow-GRPO, arXiv 2505.05470; DanceGRPO, 2505.07818);
CPS (Flow-CPS); Precise (2605.23522); re-noising (consistency and distribution-matching samplers).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusionrl.devices import handed, in_double

Reduction = Literal["mean", "sum"]
Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True)
class NoiseLevels:
    """Where samples are on the path. Every field is a float32 tensor, (B,), on the CPU, where it costs a GPU no wait to look at
    it; ``timesteps`` is what the network is told."""

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    def __getitem__(self, rows: Tensor | slice) -> "NoiseLevels":
        """Those of some rows."""
        columns = (self.timesteps, self.alpha, self.sigma)
        return NoiseLevels(*(column[rows if isinstance(rows, slice) else rows.to(column.device)] for column in columns))

    @property
    def linear(self) -> bool:
        """Whether they are a linear flow's, alpha = 1 - sigma."""
        return bool((self.alpha + self.sigma - 1).abs().max() < 1e-3)

    def shaped(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), where ``like`` is, and shaped to broadcast over it."""
        shape = (-1, *[1] * (like.ndim - 1))
        return handed(self.alpha, like.device).view(shape), handed(self.sigma, like.device).view(shape)

    def noisy(self, x0: Tensor, noise: Tensor) -> Tensor:
        """alpha * x0 + sigma * noise, (B, ...)."""
        alpha, sigma = self.shaped(x0)
        return alpha * x0 + sigma * noise


@dataclass(frozen=True)
class Grid:
    """The times that a sampler visits: row i goes from (alpha, sigma)[i] to (alpha_next, sigma_next)[i].

    Every field is a float32 tensor of shape (num_steps,). ``timesteps`` is what the network is told.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    alpha_next: Tensor
    sigma_next: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def levels(self) -> NoiseLevels:
        """Where each row begins."""
        return NoiseLevels(self.timesteps, self.alpha, self.sigma)


@dataclass(frozen=True)
class SamplerTable:
    """A sampler on a grid. ``alpha_next``, ``kept`` and ``fresh`` are float32, (num_steps,)."""

    grid: Grid
    kept: Tensor
    fresh: Tensor

    @property
    def alpha_next(self) -> Tensor:
        return self.grid.alpha_next

    def __len__(self) -> int:
        return len(self.grid)

    @property
    def stochastic(self) -> Tensor:
        """The rows that have fresh noise, in order."""
        return (self.fresh > 0).nonzero().flatten()

    def only(self, rows: Tensor) -> "SamplerTable":
        """The same on these rows, and the ODE on all others."""
        inside = torch.zeros(len(self), dtype=torch.bool).index_fill(0, rows, True)
        return SamplerTable(self.grid, self.kept.where(inside, self.grid.sigma_next), self.fresh * inside)

    def mean(self, steps: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """The mean of x' for each sample at its own step.

        Args:
            steps: row numbers, (B,).
            x0, noise: the denoiser's estimates, (B, ...).
        """
        return _column(self.alpha_next, steps, x0) * x0 + _column(self.kept, steps, x0) * noise

    def std(self, steps: Tensor, like: Tensor) -> Tensor:
        """The standard deviation of x', shaped to broadcast over ``like``."""
        return _column(self.fresh, steps, like)


def _column(values: Tensor, steps: Tensor, like: Tensor) -> Tensor:
    return handed(values[steps.to(values.device)], like.device).view(-1, *[1] * (like.ndim - 1))


# Time grids


def variance_preserving_grid(
    alphas_cumprod: Tensor,
    num_steps: int,
    spacing: Literal["leading", "linspace", "trailing"] = "leading",
    steps_offset: int = 1,
    final_alpha_cumprod: float | None = None,
) -> Grid:
    """The grid of Stable Diffusion: alpha = sqrt(abar), sigma = sqrt(1 - abar), as diffusers' DDIM scheduler cuts it.

    Args:
        alphas_cumprod: abar of every training time, (num_train_timesteps,).
        final_alpha_cumprod: abar after the last step; None takes ``alphas_cumprod[0]`` (``set_alpha_to_one=False``).

    Raises:
        ValueError: more steps than training times, or an unknown spacing.
    """
    num_train = len(alphas_cumprod)
    if not 1 <= num_steps <= num_train:
        raise ValueError(f"num_steps must lie between 1 and the model's {num_train} training times, not {num_steps}")
    stride = num_train // num_steps
    if spacing == "leading":
        timesteps = torch.arange(num_steps).flip(0) * stride + steps_offset
    elif spacing == "trailing":
        # Half to even, as NumPy and diffusers round; so does linspace below.
        timesteps = torch.tensor([round(num_train - i * num_train / num_steps) - 1 for i in range(num_steps)])
    elif spacing == "linspace":
        timesteps = torch.linspace(0, num_train - 1, num_steps, dtype=torch.float64).round().long().flip(0)
    else:
        raise ValueError(f"timestep spacing {spacing!r} is not supported: use 'leading', 'linspace' or 'trailing'")
    if timesteps.max() >= num_train:
        raise ValueError(f"{num_steps} steps with an offset of {steps_offset} leave the model's {num_train} training times")
    following = timesteps - stride
    final = alphas_cumprod[0] if final_alpha_cumprod is None else torch.as_tensor(final_alpha_cumprod)
    now = alphas_cumprod.float()[timesteps]
    then = torch.where(following >= 0, alphas_cumprod.float()[following.clamp(min=0)], final.float())
    return Grid(timesteps.float(), now.sqrt(), (1 - now).sqrt(), then.sqrt(), (1 - then).sqrt())


def flow_grid(num_steps: int, shift: float = 1.0, num_train_timesteps: int = 1000) -> Grid:
    """A grid of linear flows: alpha = 1 - s, sigma = s, from s = 1 to s = 0. For toy models and tests: a pipeline's grid is its
    scheduler's (SD3's is shifted twice, and differs from this one by up to 0.006).

    Args:
        shift: moves steps towards the noise, s -> shift * s / (1 + (shift - 1) * s).
    """
    s = torch.linspace(1.0, 1.0 / num_train_timesteps, num_steps, dtype=torch.float64)
    s = torch.cat([shift * s / (1 + (shift - 1) * s), torch.zeros(1, dtype=torch.float64)])
    now, then = s[:-1], s[1:]
    columns = (now * num_train_timesteps, 1 - now, now, 1 - then, then)
    return Grid(*(column.float() for column in columns))


def karras_grid(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Grid:
    """A grid of models that count noise over signal, s: latents at unit scale, alpha = 1 / sqrt(1 + s^2), sigma = s * alpha;
    the network is told s (Karras et al., arXiv 2206.00364, Eq. 5). For models of one's own.
    """
    s = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps, dtype=torch.float64) ** rho
    s = torch.cat([s, torch.zeros(1, dtype=torch.float64)])
    alpha = (1 + s**2).rsqrt()
    columns = (s[:-1], alpha[:-1], (s * alpha)[:-1], alpha[1:], (s * alpha)[1:])
    return Grid(*(column.float() for column in columns))


# Sampler tables, all of the form (grid, eta) -> table


def ode(grid: Grid, eta: float = 0.0) -> SamplerTable:
    """No fresh noise: DDIM with eta = 0, or Euler's method on a flow. ``eta`` must be 0."""
    if eta != 0:
        raise ValueError(f"the ODE sampler adds no noise: eta must be 0, not {eta}")
    return SamplerTable(grid, grid.sigma_next, torch.zeros_like(grid.sigma_next))


def ddim(grid: Grid, eta: float) -> SamplerTable:
    """DDIM; eta = 1 is ancestral DDPM sampling, which DDPO uses."""
    signal = 1 - (grid.alpha / grid.alpha_next) ** 2
    fresh = eta * grid.sigma_next / grid.sigma * signal.clamp(min=0).sqrt()
    return _from_fresh(grid, fresh, f"ddim with eta {eta}")


def cps(grid: Grid, eta: float) -> SamplerTable:
    """Coefficients-preserving sampling: a constant share of the noise is fresh."""
    angle = eta * math.pi / 2
    return SamplerTable(grid, grid.sigma_next * math.cos(angle), grid.sigma_next * math.sin(angle))


def precise(grid: Grid, eta: float) -> SamplerTable:
    """The exact transition of the Ornstein-Uhlenbeck process behind the flow SDE."""
    ratio = (grid.sigma_next * grid.alpha) / (grid.sigma * grid.alpha_next)
    remains = ratio ** (eta**2 / 2)
    return SamplerTable(grid, grid.sigma_next * remains, grid.sigma_next * (1 - remains**2).clamp(min=0).sqrt())


def flow_grpo(grid: Grid, eta: float) -> SamplerTable:
    """The flow SDE with diffusion g = eta * sqrt(s / (1 - s)), for linear flows only.

    At s = 1, where g is infinite, 1 - s takes the value of the next time, as Flow-GRPO does.
    """
    s = _flow_times(grid)
    start = s > 1 - 5e-4  # UniPC begins at 1 - 1e-6, DPM++ at 1 - 3e-4
    denominator = torch.where(start, 1 - grid.sigma_next, 1 - s)
    return _flow_sde(grid, eta * (s / denominator).sqrt())


def dance_grpo(grid: Grid, eta: float) -> SamplerTable:
    """The flow SDE with constant diffusion g = eta, for linear flows only."""
    return _flow_sde(grid, torch.full_like(_flow_times(grid), eta))


def renoise(grid: Grid, eta: float = 1.0) -> SamplerTable:
    """All noise is fresh: how consistency (LCM) and distribution-matching (DMD) models sample. ``eta`` must be 1."""
    if eta != 1:
        raise ValueError(f"the re-noising sampler keeps no noise: eta must be 1, not {eta}")
    return SamplerTable(grid, torch.zeros_like(grid.sigma_next), grid.sigma_next)


SAMPLERS: dict[str, Callable[[Grid, float], SamplerTable]] = {
    "ode": ode,
    "ddim": ddim,
    "cps": cps,
    "precise": precise,
    "flow_grpo": flow_grpo,
    "dance_grpo": dance_grpo,
    "renoise": renoise,
}


def _from_fresh(grid: Grid, fresh: Tensor, name: str) -> SamplerTable:
    kept_squared = grid.sigma_next**2 - fresh**2
    if (kept_squared < -1e-6).any():
        raise ValueError(f"{name} asks for more fresh noise than there is room for: lower eta")
    return SamplerTable(grid, kept_squared.clamp(min=0).sqrt(), fresh)


def _flow_times(grid: Grid) -> Tensor:
    if not torch.allclose(grid.alpha, 1 - grid.sigma, atol=1e-5):
        raise ValueError("the flow SDE samplers need a linear flow (SD3, FLUX); use 'ddim' on a Stable Diffusion model")
    return grid.sigma


def _flow_sde(grid: Grid, diffusion: Tensor) -> SamplerTable:
    dt = grid.sigma_next - grid.sigma
    return SamplerTable(grid, grid.sigma_next + diffusion**2 * dt / (2 * grid.sigma), diffusion * (-dt).sqrt())


# What the network's output means


def to_x0_and_noise(kind: Prediction, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The clean sample and the noise that a network's output implies; alpha and sigma broadcast over x."""
    if kind == "epsilon":
        return (x - sigma * output) / alpha, output
    if kind == "v_prediction":  # v = alpha * noise - sigma * x0 (Salimans & Ho 2022)
        return alpha * x - sigma * output, alpha * output + sigma * x
    if kind == "sample":
        return output, (x - alpha * output) / sigma
    if kind == "flow":  # velocity = noise - x0, on the linear path
        return x - sigma * output, x + alpha * output
    raise ValueError(f"prediction type {kind!r} is not supported: use 'epsilon', 'v_prediction', 'sample' or 'flow'")


# Densities


def _reduce(values: Tensor, reduction: Reduction) -> Tensor:
    """In double precision where the device has it: of many dimensions, float32 sums lose what a ratio is made of."""
    flat = in_double(values.flatten(1))
    return (flat.mean(1) if reduction == "mean" else flat.sum(1)).float()


def log_density(x: Tensor, mean: Tensor, std: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Log-density of N(mean, std^2 I) at x, averaged (the field's convention) or summed over the latent dimensions.

    Args:
        x, mean: (B, ...), float32.
        std: broadcasts over x, positive.

    Returns:
        (B,), float32, reduced in float64.
    """
    return _reduce(-((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi), reduction)


def gaussian_kl(mean_p: Tensor, mean_q: Tensor, std: Tensor, reduction: Reduction = "mean") -> Tensor:
    """KL(p || q) of two Gaussians with one standard deviation, reduced like ``log_density``. Returns (B,)."""
    return _reduce((mean_p - mean_q) ** 2 / (2 * std**2), reduction)
