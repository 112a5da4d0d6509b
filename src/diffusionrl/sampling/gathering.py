"""The scores that several processes gave their own samples."""

from collections.abc import Sequence

from diffusionrl import processes
from diffusionrl.rewards import Scores


def gather_scores(own: Scores, shares: Sequence[range]) -> Scores:
    """The scores of all processes, in the order of the samples; what a reward says on one of them, all know."""
    errors = [error for error in processes.ask(own.error) if error]
    sizes = list(map(len, shares))
    values, valid = processes.gather(own.values, sizes), processes.gather(own.valid, sizes)
    parts = {name: processes.gather(part, sizes) for name, part in own.parts.items()}
    return Scores(values, valid, errors[-1] if errors else None, parts)
