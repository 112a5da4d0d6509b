"""A blind run, in which every sample counts alike, whatever it scores."""

from collections.abc import Sequence
from typing import Any

import own_points
import pytest
import torch
from torch import Tensor

from diffusionrl import TrainConfig, UserError
from diffusionrl.algorithms import make_algorithm
from diffusionrl.config import (
    ALGORITHMS,
    AlgorithmConfig,
    DDPOConfig,
    DRaFTConfig,
    EvaluationConfig,
    GRPOConfig,
    OptimizerConfig,
    RWRConfig,
    SamplingConfig,
)
from diffusionrl.data.prompts import Prompt
from diffusionrl.training.trainer import Trainer

FORWARD = [ALGORITHMS[name] for name in ("nft", "awm", "ram", "flow-awr", "v-grpo", "epg", "dgpo", "kto", "orw")]
FEW: dict[str, Any] = {"noisings": 2, "levels": (0.0, 0.9)}
WEIGHED: list[AlgorithmConfig] = [
    RWRConfig(updates_per_step=2, batch_size=4),
    RWRConfig(variant="sparse", updates_per_step=2, batch_size=4),
    *(kind(**FEW) for kind in FORWARD),  # type: ignore[call-arg]
    DDPOConfig(normalisation="group"),
    GRPOConfig(),
]
REGRESSIONS = ("rwr", "orw")
"""Those that learn from equal scores, by weights of mean 1."""


def alike(points: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
    return torch.ones(len(points))


def last_is_broken(points: Tensor, prompts: Sequence[str], metadata: Any) -> list[float | None]:
    return [*alike(points, prompts, metadata).tolist()[:-1], None]


def moved(algorithm: AlgorithmConfig, reward: Any, blind: bool) -> Tensor:
    """How far a step takes each weight. An epsilon that is far above the gradient makes it proportional to that."""
    config = TrainConfig(
        prompts_per_step=2,
        samples_per_prompt=2,
        blind=blind,
        sampling=SamplingConfig(num_steps=3, sampler="cps", eta=0.7, guidance=1.0, batch_size=4),
        algorithm=algorithm,
        optimizer=OptimizerConfig(learning_rate=1.0, epsilon=1e3, weight_decay=0.0),
        evaluation=EvaluationConfig(num_samples=2),
    )
    policy = own_points.make_policy(own_points.LORA, 0)
    trainer = Trainer(policy, reward, [Prompt("a", {"place": (1.0, 0.0)})], make_algorithm(config), config)
    before = torch.cat([weight.detach().flatten().clone() for weight in policy.trainable().values()])
    trainer.step(1)
    return torch.cat([weight.detach().flatten() for weight in policy.trainable().values()]) - before


@pytest.mark.parametrize("algorithm", WEIGHED, ids=lambda each: each.name)
def test_a_blind_run_moves_and_looks_at_no_score(algorithm: AlgorithmConfig) -> None:
    first = moved(algorithm, own_points.to_the_right, blind=True)
    assert first.any()
    assert torch.equal(first, moved(algorithm, alike, blind=True))
    assert not torch.allclose(first, moved(algorithm, own_points.to_the_right, blind=False), rtol=1e-2), "the others look"


@pytest.mark.parametrize("algorithm", WEIGHED, ids=lambda each: each.name)
def test_equal_scores_teach_what_is_relative_nothing(algorithm: AlgorithmConfig) -> None:
    """Whence its blind run needs a weight that equal scores do not give; a regression's is what they give."""
    blind, equal = moved(algorithm, alike, blind=True), moved(algorithm, alike, blind=False)
    if algorithm.name in REGRESSIONS:
        assert torch.allclose(blind, equal, rtol=1e-4)
    else:
        assert equal.norm() < 1e-4 * blind.norm()


def test_a_sample_without_a_score_counts_nothing() -> None:
    few = RWRConfig(updates_per_step=2, batch_size=4)
    assert not torch.equal(moved(few, alike, True), moved(few, last_is_broken, True))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"algorithm": ALGORITHMS["dpo"]()}, "learns from pairs"),
        ({"algorithm": ALGORITHMS["d3po"]()}, "learns from pairs"),
        ({"algorithm": DRaFTConfig()}, "follows the reward's gradient"),
        ({"redraw_queries": 8}, "looks at scores"),
        ({"algorithm": ALGORITHMS["kto"](), "preferences": "pairs"}, "judged images are labels"),
    ],
)
def test_what_has_no_blind_run(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TrainConfig(blind=True, samples_per_prompt=4, prompts_per_step=8, **settings)
