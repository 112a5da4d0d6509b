"""What rewards need, as frozen dataclasses. Nothing here imports torch."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from diffusionrl.config.checks import check_values
from diffusionrl.config.judges import (
    AestheticConfig,
    CLIPScoreConfig,
    CompositionConfig,
    DiffusionClassifierConfig,
    ParityConfig,
    VLMConfig,
)
from diffusionrl.errors import require

BUILT_IN_REWARDS = (
    *("aesthetic", "clip-score", "composition", "composition-judge", "compressibility", "diffusion-classifier", "emoji-gold"),
    *("emoji-judge", "emoji-scene", "emoji-template", "human", "incompressibility", "noise", "parity", "parity-sp"),
    *("parity-squared", "preference", "psnr", "smooth", "ssim", "vlm-bertscore", "vlm-yes"),
)
"""Known here too, so that a misspelt one is found without importing torch."""
DIFFERENTIABLE_REWARDS = ("aesthetic", "clip-score", "composition", "composition-judge", "preference", "psnr", "ssim")
"""Those of them that have a gradient; "smooth" has that of the reward in it."""


@dataclass(frozen=True)
class RemoteConfig:
    """Rewards behind ``diffusionrl serve-reward``, named by their address; see docs/serve_reward.md."""

    token_variable: str = "DIFFUSIONRL_REWARD_TOKEN"
    """The environment variable that holds the server's token, if it wants one."""
    batch_size: int = 16
    """Images in one request."""
    concurrency: int = 4
    """Requests in flight at once."""
    timeout: float = 120.0
    """Seconds for one request."""
    retries: int = 3
    """Tries after the first one, when the server is busy, broken or not there."""
    backoff: float = 1.0
    """Seconds before the first retry; each later one waits twice as long."""

    def __post_init__(self) -> None:
        check_values(self, "rewards.remote.")
        require(self.batch_size >= 1, f"rewards.remote.batch_size must be at least 1, not {self.batch_size}")
        require(self.concurrency >= 1, f"rewards.remote.concurrency must be at least 1, not {self.concurrency}")
        require(self.timeout > 0, f"rewards.remote.timeout must be positive, not {self.timeout}")
        require(self.retries >= 0, f"rewards.remote.retries must not be negative, not {self.retries}")
        require(self.backoff >= 0, f"rewards.remote.backoff must not be negative, not {self.backoff}")


@dataclass(frozen=True)
class SmoothConfig:
    """The reward "smooth": the mean of another one over Gaussian noise on the sample; see docs/rewards.md."""

    reward: str = ""
    """Which one, as in ``reward``, without a weight."""
    sigma: float = 0.1
    """Standard deviation of the noise; images are in [0, 1]."""
    draws: int = 8
    """How often the reward is asked about a sample."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_values(self, "rewards.smooth.")
        require(self.sigma > 0, f"rewards.smooth.sigma must be positive, not {self.sigma}")
        require(self.draws >= 1, f"rewards.smooth.draws must be at least 1, not {self.draws}")
        require(self.reward != "smooth", "rewards.smooth.reward names the reward to be smoothed, not smooth itself")


@dataclass(frozen=True)
class HumanConfig:
    """The reward "human": a person, on a page of this machine; see docs/choose.md."""

    size: int = 16
    """Images of a prompt that are shown at once."""
    port: int = 0
    """Of the page; 0 takes any free one."""

    def __post_init__(self) -> None:
        check_values(self, "rewards.human.")
        require(self.size >= 1, f"rewards.human.size must be at least 1, not {self.size}")
        require(0 <= self.port <= 65535, f"rewards.human.port must lie between 0 and 65535, not {self.port}")


@dataclass(frozen=True)
class RewardsConfig:
    """How rewards are mixed, and what the built-in ones need."""

    timeout: float = 600.0
    """Seconds for one call of the rewards; what takes longer is given up, and its samples are invalid."""
    max_invalid: float = 0.5
    """A run saves and stops when more than this share of the samples of ``invalid_window`` steps has no valid score."""
    invalid_window: int = 3
    frames: int = 8
    """Frames of a video that rewards for images score, spread evenly; their mean counts. 0: all."""
    cache: Path | None = None
    """A file in which scores are kept by sample, prompt and reward settings: what is there is not asked again."""
    normalise: bool = False
    """Take each reward relative to its mean and in units of its standard deviation over the evaluation before training."""
    clip_score: CLIPScoreConfig = field(default_factory=CLIPScoreConfig)
    aesthetic: AestheticConfig = field(default_factory=AestheticConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    composition: CompositionConfig = field(default_factory=CompositionConfig)
    diffusion_classifier: DiffusionClassifierConfig = field(default_factory=DiffusionClassifierConfig)
    vlm: VLMConfig = field(default_factory=VLMConfig)
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    smooth: SmoothConfig = field(default_factory=SmoothConfig)
    human: HumanConfig = field(default_factory=HumanConfig)

    def __post_init__(self) -> None:
        check_values(self, "rewards.")
        require(self.timeout > 0, f"rewards.timeout must be positive, not {self.timeout}")
        require(0 <= self.max_invalid <= 1, f"rewards.max_invalid must lie in [0, 1], not {self.max_invalid}")
        require(self.frames >= 0, f"rewards.frames must not be negative, not {self.frames}")
        require(self.invalid_window >= 1, f"rewards.invalid_window must be at least 1, not {self.invalid_window}")


_A_DAY = 86_400


@dataclass(frozen=True)
class ServeConfig:
    """Serve a reward over HTTP."""

    name: tyro.conf.Positional[str]
    """A built-in reward, package.module:function, or file.py:function."""
    host: str = "127.0.0.1"
    """Where to listen; anywhere but on loopback a token is needed."""
    port: int = 8100
    """0 takes any free one."""
    token_variable: str = "DIFFUSIONRL_REWARD_TOKEN"
    """The environment variable that holds the token that clients must send."""
    batch_size: int = 64
    """Requests that wait are scored together, up to this many images."""
    wait: float = 0.01
    """Seconds that a batch waits for more requests."""
    timeout: float = 120.0
    """Seconds for a request, from its headers to its scores; a client has as many to begin one."""
    max_bytes: int = 64_000_000
    """A longer request is refused unread."""
    max_requests: int = 64
    """Requests at once; the server is busy for more."""
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    """What built-in rewards need."""

    def __post_init__(self) -> None:
        check_values(self)
        require(0 <= self.port <= 65535, f"port must lie between 0 and 65535, not {self.port}")
        require(0 < self.timeout <= _A_DAY, f"timeout must lie between 0 and {_A_DAY} seconds, not {self.timeout}")
        require(0 <= self.wait <= _A_DAY, f"wait must lie between 0 and {_A_DAY} seconds, not {self.wait}")
        for what in ("batch_size", "max_bytes", "max_requests"):
            require(getattr(self, what) >= 1, f"{what} must be at least 1, not {getattr(self, what)}")
