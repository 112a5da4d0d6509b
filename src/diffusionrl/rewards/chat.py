"""Questions about images for an OpenAI-compatible server: a cache on disk, and a count of what was asked."""

import base64
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import Tensor

from diffusionrl.config.judges import VLMConfig
from diffusionrl.data.images import to_png
from diffusionrl.errors import UserError
from diffusionrl.rewards.cache import AnswerCache
from diffusionrl.rewards.http import BadAnswer, JSONClient


class ChatClient:
    """Asks one server about images; a request's id is that of its image and question.

    Raises:
        UserError: no model is named, or the cache cannot be opened.
    """

    def __init__(self, config: VLMConfig) -> None:
        if not config.model:
            raise UserError(f"rewards.vlm.model is needed: the name of the model that {config.url} serves")
        self.config = config
        url, key_variable = f"{config.url.rstrip('/')}/chat/completions", config.api_key_variable
        self._http = JSONClient(
            url, config.concurrency, config.timeout, config.retries, config.backoff, key_variable, "a chat completion"
        )
        self.counts = self._http.counts
        self.counts["cached"] = 0
        self._cache = AnswerCache(config.cache.expanduser()) if config.cache else None

    def ask(self, image: Tensor, question: str, options: dict[str, Any], read: Callable[[dict[str, Any]], float]) -> float:
        """What ``read`` finds in the answer about one image, (3, H, W) in [0, 1]. An answer that it refuses is not kept; one
        that was kept all the same is asked for again.

        Raises:
            BadAnswer: no proper answer after all tries.
            Exception: whatever else ``read`` raises.
        """
        png = to_png(image)
        request = {"url": self.config.url, "model": self.config.model, "question": question, **options}
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode() + png).hexdigest()
        kept = self._cache.get(key) if self._cache else None
        if kept is not None:
            with suppress(BadAnswer):
                value = read(kept)
                self._http.count("cached")
                return value
        url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        body = {"model": self.config.model, "messages": [{"role": "user", "content": content}], **options}
        try:
            answer = self._http.post(json.dumps(body).encode(), key)
            value = read(answer)
        except Exception:
            self._http.count("failed")
            raise
        if self._cache:
            self._cache.put(key, answer)
        return value
