"""Scores to advantages."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusionrl.algorithms.advantages import PromptStatistics, batch_advantages, group_advantages
from diffusionrl.rewards import Scores


def scores(values: list[float], valid: list[bool] | None = None) -> Scores:
    return Scores(torch.tensor(values).float(), torch.tensor(valid or [True] * len(values)))


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40))
def test_batch_advantages_are_centred_and_scaled(values: list[float]) -> None:
    found = batch_advantages(scores(values))
    assert found.isfinite().all()
    spread = torch.tensor(values).std(correction=0)
    if spread > 1:
        assert found.mean().abs() < 1e-3
        assert found.std(correction=0).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("value", [3.0, 30.1000023, -1000.1, 1e-8])
def test_equal_scores_have_no_advantage(value: float) -> None:
    same = scores([value] * 4)
    for found in (
        batch_advantages(same),
        group_advantages(same, list("aabb")),
        PromptStatistics(4, 1).advantages(same, list("aabb")),
    ):
        assert found.abs().max() < 1e-6


def test_invalid_samples_leave_the_baseline_and_have_no_advantage() -> None:
    with_invalid = scores([1, 2, 3, 1e6], [True, True, True, False])
    without = scores([1, 2, 3])
    for method in (
        batch_advantages,
        lambda s: group_advantages(s, ["a"] * len(s.values)),
        lambda s: PromptStatistics(8, 1).advantages(s, ["a"] * len(s.values)),
    ):
        found = method(with_invalid)
        assert found[3] == 0
        torch.testing.assert_close(found[:3], method(without))


def test_no_valid_sample_gives_zeros() -> None:
    none = scores([1, 2], [False, False])
    for found in (
        batch_advantages(none),
        group_advantages(none, ["a", "a"]),
        PromptStatistics(4, 1).advantages(none, ["a", "a"]),
    ):
        assert torch.equal(found, torch.zeros(2))


def test_groups_are_compared_within_themselves() -> None:
    found = group_advantages(scores([1, 2, 101, 102]), ["a", "a", "b", "b"])
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, -1.0, 1.0]), rtol=1e-4, atol=1e-4)


def test_prompt_statistics_fall_back_until_they_have_seen_enough() -> None:
    statistics = PromptStatistics(buffer_size=8, min_count=4)
    first = scores([0, 2, 10, 12])
    torch.testing.assert_close(statistics.advantages(first, ["a", "a", "b", "b"]), batch_advantages(first))
    second = statistics.advantages(scores([0, 2, 10, 12]), ["a", "a", "b", "b"])
    torch.testing.assert_close(second, torch.tensor([-1.0, 1.0, -1.0, 1.0]), rtol=1e-4, atol=1e-4)


def test_prompt_statistics_forget_the_oldest() -> None:
    statistics = PromptStatistics(buffer_size=2, min_count=2)
    statistics.advantages(scores([1000, 1, 3]), ["a", "a", "a"])
    assert statistics.state_dict() == {"a": [1.0, 3.0]}


def test_prompt_statistics_forget_prompts_that_have_not_been_sampled_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does the state that a run goes on from: the order is in it."""
    monkeypatch.setattr("diffusionrl.algorithms.advantages._REMEMBERED", 3)
    straight, resumed = PromptStatistics(4, 2), PromptStatistics(4, 2)
    for prompt in "abcad":
        straight.advantages(scores([1, 2]), [prompt] * 2)
        resumed.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
        resumed.advantages(scores([1, 2]), [prompt] * 2)
    assert list(straight.state_dict()) == list(resumed.state_dict()) == ["c", "a", "d"]
    assert straight.state_dict()["a"] == resumed.state_dict()["a"] == [1, 2, 1, 2]
    several = straight.advantages(scores([1, 3] * 5), list("vvwwxxyyzz"))
    torch.testing.assert_close(several, torch.tensor([-1.0, 1.0] * 5))  # more in a step than are remembered
    assert len(straight.state_dict()) == 3


def test_prompt_statistics_take_whole_numbers() -> None:
    statistics = PromptStatistics(buffer_size=4, min_count=2)
    found = statistics.advantages(Scores(torch.tensor([1, 2]).float(), torch.tensor([True, True])), ["a", "a"])
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0]), rtol=1e-4, atol=1e-4)


def test_prompt_statistics_survive_a_round_trip() -> None:
    first, second = PromptStatistics(4, 2), PromptStatistics(4, 2)
    first.advantages(scores([1, 2, 3]), ["a", "a", "b"])
    second.load_state_dict(first.state_dict())
    later = scores([5, 6, 7])
    assert torch.equal(first.advantages(later, ["a", "b", "b"]), second.advantages(later, ["a", "b", "b"]))
