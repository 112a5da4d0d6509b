"""Rewards by name."""

from collections.abc import Sequence

from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.errors import UserError, one_of, require
from diffusionrl.foreign.finding import find_function
from diffusionrl.rewards.base import REGISTRY, Reward, register
from diffusionrl.rewards.frames import OnFrames
from diffusionrl.rewards.remote import RemoteReward
from diffusionrl.rewards.smooth import Smoothed
from diffusionrl.runs.places import EMBEDDED


def load_reward(name: str, config: RewardsConfig | None = None) -> Reward:
    """A built-in reward by name, ``package.module:function`` (looked up from the working directory too), ``file.py:function``,
    or the address of one that is served (``rewards.remote``).

    Raises:
        UserError: no such reward, it does not import, or what it is built from is not there.
    """
    config = config or RewardsConfig()
    if name in ("noise", "smooth"):  # which take any samples, or what the reward in it takes
        return REGISTRY[name](config)
    if name in REGISTRY:
        return OnFrames(REGISTRY[name](config), name, config.frames)
    if name.startswith(("http://", "https://")):
        return OnFrames(RemoteReward(name, config.remote), name, config.frames)
    if ":" not in name:
        raise one_of("reward", name, REGISTRY, "; your own is package.module:function or file.py:function")
    return find_function("reward", name, "(images, prompts, metadata) -> scores")


@register("smooth")
def smooth(config: RewardsConfig) -> Reward:
    """What ``rewards.smooth`` says."""
    inner = config.smooth
    require(bool(inner.reward), "the reward smooth needs another one in it: name it with --rewards.smooth.reward")
    return Smoothed(load_reward(inner.reward, config), inner.sigma, inner.draws, inner.seed)


def require_world(names: Sequence[str], config: RewardsConfig, model: str) -> None:
    """Judges of the embedded world know nothing of the images of other models.

    Args:
        names: of rewards, as ``load_reward`` takes them.
        model: whose images they are to score, as the user named it.

    Raises:
        UserError: one of them would judge another model's images.
    """
    if model in EMBEDDED:
        return
    own = {
        "aesthetic": ("rewards.aesthetic.model", config.aesthetic.model),
        "clip-score": ("rewards.clip-score.model", config.clip_score.model),
        "composition": ("rewards.composition.model", config.composition.model),
        "diffusion-classifier": ("rewards.diffusion-classifier.model", config.diffusion_classifier.model),
    }
    if config.parity.attribute == "clip":
        own |= dict.fromkeys(_PARITIES, ("rewards.parity.clip.model", config.parity.clip.model))
    elif config.parity.attribute == "emoji-skin-tone":
        own |= dict.fromkeys(_PARITIES, ("rewards.parity.attribute", "emoji"))
    for name in (*names, *((config.smooth.reward,) if "smooth" in names else ())):
        setting, judge = own.get(name, ("", "emoji" if name in _EMBEDDED_ALONE else ""))
        if judge in EMBEDDED:
            remedy = f"name its own with --{setting}" if setting else "choose another reward"
            raise UserError(f"the reward {name} judges images of the embedded world alone, not those of {model}: {remedy}")


_PARITIES = ("parity", "parity-sp", "parity-squared")
_EMBEDDED_ALONE = ("composition-judge", "emoji-gold", "emoji-judge", "emoji-scene", "emoji-template", "preference")
