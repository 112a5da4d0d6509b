"""``diffusionrl plan``."""

from collections.abc import Sequence

from diffusionrl.cli.parsing import configured, quiet_libraries, take
from diffusionrl.errors import UserError


def run(arguments: Sequence[str]) -> int:
    named, rest = take(list(arguments), "--card")
    given, rest = take(rest, "--rate")
    rate = _rate(given)
    config = configured(rest, "plan")
    quiet_libraries()
    import torch

    from diffusionrl import devices
    from diffusionrl.doctor.costs import limit_bytes
    from diffusionrl.doctor.plan import Card, layout, make_plan, read_card
    from diffusionrl.policies.trained import begin_from_run
    from diffusionrl.runs.places import located

    if named is None:
        device = torch.device(devices.choose(config.policy.device))
        card = Card(limit_bytes(device), devices.own_memory(device) is not None)
    else:
        card = read_card(named)
    plan = make_plan(begin_from_run(located(config)), card)
    print(layout(plan, rate))
    return 0 if plan.fits else 1


def _rate(given: str | None) -> float | None:
    """Operations a second of a number of TFLOP/s. Raises UserError."""
    try:
        rate = None if given is None else float(given) * 1e12
    except ValueError:
        rate = -1.0
    if rate is not None and not 0 < rate < float("inf"):
        raise UserError(f"--rate is the card's sustained TFLOP/s, a positive number, not {given!r}")
    return rate
