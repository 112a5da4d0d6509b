"""The models that rewards are asked of, each as its reward's settings name it. Kept apart from ``rewards``: ``--help`` reads a
module once for each class that it shows."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from diffusionrl.config.checks import check_values
from diffusionrl.errors import one_of, require

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
