"""Search without training: how the best of several candidates is looked for; see docs/search.md. Nothing here imports torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusionrl.config.checks import check_values
from diffusionrl.config.model import SamplingConfig
from diffusionrl.errors import require


@dataclass(frozen=True)
class SearchConfig:
    """What every search has: a budget for each image."""

    needs_noise: ClassVar[bool] = True
    """Whether it works on the fresh noise of the sampler."""

    name: str = ""
    queries: int | None = 64
    """Scores that the search of one image may ask for; None: no bound. The images before and after are scored besides."""
    seconds: float | None = None
    """Time for one image, looked at before every round of candidates; None: no bound. A machine of another speed finds
    another image."""

    def __post_init__(self) -> None:
        check_values(self, "search.")
        require(self.queries is None or self.queries >= 1, f"search.queries must be at least 1, not {self.queries}")
        require(self.seconds is None or self.seconds > 0, f"search.seconds must be positive, not {self.seconds}")
        require(
            self.queries is None or self.queries >= self.smallest,
            f"search.queries is {self.queries}, and one round of {self.name} asks for {self.smallest}: raise it"
            + (", or lower search.candidates" if self.smallest > 1 else ""),
        )
        self._check()

    def _check(self) -> None:
        """Raises UserError where the settings of its own do not fit."""

    @property
    def smallest(self) -> int:
        """Queries without which nothing can be chosen."""
        return 1

    def check_sampling(self, sampling: SamplingConfig) -> None:
        """Raises UserError where the sampler has no fresh noise to choose from."""
        require(
            not self.needs_noise or (sampling.sampler != "ode" and sampling.eta > 0),
            f"{self.name} chooses among fresh noise, and an ODE has none: choose a --sampling.sampler other than ode "
            "(ddim, cps) with --sampling.eta above 0, or --search best-of-n",
        )


@dataclass(frozen=True)
class BestOfNConfig(SearchConfig):
    """As many images as the budget pays for, the plain one first; the best of them."""

    needs_noise: ClassVar[bool] = False

    name: Literal["best-of-n"] = "best-of-n"

    def _check(self) -> None:
        require(
            self.queries is not None or self.seconds is not None,
            "best-of-n goes on as long as it may: give search.queries or search.seconds",
        )


@dataclass(frozen=True)
class ValueConfig(SearchConfig):
    """Searches that ask the reward what a noisy sample is worth, on the way."""

    candidates: int = 16
    """At once: queries a round."""
    lookahead: int = 4
    """A noisy sample is worth what the reward says of the image that the ODE makes of it, in so many steps of the rest of the
    grid; 1 is the predicted image itself."""
    keep: Literal["last", "best"] = "last"
    """What is found: the image at the end, as published; or the best that any candidate was scored as."""
    tau: Literal["first", "step"] | float = "first"
    """Temperature, in units of the reward: "first", the standard deviation of the first round's scores (of the first that
    differ), "step", that of each round's own, or a number."""

    @property
    def smallest(self) -> int:
        return self.candidates

    def _check(self) -> None:
        require(self.candidates >= 2, f"search.candidates must be at least 2, not {self.candidates}")
        require(self.lookahead >= 1, f"search.lookahead must be at least 1, not {self.lookahead}")
        require(isinstance(self.tau, str) or self.tau > 0, f"search.tau must be positive, not {self.tau}")


@dataclass(frozen=True)
class DemonConfig(ValueConfig):
    """Demon (arXiv 2410.05760): at each step, from the noisiest on, one noise is made of many candidates', by their scores."""

    name: Literal["demon"] = "demon"
    weights: Literal["tanh", "boltzmann", "best"] = "tanh"
    """Of the candidates' noise: tanh((score - mean) / tau), which turns bad noise around; softmax(score / tau); or the best
    candidate's alone."""
    order: Literal[1, 2] = 1
    """Of a step: 2 is Heun's, as in the paper, for one more pass of the network a candidate."""
    ode_after: float = 0.11
    """Below so much noise over signal, the rest is the ODE's."""

    def _check(self) -> None:
        super()._check()
        require(self.ode_after >= 0, f"search.ode_after must not be negative, not {self.ode_after}")


@dataclass(frozen=True)
class ParticlesConfig(ValueConfig):
    """Sequential Monte Carlo, as in FK steering (arXiv 2501.06848): samples that are on their way together, the good ones
    copied in the place of the bad; the best of those that arrive."""

    name: Literal["particles"] = "particles"
    rounds: int = 4
    """Spread evenly over the steps, the last of them at the end; as many as the budget holds. Each asks for as many queries as
    there are particles (search.candidates)."""

    def _check(self) -> None:
        super()._check()
        require(self.rounds >= 1, f"search.rounds must be at least 1, not {self.rounds}")


AnySearch = DemonConfig | BestOfNConfig | ParticlesConfig
SEARCHES: dict[str, type[AnySearch]] = {
    "best-of-n": BestOfNConfig,
    "demon": DemonConfig,
    "particles": ParticlesConfig,
}
