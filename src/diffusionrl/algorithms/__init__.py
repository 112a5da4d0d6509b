"""Algorithms: one file each; what a family shares is in ``policy_gradient.py``, ``forward_process.py``, ``reward_gradient.py``
and ``groups.py``."""

from collections.abc import Callable
from typing import Any

from diffusionrl.algorithms.alignprop import AlignProp
from diffusionrl.algorithms.awm import AWM
from diffusionrl.algorithms.base import Algorithm
from diffusionrl.algorithms.crd import CRD
from diffusionrl.algorithms.d3po import D3PO
from diffusionrl.algorithms.ddpo import DDPO
from diffusionrl.algorithms.dgpo import DGPO
from diffusionrl.algorithms.diffusionrl import DiffusionRL
from diffusionrl.algorithms.dpo import DPO
from diffusionrl.algorithms.draft import DRaFT
from diffusionrl.algorithms.drtune import DRTune
from diffusionrl.algorithms.epg import EPG
from diffusionrl.algorithms.flow_awr import FlowAWR
from diffusionrl.algorithms.flow_dppo import FlowDPPO
from diffusionrl.algorithms.flowbp import FlowBP
from diffusionrl.algorithms.grpo import GRPO
from diffusionrl.algorithms.grpo_fast import GRPOFast
from diffusionrl.algorithms.grpo_guard import GRPOGuard
from diffusionrl.algorithms.kto import KTO
from diffusionrl.algorithms.mixgrpo import MixGRPO
from diffusionrl.algorithms.nft import NFT
from diffusionrl.algorithms.orw import ORW
from diffusionrl.algorithms.pso import PSO, OfflinePSO
from diffusionrl.algorithms.ram import RAM
from diffusionrl.algorithms.refl import ReFL
from diffusionrl.algorithms.rwr import RWR
from diffusionrl.algorithms.tempflow import TempFlow
from diffusionrl.algorithms.v_grpo import VGRPO
from diffusionrl.config import TrainConfig

__all__ = [
    "AWM",
    "CRD",
    "D3PO",
    "DDPO",
    "DGPO",
    "DPO",
    "EPG",
    "GRPO",
    "KTO",
    "NFT",
    "ORW",
    "PSO",
    "RAM",
    "RWR",
    "VGRPO",
    "Algorithm",
    "AlignProp",
    "DRTune",
    "DRaFT",
    "DiffusionRL",
    "FlowAWR",
    "FlowBP",
    "FlowDPPO",
    "GRPOFast",
    "GRPOGuard",
    "MixGRPO",
    "OfflinePSO",
    "ReFL",
    "TempFlow",
    "make_algorithm",
]


_BY_NAME: dict[str, Callable[[Any, float], Algorithm]] = {
    "ddpo": DDPO,
    "diffusionrl": DiffusionRL,
    "grpo": GRPO,
    "grpo-fast": GRPOFast,
    "mixgrpo": MixGRPO,
    "grpo-guard": GRPOGuard,
    "flow-dppo": FlowDPPO,
    "tempflow": TempFlow,
    "rwr": RWR,
    "nft": NFT,
    "awm": AWM,
    "ram": RAM,
    "flow-awr": FlowAWR,
    "v-grpo": VGRPO,
    "epg": EPG,
    "dgpo": DGPO,
    "crd": CRD,
    "orw": ORW,
    "draft": DRaFT,
    "alignprop": AlignProp,
    "refl": ReFL,
    "drtune": DRTune,
    "flowbp": FlowBP,
    "dpo": DPO,
    "kto": KTO,
    "d3po": D3PO,
    "pso": PSO,
    "pso-offline": OfflinePSO,
}


def make_algorithm(config: TrainConfig) -> Algorithm:
    """The algorithm that a configuration names."""
    return _BY_NAME[config.algorithm.name](config.algorithm, config.sampling.guidance)
