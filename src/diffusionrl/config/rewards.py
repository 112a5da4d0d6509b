"""What rewards need, as frozen dataclasses. Nothing here imports torch."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import tyro

from diffusionrl.config.checks import check_values
from diffusionrl.errors import one_of, require

BUILT_IN_REWARDS = (
    *("aesthetic", "clip-score", "composition", "composition-judge", "compressibility", "diffusion-classifier", "emoji-gold"),
    *("emoji-judge", "incompressibility", "noise", "parity", "parity-sp", "parity-squared", "preference", "psnr", "smooth"),
    *("ssim", "vlm-bertscore", "vlm-yes"),
)
"""Known here too, so that a misspelt one is found without importing torch."""
DIFFERENTIABLE_REWARDS = ("aesthetic", "clip-score", "composition", "composition-judge", "preference", "psnr", "ssim")
"""Those of them that have a gradient; "smooth" has that of the reward in it."""
ATTRIBUTES = ("emoji-skin-tone", "clip", "ita")


@dataclass(frozen=True)
class CLIPScoreConfig:
    """The reward "clip-score"; see docs/rewards.md."""

    model: str = "emoji"
    """"emoji" (the embedded CLIP), a folder, or a hub id: CLIP, SigLIP, PickScore ..."""
    revision: str | None = None
    """The commit of a hub id; ours for openai/clip-vit-large-patch14, to be given for others."""
    processor: str | None = None
    """Where tokenizer and image settings are, if not with the model."""
    processor_revision: str | None = None


PICKSCORE = CLIPScoreConfig(model="yuvalkirstain/PickScore_v1", processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K")


@dataclass(frozen=True)
class AestheticConfig:
    """The reward "aesthetic"; see docs/rewards.md."""

    model: str = "emoji"
    """"emoji" (the embedded CLIP), a folder, or a hub id; LAION's head is for openai/clip-vit-large-patch14."""
    revision: str | None = None
    """The commit of a hub id; ours for openai/clip-vit-large-patch14, to be given for others."""
    head: Path | None = None
    """The head, a safetensors file; that of the embedded CLIP by default."""


@dataclass(frozen=True)
class ParityConfig:
    """The rewards "parity", "parity-sp" and "parity-squared"; see docs/parity.md."""

    attribute: str = "emoji-skin-tone"
    """What is to be spread evenly: "emoji-skin-tone", "clip" (the most similar of ``classes``), "ita" (skin tones of
    photographs), or package.module:function of your own, images -> class indices."""
    credit: Literal["shared", "leave-one-out"] = "shared"
    """What "parity" gives a sample: minus its group's SP, as in the paper; or how rare its class is among the others."""
    classes: tuple[str, ...] = ()
    """For "clip", a text for each class; for a function of your own, their names, if it does not have them itself."""
    clip: CLIPScoreConfig = field(default_factory=CLIPScoreConfig)
    """The CLIP-type model behind "clip"."""

    def __post_init__(self) -> None:
        check_values(self, "rewards.parity.")
        if ":" not in self.attribute and self.attribute not in ATTRIBUTES:
            raise one_of("rewards.parity.attribute", self.attribute, ATTRIBUTES, "; your own is file.py:function")
        own = self.attribute == "clip" or ":" in self.attribute
        require(own or not self.classes, f"rewards.parity.classes is not for {self.attribute}, which has its own")
        require(
            len(self.classes) >= 2 or not (self.classes or self.attribute == "clip"),
            f"rewards.parity.classes must name two classes or more, not {len(self.classes)}",
        )
        require(len(set(self.classes)) == len(self.classes), f"rewards.parity.classes names a class twice: {self.classes}")


@dataclass(frozen=True)
class CompositionConfig:
    """The reward "composition"; see docs/rewards.md."""

    model: str = "emoji"
    """"emoji" (the embedded detector), a folder, or a hub id: OWLv2 or Grounding DINO."""
    revision: str | None = None
    """The commit of a hub id."""
    query: str = "{object}"
    """What the detector is asked for an object; OWLv2 was trained on texts like "a photo of a {object}"."""
    threshold: float = 0.0
    """Boxes of lower confidence do not count; with 0 every box does, and a hint of an object is worth something."""

    def __post_init__(self) -> None:
        check_values(self, "rewards.composition.")
        require(0 <= self.threshold < 1, f"rewards.composition.threshold must lie in [0, 1), not {self.threshold}")
        require("{object}" in self.query, f"rewards.composition.query must hold {{object}}, not {self.query!r}")


@dataclass(frozen=True)
class DiffusionClassifierConfig:
    """The reward "diffusion-classifier", and ``diffusionrl classify``; see docs/classify.md."""

    model: str = "emoji"
    """The judge: as in train; any whose VAE makes latents of images."""
    prompts: tuple[str, ...] = ()
    """What the prompt of an image is compared with: texts; or one built-in set, or file of prompts, such as the run's own."""
    trials: tuple[int, ...] = (8, 32)
    """Noises that a prompt has been tried with at the end of each stage."""
    keep: tuple[int, ...] = (5,)
    """Prompts, the best ones, that go on after each stage but the last."""
    norm: Literal["l2", "l1"] = "l2"
    """Of the error: its squares added up, or its sizes."""
    batch_size: int = 64
    """Predictions at once: memory and speed, not results."""

    def __post_init__(self) -> None:
        name = "rewards.diffusion-classifier"
        check_values(self, f"{name}.")
        require(
            len(self.trials) >= 1 and all(one < other for one, other in pairwise((0, *self.trials))),
            f"{name}.trials must be whole numbers from 1 on, each larger than the one before, not {self.trials}",
        )
        require(
            len(self.keep) == len(self.trials) - 1 and all(one >= 2 for one in self.keep),
            f"{name}.keep must say for each of trials but the last how many prompts go on, 2 or more, not {self.keep}",
        )
        require(self.batch_size >= 1, f"{name}.batch_size must be at least 1, not {self.batch_size}")


@dataclass(frozen=True)
class VLMConfig:
    """The rewards "vlm-bertscore" and "vlm-yes": a vision-language model behind a server; see docs/rewards.md."""

    url: str = "http://127.0.0.1:8000/v1"
    """Where the server's /chat/completions is."""
    model: str = ""
    """The model's name on the server."""
    api_key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key, if the server wants one."""
    describe: str = "Answer concisely: what is going on in this image?"
    """What "vlm-bertscore" asks."""
    reference: str = "The image contains {prompt}"
    """What "vlm-bertscore" compares the answer with."""
    ask: str = "Does this image show {prompt}? Answer yes or no."
    """What "vlm-yes" asks."""
    max_tokens: int = 64
    """Length of a description."""
    concurrency: int = 8
    """Requests in flight at once."""
    timeout: float = 60.0
    """Seconds for one answer."""
    retries: int = 3
    """Tries after the first one, when the server is busy, broken or not there."""
    backoff: float = 1.0
    """Seconds before the first retry; each later one waits twice as long."""
    cache: Path | None = Path("~/.cache/diffusionrl/vlm.sqlite")
    """Answers are kept here, by image and question; None keeps none."""
    bert: str = "microsoft/deberta-xlarge-mnli"
    """The text model of BERTScore: a folder or a hub id with safetensors."""
    bert_revision: str | None = None
    """The commit of a hub id."""
    bert_layer: int = 40
    """The hidden layer that is compared: 40 is bert-score's choice for deberta-xlarge-mnli; -1 is the last."""

    def __post_init__(self) -> None:
        check_values(self, "rewards.vlm.")
        require(self.concurrency >= 1, f"rewards.vlm.concurrency must be at least 1, not {self.concurrency}")
        require(self.timeout > 0, f"rewards.vlm.timeout must be positive, not {self.timeout}")
        require(self.retries >= 0, f"rewards.vlm.retries must not be negative, not {self.retries}")
        require(self.backoff >= 0, f"rewards.vlm.backoff must not be negative, not {self.backoff}")
        require(self.max_tokens >= 1, f"rewards.vlm.max_tokens must be at least 1, not {self.max_tokens}")
        require(
            self.url.startswith(("http://", "https://")),
            f"rewards.vlm.url must begin with http:// or https://, not {self.url!r}",
        )


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
