"""The samples of one prompt: which update they belong to, and which of them are compared with which."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.sampling.rollout import Rollout

Pair = tuple[int, int]
"""A winner and a loser, by their place among the samples."""


def shared_out(rollout: Rollout, updates: int, seed: int, step: int) -> Iterator[list[int]]:
    """Whole groups, by their number, for each update."""
    count = len(rollout.prompts) // rollout.group_size
    order = torch.randperm(count, generator=seeds.torch_generator(seed, "update_order", step))
    for groups in order.tensor_split(updates):
        yield groups.sort().values.tolist()


def pairs_of(rollout: Rollout, count: int) -> list[list[Pair]]:
    """Of each group, at most ``count`` pairs of valid samples: the best against the worst, the second against the last but one,
    and so on. Of equal scores none has won, so they make no pair."""
    values, valid, size = rollout.scores.values.tolist(), rollout.scores.valid.tolist(), rollout.group_size
    found = []
    for first in range(0, len(values), size):
        ranked = sorted((i for i in range(first, first + size) if valid[i]), key=lambda i: -values[i])
        pairs = list(zip(ranked, reversed(ranked), strict=True))[: min(count, len(ranked) // 2)]
        found.append([(winner, loser) for winner, loser in pairs if values[winner] > values[loser]])
    return found


def labels_of(pairs: Sequence[Sequence[Pair]], samples: int) -> Tensor:
    """1 for each winner, -1 for each loser, 0 for the samples that are in no pair, (samples,)."""
    labels = torch.zeros(samples)
    for winner, loser in (pair for group in pairs for pair in group):
        labels[winner], labels[loser] = 1.0, -1.0
    return labels


def both(rows: Tensor) -> Tensor:
    """Rows of pairs, (winner, loser - winner, ...), as rows of their samples: first all winners', then all losers'. A loser is
    kept as its distance, so that a row stays true when samples are counted from where a process's own begin.

    (R, K) -> (2R, K - 1)
    """
    winners = rows[:, [0, *range(2, rows.shape[1])]]
    losers = winners.clone()
    losers[:, 0] += rows[:, 1]
    return torch.cat([winners, losers])


def compare(gains: Tensor, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Bradley and Terry's loss, -log sigmoid(beta * (winner's gain - loser's)), (R,), and what to log.

    Args:
        gains: how much likelier than the reference model the policy is to make a sample, in units of 1 / beta; of the winners
            and then of the losers, (2R,).
    """
    chosen, rejected = gains.chunk(2)
    margin = chosen - rejected
    return -torch.nn.functional.logsigmoid(beta * margin), {
        "policy/chosen_gain": chosen.detach(),
        "policy/rejected_gain": rejected.detach(),
        "policy/ranked_right": (margin.detach().sign() + 1) / 2,
    }
