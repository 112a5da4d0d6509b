"""Alignment by a vision-language model behind any OpenAI-compatible server (vLLM, llama.cpp, Ollama).

``vlm-bertscore`` is DDPO's alignment reward (arXiv 2305.13301, Sec. 5.3): the model describes the image, and the reward is
BERTScore's recall of the prompt in the description. ``vlm-yes`` asks a yes/no question and takes the probability of yes over
that of yes and no (as VQAScore, arXiv 2404.01291).

A sample whose question is not answered, or not answered properly, is invalid, with the server's own words as the reason.
"""

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from diffusionrl.config.judges import VLMConfig
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.rewards.base import Reward, Scores, register
from diffusionrl.rewards.bertscore import BERTScore
from diffusionrl.rewards.chat import ChatClient
from diffusionrl.rewards.http import BadAnswer


class VLMReward:
    """Asks one question an image, concurrently, and turns each answer into a score.

    Attributes:
        counts: how many answers were asked of the server ("asked", tries included), read from the cache ("cached"), and not
            obtained ("failed").
        range: of the scores.
    """

    def __init__(
        self,
        config: VLMConfig,
        question: str,
        options: dict[str, Any],
        read: Callable[[dict[str, Any], str], float],
        limits: tuple[float, float],
    ) -> None:
        self.range = limits
        self.config, self.question, self.options, self.read = config, question, options, read
        self.client = ChatClient(config)

    @property
    def counts(self) -> dict[str, int]:
        return self.client.counts

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            results = list(pool.map(self._score, images, prompts))
        values = torch.tensor([result if isinstance(result, float) else math.nan for result in results])
        errors = [result for result in results if isinstance(result, str)]
        return Scores(values, values.isfinite(), errors[-1] if errors else None)

    def _score(self, image: Tensor, prompt: str) -> float | str:
        """The score, or why there is none."""
        try:
            return self.client.ask(
                image, self.question.replace("{prompt}", prompt), self.options, lambda answer: self.read(answer, prompt)
            )
        except Exception as error:  # the text model may fail on one answer in any way, and the others have their scores
            said = str(error) if isinstance(error, BadAnswer) else f"{type(error).__name__}: {error}"
            return f"{said} (asked about {prompt!r})"


def read_text(answer: dict[str, Any]) -> str:
    """The text of a chat completion.

    Raises:
        BadAnswer: there is none.
    """
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise BadAnswer(f"the reply is no chat completion: {json.dumps(answer)[:200]}") from error
    if not isinstance(text, str) or not text.strip():
        raise BadAnswer("the reply holds no text")
    return text


def read_probability_of_yes(answer: dict[str, Any]) -> float:
    """P(yes) / (P(yes) + P(no)) over the likeliest first tokens, whatever their case and spaces.

    Raises:
        BadAnswer: no log-probabilities, neither yes nor no among them, or numbers that are none.
    """
    try:
        candidates = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = [(str(each["token"]).strip(" \t\n▁Ġ\"'.").lower(), float(each["logprob"])) for each in candidates]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BadAnswer("the reply has no log-probabilities: the server must support logprobs and top_logprobs") from error
    if any(not logprob <= 1e-3 for _, logprob in found):
        raise BadAnswer(f"the reply's log-probabilities are none: {found[:3]}")
    yes, no = (sum(math.exp(logprob) for token, logprob in found if token == word) for word in ("yes", "no"))
    if yes + no == 0:
        raise BadAnswer(f"neither yes nor no is among the likeliest first tokens: {[token for token, _ in found]}")
    return yes / (yes + no)


@register("vlm-bertscore")
def vlm_bertscore(config: RewardsConfig) -> Reward:
    """BERTScore recall of "The image contains PROMPT" in the model's description, in [-1, 1]."""
    settings = config.vlm
    bertscore = BERTScore(settings.bert, settings.bert_revision, settings.bert_layer)

    def read(answer: dict[str, Any], prompt: str) -> float:
        return bertscore.recall([read_text(answer)], [settings.reference.replace("{prompt}", prompt)])[0]

    return VLMReward(settings, settings.describe, {"max_tokens": settings.max_tokens, "temperature": 0}, read, (-1.0, 1.0))


@register("vlm-yes")
def vlm_yes(config: RewardsConfig) -> Reward:
    """The probability that the model answers yes, in [0, 1]."""
    options = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    return VLMReward(config.vlm, config.vlm.ask, options, lambda answer, prompt: read_probability_of_yes(answer), (0.0, 1.0))
