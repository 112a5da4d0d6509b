"""Every setting, as frozen dataclasses. Nothing here imports torch, so that the command line answers at once."""

from diffusionrl.config.algorithms import ALGORITHMS, AlgorithmConfig, DDPOConfig, DiffusionRLConfig, RWRConfig
from diffusionrl.config.model import PolicyConfig, SamplingConfig
from diffusionrl.config.rewards import CLIPScoreConfig, RewardsConfig
from diffusionrl.config.run import TaskConfig, TrainConfig, to_yaml
from diffusionrl.config.training import (
    MIN_PAIRS,
    CheckpointConfig,
    EvaluationConfig,
    GuardConfig,
    OptimizerConfig,
    PretrainingConfig,
)

__all__ = [
    "ALGORITHMS",
    "MIN_PAIRS",
    "AlgorithmConfig",
    "CLIPScoreConfig",
    "CheckpointConfig",
    "DDPOConfig",
    "DiffusionRLConfig",
    "EvaluationConfig",
    "GuardConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "PretrainingConfig",
    "RWRConfig",
    "RewardsConfig",
    "SamplingConfig",
    "TaskConfig",
    "TrainConfig",
    "to_yaml",
]
