"""The settings of each algorithm, as frozen dataclasses. Nothing here imports torch."""

from diffusionrl.config.algorithms.advantages import AdvantageConfig
from diffusionrl.config.algorithms.forward_process import (
    AWMConfig,
    CopySchedule,
    CRDConfig,
    DGPOConfig,
    EPGConfig,
    FlowAWRConfig,
    ForwardProcessConfig,
    NFTConfig,
    ORWConfig,
    RAMConfig,
    RWRConfig,
    VGRPOConfig,
)
from diffusionrl.config.algorithms.policy_gradient import DDPOConfig, DiffusionRLConfig, PolicyGradientConfig

__all__ = [
    "ALGORITHMS",
    "AWMConfig",
    "AdvantageConfig",
    "AlgorithmConfig",
    "CRDConfig",
    "CopySchedule",
    "DDPOConfig",
    "DGPOConfig",
    "DiffusionRLConfig",
    "EPGConfig",
    "FlowAWRConfig",
    "ForwardProcessConfig",
    "NFTConfig",
    "ORWConfig",
    "PolicyGradientConfig",
    "RAMConfig",
    "RWRConfig",
    "VGRPOConfig",
]

PolicyGradient = DDPOConfig | DiffusionRLConfig
ForwardProcess = (
    NFTConfig | AWMConfig | RAMConfig | FlowAWRConfig | VGRPOConfig | EPGConfig | DGPOConfig | CRDConfig | ORWConfig | RWRConfig
)
AlgorithmConfig = PolicyGradient | ForwardProcess
ALGORITHMS: dict[str, type[AlgorithmConfig]] = {
    "ddpo": DDPOConfig,
    "diffusionrl": DiffusionRLConfig,
    "rwr": RWRConfig,
    "nft": NFTConfig,
    "awm": AWMConfig,
    "ram": RAMConfig,
    "flow-awr": FlowAWRConfig,
    "v-grpo": VGRPOConfig,
    "epg": EPGConfig,
    "dgpo": DGPOConfig,
    "crd": CRDConfig,
    "orw": ORWConfig,
}
