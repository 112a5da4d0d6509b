"""What a reward has said is kept on disk, so that one that costs money or minutes is not asked twice about the same sample."""

import dataclasses
import hashlib
import json
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.data.entries import in_json
from diffusionrl.errors import UserError
from diffusionrl.foreign.finding import code_of
from diffusionrl.rewards.base import Reward, Scores, as_scores, attribute_of, counts_of, innermost, is_differentiable

_NOT_OF_A_SCORE = {"timeout", "max_invalid", "invalid_window", "normalise", "cache", "human"}


class CachedReward:
    """A reward before a cache. A sample is known by its pixels in 8 bits (sounds: by their values), its prompt and metadata,
    the reward's name and settings, and of a function of your own the file that it is in. Invalid scores are not kept. With
    gradient, the reward itself is asked.

    Attributes:
        counts: the reward's own, and "asked" and "cached" samples.
    """

    def __init__(self, reward: Reward, name: str, config: RewardsConfig, cache: "AnswerCache") -> None:
        self.reward, self._cache = reward, cache
        settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_OF_A_SCORE}
        self._about = json.dumps([name, settings, code_of(innermost(reward))["file"]], default=str, sort_keys=True).encode()
        self._counts = {"asked": 0, "cached": 0}
        self.range = attribute_of(reward, "range", (-torch.inf, torch.inf))
        self.differentiable = is_differentiable(reward)

    @property
    def counts(self) -> dict[str, float]:
        return {**counts_of(self.reward), **self._counts}

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scores:
        if samples.requires_grad and torch.is_grad_enabled():
            return as_scores(self.reward(samples, prompts, metadata), prompts, self.range)
        keys = [self._key(*each) for each in zip(samples, prompts, metadata, strict=True)]
        kept = [(self._cache.get(key) or {}).get("score") for key in keys]
        missing = [i for i, score in enumerate(kept) if score is None]
        values = torch.tensor([0.0 if score is None else score for score in kept], dtype=torch.float64)
        valid, error = torch.ones(len(samples), dtype=torch.bool), None
        if missing:
            asked = [prompts[i] for i in missing]
            returned = self.reward(samples[missing], asked, [metadata[i] for i in missing])
            found = as_scores(returned, asked, self.range)
            values[missing], valid[missing], error = found.values, found.valid, found.error
            for i, value, good in zip(missing, found.values.tolist(), found.valid.tolist(), strict=True):
                if good:
                    self._cache.put(keys[i], {"score": value})
        self._counts["asked"] += len(missing)
        self._counts["cached"] += len(samples) - len(missing)
        return Scores(values, valid, error)

    def _key(self, sample: Tensor, prompt: str, metadata: dict[str, Any]) -> str:
        seen = (255 * sample).round().to(torch.uint8) if sample.ndim > 2 else sample
        digest = hashlib.sha256(self._about)
        digest.update(json.dumps([prompt, metadata, list(seen.shape)], default=in_json, sort_keys=True).encode())
        digest.update(seen.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()


class AnswerCache:
    """Answers by key, in one SQLite file that several processes may share.

    Raises:
        UserError: the file cannot be made, or is no such database.
    """

    def __init__(self, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(file, timeout=60, check_same_thread=False)
            self._database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            self._database.commit()
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"the cache of answers {file} cannot be opened: {error}") from error
        self._lock = threading.Lock()

    def get(self, key: str) -> dict[str, Any] | None:
        with self._lock, suppress(sqlite3.Error):  # a cache that fails costs a question, not an answer
            row = self._database.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            with suppress(ValueError):  # a torn row
                kept = json.loads(row[0]) if row else None
                return kept if isinstance(kept, dict) else None
        return None

    def put(self, key: str, answer: dict[str, Any]) -> None:
        with self._lock, suppress(sqlite3.Error), self._database:
            self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(answer)))
