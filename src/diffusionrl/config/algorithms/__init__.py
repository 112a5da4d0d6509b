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
from diffusionrl.config.algorithms.preference import D3POConfig, DPOConfig, KTOConfig
from diffusionrl.config.algorithms.reward_gradient import (
    AlignPropConfig,
    DRaFTConfig,
    DRTuneConfig,
    FlowBPConfig,
    ReFLConfig,
    RewardGradientConfig,
)

__all__ = [
    "ALGORITHMS",
    "AWMConfig",
    "AdvantageConfig",
    "AlgorithmConfig",
    "AlignPropConfig",
    "CRDConfig",
    "CopySchedule",
    "D3POConfig",
    "DDPOConfig",
    "DGPOConfig",
    "DPOConfig",
    "DRTuneConfig",
    "DRaFTConfig",
    "DiffusionRLConfig",
    "EPGConfig",
    "FlowAWRConfig",
    "FlowBPConfig",
    "ForwardProcessConfig",
    "KTOConfig",
    "NFTConfig",
    "ORWConfig",
    "PolicyGradientConfig",
    "RAMConfig",
    "RWRConfig",
    "ReFLConfig",
    "RewardGradientConfig",
    "VGRPOConfig",
]

PolicyGradient = DDPOConfig | DiffusionRLConfig
ForwardProcess = (
    NFTConfig | AWMConfig | RAMConfig | FlowAWRConfig | VGRPOConfig | EPGConfig | DGPOConfig | CRDConfig | ORWConfig | RWRConfig
)
RewardGradient = DRaFTConfig | AlignPropConfig | ReFLConfig | DRTuneConfig | FlowBPConfig
Preference = DPOConfig | KTOConfig | D3POConfig
AlgorithmConfig = PolicyGradient | ForwardProcess | Preference | RewardGradient
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
    "draft": DRaFTConfig,
    "alignprop": AlignPropConfig,
    "refl": ReFLConfig,
    "drtune": DRTuneConfig,
    "flowbp": FlowBPConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "d3po": D3POConfig,
}
