"""Every setting, as frozen dataclasses. Nothing here imports torch, so that the command line answers at once."""

from diffusionrl.config.algorithms import (
    ALGORITHMS,
    AlgorithmConfig,
    AWMConfig,
    CRDConfig,
    DDPOConfig,
    DGPOConfig,
    DiffusionRLConfig,
    EPGConfig,
    FlowAWRConfig,
    NFTConfig,
    ORWConfig,
    RAMConfig,
    RWRConfig,
    VGRPOConfig,
)
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
    "AWMConfig",
    "AlgorithmConfig",
    "CLIPScoreConfig",
    "CRDConfig",
    "CheckpointConfig",
    "DDPOConfig",
    "DGPOConfig",
    "DiffusionRLConfig",
    "EPGConfig",
    "EvaluationConfig",
    "FlowAWRConfig",
    "GuardConfig",
    "NFTConfig",
    "ORWConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "PretrainingConfig",
    "RAMConfig",
    "RWRConfig",
    "RewardsConfig",
    "SamplingConfig",
    "TaskConfig",
    "TrainConfig",
    "VGRPOConfig",
    "to_yaml",
]
