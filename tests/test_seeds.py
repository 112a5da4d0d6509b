"""Randomness is addressed: it depends on its address and on nothing else."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusionrl import seeds

addresses = st.tuples(
    st.integers(0, 2**31), st.sampled_from(["rollout", "evaluation"]), st.integers(0, 10**6), st.integers(-5, 10**6)
)


@given(addresses, addresses)
def test_addresses_differ_where_their_parts_differ(one: tuple[int, str, int, int], other: tuple[int, str, int, int]) -> None:
    assert (seeds.address(*one) == seeds.address(*other)) == (one == other)


def test_addresses_are_the_same_in_every_process() -> None:
    """Pinned: a changed hash would silently change every published run."""
    assert seeds.address(0, "rollout", 1, 2) == 1330114576639460813


def test_noise_belongs_to_its_sample() -> None:
    together = seeds.normal(0, "rollout", 3, [5, 6, 7], (2, 4))
    assert torch.equal(together[1], seeds.normal(0, "rollout", 3, [6], (2, 4))[0])
    assert not torch.equal(together[0], together[1])
    state = torch.get_rng_state()
    seeds.normal(0, "rollout", 3, [6], (2, 4))
    assert torch.equal(torch.get_rng_state(), state)
