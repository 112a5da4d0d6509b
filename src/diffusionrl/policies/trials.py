"""What a pipeline can do, found by trying it on one prompt."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusionrl import seeds
from diffusionrl.data.prompts import Prompt
from diffusionrl.policies.asking import AskedPipeline
from diffusionrl.policies.listener import outputs_counted
from diffusionrl.transitions import NoiseLevels

# Two ways of asking that are meant to be the same: their mean gap, relative to the spread of the answer. In few bits it is
# rounding, which differs by batch and is multiplied by guidance; of other rows or times it is as large as the spread.
_CLOSE, _NEAR = 1e-3, 0.1


class Trials:
    """Each answer is found once, and kept.

    Args:
        levels: of a call of the pipeline.
        exact: whether networks run in float32.
    """

    def __init__(self, asked: AskedPipeline, example: Prompt, guidance: float, levels: NoiseLevels, exact: bool) -> None:
        self._asked, self._prompts, self._guidance, self._levels = asked, [example], guidance, levels
        self._tolerance = _CLOSE if exact else _NEAR
        self._repeats: dict[float, int] = {}
        self._plain: float | None = None

    def _start(self, address: int) -> Tensor:
        return self._asked.start(self._prompts, [seeds.address(address, "start")], self._guidance).float()

    @torch.no_grad()
    def ways(self) -> tuple[str, ...]:
        """Whether several prompts, or several samples of one, can go in one call, and then give what single ones give."""
        asked, ways = self._asked, ("lists", "counts")
        x = torch.cat([self._start(1), self._start(2)])
        first, prompts = self._levels[:1], self._prompts * 2
        expected = torch.cat([asked.denoise(x[i : i + 1], first, self._prompts, self._guidance) for i in range(2)])
        both = self._levels[torch.zeros(2, dtype=torch.long)]
        working = []
        for way in ways if not prompts[0].media else ways[1:]:
            asked.ways = (way,)
            try:
                found = asked.denoise(x, both, prompts, self._guidance)
                if self._close(found, expected):
                    working.append(way)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # a pipeline that cannot take them raises whatever it does
                continue
        return tuple(working)

    @torch.no_grad()
    def edits(self) -> bool:
        """Whether the pipeline changes latents after a step."""
        if len(self._levels) < 2:
            return False
        x, y = self._start(1), self._start(2)
        after = self._asked.after(y, x, self._levels[:1], self._levels[1:2], self._prompts, self._guidance)
        return not torch.equal(after, y)

    @torch.no_grad()
    def repeats(self, guidance: float) -> int:
        """How often the times of several samples are repeated for a call with one for each; 0: a call takes one alone."""
        if guidance not in self._repeats:
            self._repeats[guidance] = self._find_repeats(guidance) if self._asked.ways and len(self._levels) > 1 else 0
        return self._repeats[guidance]

    def _find_repeats(self, guidance: float) -> int:
        two = self._levels[:: len(self._levels) - 1]
        x = torch.cat([self._start(1), self._start(2)])
        rows = [slice(0, 1), slice(1, 2)]
        expected = torch.cat([self._asked.denoise(x[row], two[row], self._prompts, guidance) for row in rows])
        for repeats in (1, 2, 3):
            try:
                found = self._asked.denoise(x, two, self._prompts * 2, guidance, repeats)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # a pipeline that takes one time alone raises whatever it does
                continue
            if self._close(found, expected):
                return repeats
        return 0

    @torch.no_grad()
    def plain_guidance(self, networks: Sequence[torch.nn.Module]) -> float:
        """The number that switches guidance off: at which the networks give less than at others. Where they give as much at
        any, as where guidance is embedded, that of sampling."""
        if self._plain is None:
            x, given = self._start(1), {}
            for guidance in (1.0, 0.0, self._guidance):
                with outputs_counted(networks) as sizes:
                    self._asked.denoise(x, self._levels[:1], self._prompts, guidance)
                given[guidance] = sum(sizes)
            least = min(given.values())
            differ = least < max(given.values())
            self._plain = next(each for each in given if given[each] == least) if differ else self._guidance
        return self._plain

    def at_both_ends(self) -> Tensor:
        """The prediction at the first and the last time, which may be two networks', with gradient."""
        x = self._start(1)
        ends = [self._levels[:1], self._levels[-1:]]
        return torch.stack([self._asked.denoise(x, each, self._prompts, self._guidance) for each in ends])

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        alike = found.shape == expected.shape
        return alike and bool((found - expected).abs().mean() <= self._tolerance * expected.std())
