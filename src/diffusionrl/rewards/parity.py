"""Statistical parity: how evenly an attribute is spread over the samples of a prompt (DiffusionRL, arXiv 2401.12244).

With A classes and n_a of a prompt's N samples in class a:

    SP = sqrt(sum_a (n_a / N - 1 / A) ** 2)                                                    (the paper's)

and every sample of the group gets -SP (credit "shared", as in the paper). Credit "leave-one-out" is ours: sample i, of class c,
gets

    r_i = 1 / A - (n_c - 1) / (N - 1)

so it is paid by how rare its class is among the others. What a policy with the class probabilities p should climb is
J = -sum_a (p_a - 1 / A) ** 2 = 1 / A - sum_a p_a ** 2, with grad J = -2 sum_a p_a grad p_a = -2 E[p_c grad log p_c]. Among the
others, the share of class c has the mean p_c and does not depend on sample i, and E[grad log p_c] = 0, so

    E[1 / N sum_i r_i grad log p(c_i)] = E[(1 / A - p_c) grad log p_c] = grad J / 2:

the score-function gradient of J without bias, but for a factor of 2. The mean of r_i over the group is the U-statistic of J,
which has no bias either; SP has one (``expected_parity``).

A sample whose attribute cannot be told is invalid and leaves the shares; where fewer than two are left, none has a score.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.rewards.attributes import Attribute, load_attribute
from diffusionrl.rewards.base import NothingSeen, Reward, Scores, register

Credit = Literal["shared", "leave-one-out", "squared"]


def statistical_parity(counts: Tensor) -> Tensor:
    """SP of counts by class, (..., A) -> (...,), float64: 0 where all are equal, sqrt(1 - 1 / A) where one has them all."""
    shares = counts.double() / counts.sum(-1, keepdim=True)
    return (shares - 1 / counts.shape[-1]).square().sum(-1).sqrt()


def squared_distance(counts: Tensor) -> Tensor:
    """Estimate without bias of sum_a (p_a - 1 / A) ** 2 from counts by class, (..., A) -> (...,), float64.

    The share of pairs that are of one class, less 1 / A: it may be negative. At least two samples are needed.
    """
    counts = counts.double()
    total = counts.sum(-1)
    return (counts * (counts - 1)).sum(-1) / (total * (total - 1)) - 1 / counts.shape[-1]


def leave_one_out(classes: Tensor, num_classes: int) -> Tensor:
    """1 / A less the share of the other samples that are of the sample's class, (N,) -> (N,), float64; N is at least 2."""
    counts = torch.bincount(classes, minlength=num_classes).double()
    return 1 / num_classes - (counts[classes] - 1) / (len(classes) - 1)


def expected_parity(group_size: int, num_classes: int) -> float:
    """Mean SP of groups whose members are drawn evenly from the classes: the floor that an SP has to be read against.

    Exact, over the multinomial counts. SP depends on them by their sum of squares alone, so sequences are counted by it, class
    after class, in whole numbers.
    """
    ways = {(0, 0): 1}  # (members, sum of squares) -> in how many orders
    for _ in range(num_classes):
        grown: dict[tuple[int, int], int] = {}
        for (members, squares), number in ways.items():
            for more in range(group_size - members + 1):
                key = (members + more, squares + more * more)
                grown[key] = grown.get(key, 0) + number * math.comb(members + more, more)
        ways = grown
    spread = {squares: number for (members, squares), number in ways.items() if members == group_size}
    total = num_classes**group_size
    return math.fsum(
        number / total * math.sqrt(max(0.0, squares / group_size**2 - 1 / num_classes)) for squares, number in spread.items()
    )


class Parity:
    """The reward: the samples of one prompt, scored by how evenly their classes are spread.

    Args:
        credit: see above; "squared" gives every sample minus the ``squared_distance``.
    """

    whole_groups = True

    def __init__(self, attribute: Attribute, credit: Credit) -> None:
        self.attribute, self.credit = attribute, credit

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        """Raises NothingSeen where fewer than two samples show the attribute."""
        told = self.attribute(images)
        valid = torch.tensor([each is not None for each in told])
        if valid.sum() < 2:
            raise NothingSeen(f"fewer than two of the {len(told)} samples of {prompts[0]!r} show any {self.attribute.name}")
        classes = torch.tensor([each for each in told if each is not None])
        values = torch.zeros(len(told))
        values[valid] = self._scores(classes).float()
        missing = int((~valid).sum())
        return Scores(values, valid, f"{missing} of {len(told)} samples show no {self.attribute.name}" if missing else None)

    def _scores(self, classes: Tensor) -> Tensor:
        num_classes = len(self.attribute.classes)
        if self.credit == "leave-one-out":
            return leave_one_out(classes, num_classes)
        counts = torch.bincount(classes, minlength=num_classes)
        score = statistical_parity(counts) if self.credit == "shared" else squared_distance(counts)
        return -score.expand(len(classes))


@register("parity")
def parity(config: RewardsConfig) -> Reward:
    """What ``rewards.parity.credit`` says."""
    return Parity(load_attribute(config), config.parity.credit)


@register("parity-sp")
def parity_sp(config: RewardsConfig) -> Reward:
    """Minus SP, whatever the credit: the paper's figure, to be held out."""
    return Parity(load_attribute(config), "shared")


@register("parity-squared")
def parity_squared(config: RewardsConfig) -> Reward:
    """Minus the squared distance, without bias, so that groups of different sizes compare: to be held out."""
    return Parity(load_attribute(config), "squared")
