"""The runs of ``ddpo_paper.py``, as whole configurations. What was scaled, and why, is in docs/reproduction/ddpo.md."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from diffusionrl.config import (
    DDPOConfig,
    EvaluationConfig,
    OptimizerConfig,
    PolicyConfig,
    RWRConfig,
    SamplingConfig,
    TrainConfig,
)
from diffusionrl.emoji.vocabulary import SUBJECTS, with_article

SEEDS = (0, 1, 2)
MORE_SEEDS = {
    "compressibility": ("ddpo-is", "ddpo-sf"),
    "incompressibility": ("ddpo-is", "ddpo-sf"),
    "aesthetic": ("ddpo-sf",),
}
"""Five seeds instead of three, where three left DDPO's interval across another method's: added after looking."""
GRID_SEED = 100
QUERIES = 1024
REWARDS = ("compressibility", "incompressibility", "aesthetic")
METHODS = ("ddpo-is", "ddpo-sf", "rwr", "rwr-sparse")

LEARNING_RATES = (0.0025, 0.005, 0.01)
"""The grid, searched for every method on compressibility and on the aesthetic head, and for DDPO-IS on the CLIP score."""
BEYOND = {
    ("rwr", "compressibility"): 0.02,
    ("rwr-sparse", "compressibility"): 0.00125,
    ("ddpo-is", "aesthetic"): 0.00125,
    ("rwr-sparse", "aesthetic"): 0.02,
    ("ddpo-is", "clip-score"): 0.00125,
}
"""One more rate where the best one lay at the grid's edge."""
BEST = {
    ("ddpo-is", "compressibility"): 5e-3,
    ("ddpo-sf", "compressibility"): 5e-3,
    ("rwr", "compressibility"): 1e-2,
    ("rwr-sparse", "compressibility"): 2.5e-3,
    ("ddpo-is", "aesthetic"): 2.5e-3,
    ("ddpo-sf", "aesthetic"): 5e-3,
    ("rwr", "aesthetic"): 5e-3,
    ("rwr-sparse", "aesthetic"): 1e-2,
    ("ddpo-is", "clip-score"): 2.5e-3,
}
"""What the grid chose; incompressibility takes compressibility's."""
INVERSE_TEMPERATURES = {"compressibility": 0.67, "incompressibility": 0.67, "aesthetic": 3.2}
"""About 1 / (standard deviation of the reward within a prompt), so that RWR's weights tell samples apart in every unit."""

STEPS_TRAINED = {"jpeg": {"step_weight_power": 2.0, "train_fraction": 0.5}, "learned": {"step_weight_power": 1.0}}
"""DDPO's share of the denoising steps and their weights, for rewards that are a file's size and those that are a network."""

CLIP_TIMES_DIMENSIONS = 1e-4 * 4 * 64 * 64  # the paper's clip, whatever the model's latents
DIMENSIONS = 16 * 8 * 8


@dataclass(frozen=True)
class Run:
    """A run of the benchmark: where it lies below the benchmark's folder, and its settings."""

    name: str
    config: TrainConfig


def base(method: str, reward: str, seed: int, learning_rate: float | None = None) -> TrainConfig:
    """1,024 queries of one method."""
    jpeg = reward in ("compressibility", "incompressibility")
    rate = learning_rate or BEST[method, "compressibility" if jpeg else "aesthetic"]
    config = TrainConfig(
        reward=(reward,),
        prompts_per_step=16 if jpeg else 8,
        samples_per_prompt=4 if jpeg else 8,
        steps=QUERIES // 64,
        seed=seed,
        sampling=SamplingConfig(num_steps=8, guidance=3.0, batch_size=32),
        policy=PolicyConfig(lora_rank=16),
        algorithm=DDPOConfig(
            clip_range=CLIP_TIMES_DIMENSIONS / DIMENSIONS,
            min_count=4,
            updates_per_step=2,
            micro_batch_size=64,
            **STEPS_TRAINED["jpeg" if jpeg else "learned"],
        ),
        optimizer=OptimizerConfig(learning_rate=rate, warmup=10),
        evaluation=EvaluationConfig(every=8, num_samples=90, held_out=("emoji-judge", "emoji-gold")),
    )
    if method == "ddpo-sf":
        return replace(config, algorithm=replace(config.algorithm, variant="sf", updates_per_step=1))
    if method.startswith("rwr"):
        return interleaved(config, "sparse" if method == "rwr-sparse" else "rwr", 4)
    return config


def interleaved(config: TrainConfig, variant: str, rounds: int) -> TrainConfig:
    """RWR in ``rounds`` rounds of sampling and training; 16 prompts a round, five passes over the samples, as in the paper."""
    algorithm = RWRConfig(
        variant=variant,
        inverse_temperature=INVERSE_TEMPERATURES[config.reward[0]],
        updates_per_step=5 * QUERIES // 64 // rounds,
        batch_size=64,
        micro_batch_size=64,
    )
    evaluation = replace(config.evaluation, every=max(1, rounds // 2))
    per_prompt = QUERIES // 16 // rounds
    return replace(
        config, algorithm=algorithm, evaluation=evaluation, steps=rounds, prompts_per_step=16, samples_per_prompt=per_prompt
    )


def rates(method: str, reward: str) -> list[float]:
    """What is tried for a method on a reward."""
    return sorted({*LEARNING_RATES, BEYOND.get((method, reward), LEARNING_RATES[0])})


def grid() -> Iterator[Run]:
    for reward in ("compressibility", "aesthetic"):
        for method in METHODS:
            for rate in rates(method, reward):
                yield Run(f"grid/{reward}/{method}/{rate:g}", base(method, reward, GRID_SEED, rate))
    for rate in rates("ddpo-is", "clip-score"):
        yield Run(f"grid/clip-score/ddpo-is/{rate:g}", alignment(GRID_SEED, rate))


def fig4() -> Iterator[Run]:
    """Figure 4, and with the long runs of appendix A and figure 12 evaluated on what comes out."""
    for reward in REWARDS:
        for method in METHODS:
            for seed in (*SEEDS, 3, 4) if method in MORE_SEEDS[reward] else SEEDS:
                config = base(method, reward, seed)
                if method == "ddpo-is" and reward != "compressibility":  # appendix A: twice as long
                    config = replace(config, steps=2 * config.steps, evaluation=replace(config.evaluation, every=4))
                yield Run(f"fig4/{reward}/{method}/seed_{seed}", config)


def alignment(seed: int, rate: float) -> TrainConfig:
    """DDPO-IS on the CLIP score of animals at an activity."""
    config = base("ddpo-is", "clip-score", seed, rate)
    return replace(
        config, prompts="activities", evaluation=replace(config.evaluation, num_samples=135, held_out=("emoji-judge",))
    )


def fig5() -> Iterator[Run]:
    for seed in SEEDS:
        config = alignment(seed, BEST["ddpo-is", "clip-score"])
        yield Run(f"fig5/seed_{seed}", replace(config, steps=2 * config.steps))


def fig10() -> Iterator[Run]:
    """Figure 10, and a control that looks at no reward: every sample kept, so that only the denoising loss is left."""
    for seed in SEEDS:
        for name, reward, change in (
            ("conditional", "compressibility", {"train_guided": False}),
            ("control", "compressibility", {"percentile": 0.0}),
            ("control_aesthetic", "aesthetic", {"percentile": 0.0}),
        ):
            config = base("rwr-sparse", reward, seed)
            yield Run(f"fig10/{name}/seed_{seed}", replace(config, algorithm=replace(config.algorithm, **change)))


def fig11() -> Iterator[Run]:
    for rounds in (1, 2, 16):  # 4 is figure 4's
        for seed in SEEDS:
            yield Run(f"fig11/rounds_{rounds}/seed_{seed}", interleaved(base("rwr", "compressibility", seed), "rwr", rounds))


def reduction() -> Iterator[Run]:
    """The sum, and so its gradient, is ``DIMENSIONS`` times as long. A ratio cannot be 1.6 below 1; 0.8 below it is
    where the mean's clip is (e^-1.6 = 0.2)."""
    for seed in SEEDS:
        config = base("ddpo-is", "compressibility", seed)
        algorithm = replace(config.algorithm, logprob_reduction="sum", clip_range=0.8)
        optimizer = replace(config.optimizer, max_grad_norm=DIMENSIONS * config.optimizer.max_grad_norm)
        yield Run(f"reduction/sum/seed_{seed}", replace(config, algorithm=algorithm, optimizer=optimizer))


POOLS = {16: ("prompt", "group", "batch"), 128: ("prompt", "group", "batch"), 2048: ("alone", "group", "batch")}
"""Prompts, and what rewards are relative to. Of 2,048 prompts hardly one comes up ``min_count`` times in 1,024 samples, so that
"prompt" falls back to the batch's statistics and is the same run; "alone" is "prompt" that never falls back."""


def pool_file(folder: Path, size: int) -> Path:
    """The first ``size`` of all pairs of subjects, in a fixed shuffled order."""
    pairs = [f"{with_article(left)} and {with_article(right)}" for left in SUBJECTS for right in SUBJECTS]
    file = folder / f"pairs_{size}.txt"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(pairs[i * 4001 % len(pairs)] for i in range(size)) + "\n")  # 4001 is prime
    return file


def advantages(folder: Path) -> Iterator[Run]:
    for size, normalisations in POOLS.items():
        for normalisation in normalisations:
            for seed in SEEDS:
                config = base("ddpo-is", "compressibility", seed)
                if normalisation != "group":
                    config = replace(config, prompts_per_step=64, samples_per_prompt=1)
                changes = (
                    {"normalisation": "prompt", "min_count": 1}
                    if normalisation == "alone"
                    else {"normalisation": normalisation}
                )
                algorithm = replace(config.algorithm, **changes)
                config = replace(config, prompts=str(pool_file(folder, size)), algorithm=algorithm)
                yield Run(f"advantages/pool_{size}/{normalisation}/seed_{seed}", config)


def all_runs(folder: Path) -> list[Run]:
    """Every run, in the order in which they are made."""
    return [*grid(), *fig4(), *fig5(), *fig10(), *fig11(), *reduction(), *advantages(folder / "prompts")]
