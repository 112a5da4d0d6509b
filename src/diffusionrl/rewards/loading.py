"""Rewards by name."""

from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.errors import one_of
from diffusionrl.rewards.base import REGISTRY, Reward, find_function
from diffusionrl.rewards.frames import OnFrames
from diffusionrl.rewards.remote import RemoteReward


def load_reward(name: str, config: RewardsConfig | None = None) -> Reward:
    """A built-in reward by name, ``package.module:function`` (looked up from the working directory too), or the address of one
    that is served (``rewards.remote``).

    Raises:
        UserError: no such reward, it does not import, or what it is built from is not there.
    """
    config = config or RewardsConfig()
    if name in REGISTRY:
        return OnFrames(REGISTRY[name](config), name, config.frames)
    if name.startswith(("http://", "https://")):
        return OnFrames(RemoteReward(name, config.remote), name, config.frames)
    if ":" not in name:
        raise one_of("reward", name, REGISTRY, "; your own is package.module:function")
    return find_function("reward", name, "(images, prompts, metadata) -> scores")
