"""What a diffusers scheduler says of a path. This is all that is known by kind, and it is kinds of schedulers, not of models.

A scheduler's class and configuration tell its kind:

- flow: ``FlowMatch*``, or ``use_flow_sigmas``, or flow prediction; alpha = 1 - s, sigma = s (``invert_sigmas`` counts upwards
  and negates what the network says);
- noise over signal (Euler, DPM++, UniPC ...): s = sigma / alpha, so alpha = 1 / sqrt(1 + s^2). Latents are kept at unit scale,
  alpha^2 + sigma^2 = 1, where ``scale_model_input`` is the identity;
  EDM's, preconditioned to data of deviation 1, make x0 = alpha x - sigma v of it; where their configuration says "epsilon",
  what the network says is -v;
- alpha-bars (DDIM, DDPM, PNDM): alpha = sqrt(abar).

Its grid is taken as it is. Only the step is ours, of first order: a second visit of a time (Heun, PNDM) is left out.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from diffusionrl.errors import UserError
from diffusionrl.transitions import Grid, Prediction, to_x0_and_noise

_ALPHA_BARS = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler")
_SIGMAS = (
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"),
    *("SASolverScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"),
)
_PRECONDITIONED = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")
_FIRST_ORDER = ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "DDIMScheduler", "DDIMParallelScheduler")


Kind = Literal["flow", "noise over signal", "alpha-bars"]


def kind_of(name: str, config: Mapping[str, Any]) -> Kind:
    """Of a scheduler by its class and configuration. Raises UserError where it is not known."""
    if name in _ALPHA_BARS and config.get("prediction_type") == "flow_prediction":
        raise UserError(
            f"the pipeline's {name} says flow_prediction, and its steps are none of a flow: give it its own scheduler"
        )
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return "flow"
    if name in _ALPHA_BARS:
        return "alpha-bars"
    if name in _SIGMAS and not (name in _PRECONDITIONED and config.get("sigma_data") != 1):
        return "noise over signal"
    known = ", ".join(["FlowMatchEulerDiscreteScheduler", *_ALPHA_BARS, *_SIGMAS])
    raise UserError(
        f"the pipeline cannot be asked for its grid: its scheduler, {name}, is of no kind that is known here. Save the "
        f"pipeline with one of {known}"
    )


class Schedule:
    """A native scheduler, read.

    Attributes:
        first_order: whether its own step is ours with ``ode``; otherwise a plain call draws a little differently.

    Raises:
        UserError: its kind is not known.
    """

    def __init__(self, scheduler: Any) -> None:
        config, self.name = scheduler.config, type(scheduler).__name__
        self.scheduler, self.kind, self.inverted = scheduler, kind_of(self.name, config), bool(config.get("invert_sigmas"))
        self.prediction: Prediction = "flow" if self.kind == "flow" else config.get("prediction_type", "epsilon")
        self._negated = self.inverted
        if self.name in _PRECONDITIONED and self.prediction == "epsilon":
            self.prediction, self._negated = "v_prediction", True
        self.first_order = self.name in _FIRST_ORDER

    def grid(self) -> Grid:
        """Of the times that the scheduler was last set to."""
        if self.kind == "alpha-bars":
            return self._grid_of_alpha_bars()
        s, times = self.scheduler.sigmas.float().cpu(), self.scheduler.timesteps.float().cpu()
        kept = torch.cat([torch.ones(1, dtype=torch.bool), s[1:-1] != s[:-2]])
        s = torch.cat([s[:-1][kept], s[-1:]])
        if self.kind == "flow":
            sigma = 1 - s if self.inverted else s
            alpha = 1 - sigma
        else:
            alpha = (1 + s**2).rsqrt()
            sigma = s * alpha
        return Grid(times[kept], alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])

    def _grid_of_alpha_bars(self) -> Grid:
        native, times = self.scheduler, torch.unique_consecutive(self.scheduler.timesteps.cpu())
        bars, count = native.alphas_cumprod.float().cpu(), native.config.num_train_timesteps
        following = times - count // native.num_inference_steps
        final = torch.as_tensor(getattr(native, "final_alpha_cumprod", 1.0)).float().cpu()
        now, then = bars[times], torch.where(following >= 0, bars[following.clamp(min=0)], final)
        return Grid(times.float(), now.sqrt(), (1 - now).sqrt(), then.sqrt(), (1 - then).sqrt())

    def native_sigma(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """A noise level as the scheduler counts it."""
        if self.kind == "flow":
            return 1 - sigma if self.inverted else sigma
        return sigma / alpha

    def split(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The (x0, noise) that a network's output implies."""
        return to_x0_and_noise(self.prediction, -output if self._negated else output, x, alpha, sigma)
