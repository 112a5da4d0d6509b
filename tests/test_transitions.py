"""The sampler tables, against diffusers' schedulers as the oracle and against what the table in the docs promises."""

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from diffusionrl.errors import UserError
from diffusionrl.policies.schedules import Schedule
from diffusionrl.transitions import (
    SAMPLERS,
    Grid,
    Prediction,
    cps,
    ddim,
    flow_grid,
    gaussian_kl,
    log_density,
    ode,
    precise,
    renoise,
    to_x0_and_noise,
    variance_preserving_grid,
)


def stable_diffusion_scheduler(**settings: object) -> DDIMScheduler:
    base = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    return DDIMScheduler(**(base | {"set_alpha_to_one": False, "steps_offset": 1} | settings))


def grid_of(scheduler: DDIMScheduler, num_steps: int) -> Grid:
    settings = scheduler.config
    final = float(scheduler.final_alpha_cumprod)
    return variance_preserving_grid(
        scheduler.alphas_cumprod, num_steps, settings.timestep_spacing, settings.steps_offset, final
    )


@pytest.mark.parametrize("num_steps", [1, 7, 16, 50])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_diffusers_ddim(num_steps: int, spacing: str, prediction: str, eta: float) -> None:
    scheduler = stable_diffusion_scheduler(timestep_spacing=spacing, prediction_type=prediction)
    scheduler.set_timesteps(num_steps)
    grid = grid_of(scheduler, num_steps)
    assert grid.timesteps.tolist() == scheduler.timesteps.tolist()
    table = ddim(grid, eta)
    draw = torch.Generator().manual_seed(num_steps)
    for i, timestep in enumerate(scheduler.timesteps):
        x, output, z = torch.randn(3, 2, 4, 3, 3, generator=draw)
        x0, noise = to_x0_and_noise(prediction, output, x, grid.alpha[i], grid.sigma[i])
        steps = torch.tensor([i, i])
        ours = table.mean(steps, x0, noise) + table.std(steps, x) * z
        theirs = scheduler.step(output, timestep, x, eta=eta, variance_noise=z if eta else None).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_offset_zero_ends_like_diffusers(set_alpha_to_one: bool) -> None:
    scheduler = stable_diffusion_scheduler(steps_offset=0, set_alpha_to_one=set_alpha_to_one)
    grid = grid_of(scheduler, 10)
    assert grid.alpha_next[-1] == scheduler.final_alpha_cumprod.sqrt()


@pytest.mark.parametrize("num_steps", [1, 4, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_ode_is_diffusers_euler(num_steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    grid = flow_grid(num_steps, shift)
    # Without sigmas diffusers shifts the ends of its grid once more, and SD3's pipeline gives none: its grid is not this one.
    # FLUX's and others give the plain grid.
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 1000, num_steps).tolist() if num_steps > 1 else [1.0])
    torch.testing.assert_close(grid.sigma, scheduler.sigmas[:-1].float())
    torch.testing.assert_close(grid.timesteps, scheduler.timesteps.float())
    table = ode(grid)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 3, generator=draw)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn(x.shape, generator=draw)
        x0, noise = to_x0_and_noise("flow", velocity, x, grid.alpha[i], grid.sigma[i])
        ours = table.mean(torch.tensor([i, i]), x0, noise)
        torch.testing.assert_close(ours, scheduler.step(velocity, timestep, x).prev_sample, rtol=2e-5, atol=2e-5)
        x = ours


def test_reference_deviations_of_stable_diffusion() -> None:
    """Figures derived for SD's schedule at eta 1: 50 steps begin .4545, .4483 and end .0999, .0395, .0206."""
    fresh = ddim(grid_of(stable_diffusion_scheduler(), 50), 1.0).fresh
    torch.testing.assert_close(
        fresh[[0, 1, -3, -2, -1]], torch.tensor([0.4545, 0.4483, 0.0999, 0.0395, 0.0206]), atol=1e-4, rtol=0
    )


stable_diffusion_grids = st.builds(lambda n: grid_of(stable_diffusion_scheduler(), n), st.integers(1, 60))
grids = st.one_of(st.builds(flow_grid, st.integers(1, 40), st.floats(0.5, 5.0)), stable_diffusion_grids)


@given(
    case=st.one_of(
        st.tuples(grids, st.sampled_from([cps, precise])),
        st.tuples(stable_diffusion_grids, st.just(ddim)),
    ),
    eta=st.floats(0.0, 1.0),
)
def test_noise_is_split_not_changed(case, eta: float) -> None:  # type: ignore[no-untyped-def]
    grid, sampler = case
    table = sampler(grid, eta)
    assert table.kept.isfinite().all()
    assert table.fresh.isfinite().all()
    assert (table.fresh >= 0).all()
    torch.testing.assert_close(table.kept**2 + table.fresh**2, grid.sigma_next**2, atol=1e-5, rtol=1e-5)


@given(grid=grids)
def test_ode_adds_no_noise_and_renoise_keeps_none(grid: Grid) -> None:
    assert (ode(grid).fresh == 0).all()
    assert (renoise(grid).kept == 0).all()
    assert torch.equal(renoise(grid).fresh, grid.sigma_next)
    for sampler in (ddim, cps, precise):
        torch.testing.assert_close(sampler(grid, 0.0).kept, ode(grid).kept)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_renoise_is_diffusers_lcm(prediction: Prediction) -> None:
    """Whose boundary conditions are 1 and 0 to 1e-5 at these times; its last step ends at no noise."""
    scheduler = LCMScheduler.from_config(stable_diffusion_scheduler(prediction_type=prediction).config)
    scheduler.set_timesteps(4)
    signal = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], torch.ones(1)])
    now, then = signal[:-1], signal[1:]
    grid = Grid(scheduler.timesteps.float(), now.sqrt(), (1 - now).sqrt(), then.sqrt(), (1 - then).sqrt())
    table, draw = renoise(grid), torch.Generator().manual_seed(0)
    for i, timestep in enumerate(scheduler.timesteps):
        x, output = torch.randn(2, 2, 3, 4, 4, generator=draw)
        estimates = to_x0_and_noise(prediction, output, x, grid.alpha[i], grid.sigma[i])
        rows, noise = torch.tensor([i, i]), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(i))
        found = table.mean(rows, *estimates) + table.std(rows, x) * noise
        expected = scheduler.step(output, timestep, x, torch.Generator().manual_seed(i)).prev_sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (table.fresh[i] > 0) == (i < 3)


@given(num_steps=st.integers(2, 40), eta=st.floats(0.05, 0.9))
def test_flow_sde_matches_its_stochastic_differential_equation(num_steps: int, eta: float) -> None:
    """Flow-GRPO's update, x + [v + g^2/(2s) (x + (1-s) v)] dt + g sqrt(-dt) z, written out (arXiv 2505.05470)."""
    grid = flow_grid(num_steps)
    x, v, z = torch.randn(3, 5, generator=torch.Generator().manual_seed(num_steps))
    for name in ("flow_grpo", "dance_grpo"):
        table = SAMPLERS[name](grid, eta)
        for i in range(num_steps):
            s, dt = grid.sigma[i], grid.sigma_next[i] - grid.sigma[i]
            denominator = 1 - grid.sigma_next[i] if s == 1 else 1 - s
            g = eta * (s / denominator).sqrt() if name == "flow_grpo" else torch.tensor(eta)
            expected = x + (v + g**2 / (2 * s) * (x + (1 - s) * v)) * dt + g * (-dt).sqrt() * z
            ours = table.alpha_next[i] * (x - s * v) + table.kept[i] * (x + (1 - s) * v) + table.fresh[i] * z
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_a_flow_sde_that_begins_just_below_one_is_no_wilder(kind: Any) -> None:
    """Wan's grid begins at 1 - 1e-6, SANA's at 1 - 3e-4: there, g would be 700, or 38."""
    scheduler = kind(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    scheduler.set_timesteps(20)
    grid = Schedule(scheduler).grid()
    assert 0 < grid.alpha[0] < 5e-4
    table = SAMPLERS["flow_grpo"](grid, 0.7)
    assert table.fresh.max() < 0.8 and table.kept.abs().max() < 1


def test_flow_sde_refuses_stable_diffusion() -> None:
    with pytest.raises(ValueError, match="linear flow"):
        SAMPLERS["flow_grpo"](grid_of(stable_diffusion_scheduler(), 10), 0.7)


def test_ancestral_ddim_has_no_room_on_a_flow() -> None:
    """On a flow sigma^2 < 1 - alpha^2, so near the end eta = 1 asks for more fresh noise than sigma'."""
    with pytest.raises(ValueError, match="lower eta"):
        ddim(flow_grid(10), 1.0)


@pytest.mark.parametrize(
    ("sampler", "eta", "reason"), [("ode", 0.5, "eta must be 0"), ("renoise", 0.5, "eta must be 1"), ("ddim", 3.0, "lower eta")]
)
def test_impossible_eta_is_refused(sampler: str, eta: float, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SAMPLERS[sampler](grid_of(stable_diffusion_scheduler(), 10), eta)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_predictions_are_inverted(kind: str) -> None:
    x0, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    alpha = torch.tensor(0.6)
    sigma = torch.tensor(0.4 if kind == "flow" else 0.8)
    x = alpha * x0 + sigma * noise
    output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0, "flow": noise - x0}[kind]
    found = to_x0_and_noise(kind, output, x, alpha, sigma)
    torch.testing.assert_close(found, (x0, noise), rtol=1e-5, atol=1e-5)


def test_densities_are_those_of_torch() -> None:
    mean, other, x = torch.randn(3, 5, 2, 3, generator=torch.Generator().manual_seed(0))
    std = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0]).view(5, 1, 1)
    p, q = torch.distributions.Normal(mean, std), torch.distributions.Normal(other, std)
    torch.testing.assert_close(log_density(x, mean, std, "sum"), p.log_prob(x).sum((1, 2)))
    torch.testing.assert_close(log_density(x, mean, std), p.log_prob(x).mean((1, 2)))
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(gaussian_kl(mean, other, std, "sum"), expected.sum((1, 2)))
    assert math.isclose(gaussian_kl(mean, mean, std).sum(), 0)


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_preconditioned_outputs_mean_what_their_scheduler_makes_of_them(kind: str, prediction: str) -> None:
    native = getattr(diffusers, kind)(prediction_type=prediction, sigma_data=1.0)
    native.set_timesteps(5)
    schedule = Schedule(native)
    grid = schedule.grid()
    x, output = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    for row in range(5):
        alpha, sigma = grid.alpha[row], grid.sigma[row]
        clean, noise = schedule.split(output[row], x[row], alpha, sigma)
        theirs = native.precondition_outputs(x[row] / alpha, output[row], native.sigmas[row])
        torch.testing.assert_close(clean, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alpha * clean + sigma * noise, x[row], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="is of no kind that is known here"):
        Schedule(getattr(diffusers, kind)(sigma_data=0.5))
