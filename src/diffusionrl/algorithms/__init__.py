"""Algorithms: one file each; what a family shares is in ``policy_gradient.py`` and ``forward_process.py``."""

from collections.abc import Callable
from typing import Any

from diffusionrl.algorithms.awm import AWM
from diffusionrl.algorithms.base import Algorithm
from diffusionrl.algorithms.crd import CRD
from diffusionrl.algorithms.ddpo import DDPO
from diffusionrl.algorithms.dgpo import DGPO
from diffusionrl.algorithms.diffusionrl import DiffusionRL
from diffusionrl.algorithms.epg import EPG
from diffusionrl.algorithms.flow_awr import FlowAWR
from diffusionrl.algorithms.flow_dppo import FlowDPPO
from diffusionrl.algorithms.grpo import GRPO
from diffusionrl.algorithms.grpo_fast import GRPOFast
from diffusionrl.algorithms.grpo_guard import GRPOGuard
from diffusionrl.algorithms.mixgrpo import MixGRPO
from diffusionrl.algorithms.nft import NFT
from diffusionrl.algorithms.orw import ORW
from diffusionrl.algorithms.ram import RAM
from diffusionrl.algorithms.rwr import RWR
from diffusionrl.algorithms.tempflow import TempFlow
from diffusionrl.algorithms.v_grpo import VGRPO
from diffusionrl.config import TrainConfig

__all__ = [
    "AWM",
    "CRD",
    "DDPO",
    "DGPO",
    "EPG",
    "GRPO",
    "NFT",
    "ORW",
    "RAM",
    "RWR",
    "VGRPO",
    "Algorithm",
    "DiffusionRL",
    "FlowAWR",
    "FlowDPPO",
    "GRPOFast",
    "GRPOGuard",
    "MixGRPO",
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
}


def make_algorithm(config: TrainConfig) -> Algorithm:
    """The algorithm that a configuration names."""
    return _BY_NAME[config.algorithm.name](config.algorithm, config.sampling.guidance)
