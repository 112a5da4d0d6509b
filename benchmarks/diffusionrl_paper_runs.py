"""The runs of ``diffusionrl_paper.py``, as whole configurations. docs/reproduction/diffusionrl.md says what was scaled."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ddpo_paper_runs import CLIP_TIMES_DIMENSIONS, DIMENSIONS, GRID_SEED, SEEDS, Run

from diffusionrl.config import (
    DiffusionRLConfig,
    EvaluationConfig,
    OptimizerConfig,
    PolicyConfig,
    PretrainingConfig,
    RWRConfig,
    SamplingConfig,
    TaskConfig,
    TrainConfig,
)
from diffusionrl.config.judges import ParityConfig
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.data.prompts import load_prompts
from diffusionrl.runs.lines import read_metrics
from diffusionrl.seeds import numpy_generator

QUERIES = 2048  # a task
SAMPLES = 64  # a step and task
GROUP = 8  # samples of a prompt
TASKS = {"preference": "ddpo-animals", "composition": "thing-pairs", "parity": "seen-occupations"}
"""Rewards and the prompts that they are trained on."""
RATES = (0.001, 0.002, 0.004)
BEYOND = {
    ("composition", "rwr"): (0.008,),
    ("composition", "raft"): (0.0005,),
    ("parity", "diffusionrl"): (0.0005,),
    ("parity", "shared"): (0.008,),
    ("parity", "raft"): (0.008,),
}
"""One more where the best of them lay at the edge."""
BASELINES = ("rwr", "raft")
COMPARED = ("composition", "parity")
"""Tasks that the baselines are trained on, as in tables 3 and 4."""
INVERSE_TEMPERATURES = {"composition": 4.0, "parity": 4.0}
"""About 1 / (standard deviation of the reward), within a prompt and within a step."""
ROUNDS = 4  # of sampling and training, for the baselines


def prompt_file(folder: Path, name: str) -> Path:
    """A built-in set in a fixed shuffled order: evaluations take the first ones."""
    file = folder / "prompts" / f"{name}.txt"
    if not file.is_file():
        texts = [prompt.text for prompt in load_prompts(name)]
        order = numpy_generator(0, f"benchmark/{name}").permutation(len(texts))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(texts[i] for i in order) + "\n")
    return file


def rates(task: str, method: str) -> tuple[float, ...]:
    return RATES + BEYOND.get((task, method), ())


def best_rate(folder: Path, task: str, method: str) -> float:
    """The one of the grid with the highest reward at the end."""
    found = {}
    for rate in rates(task, method):
        lines = read_metrics(folder / "grid" / task / method / f"{rate:g}")
        found[rate] = [line["eval/reward"] for line in lines if "eval/reward" in line][-1]
    return max(found, key=found.__getitem__)


def base(folder: Path, task: str, seed: int, rate: float | None = None) -> TrainConfig:
    """2,048 queries of DiffusionRL on one task, with the pretraining loss, at the grid's best rate or another one.

    The credit for parity is ours: these are 256 groups, and the paper has half as many in every step.
    """
    parity = task == "parity"
    return TrainConfig(
        reward=(task,),
        prompts=str(prompt_file(folder, TASKS[task])),
        prompts_per_step=SAMPLES // GROUP,
        samples_per_prompt=GROUP,
        steps=QUERIES // SAMPLES,
        seed=seed,
        sampling=SamplingConfig(num_steps=8, guidance=1.0, batch_size=32),
        policy=PolicyConfig(lora_rank=16),
        algorithm=DiffusionRLConfig(
            timesteps_per_step=4, clip_range=CLIP_TIMES_DIMENSIONS / DIMENSIONS, step_weight_power=2.0, micro_batch_size=64
        ),
        optimizer=OptimizerConfig(learning_rate=rate or best_rate(folder, task, "diffusionrl"), warmup=10),
        evaluation=EvaluationConfig(every=16, num_samples=96, samples_per_prompt=GROUP if parity else 1),
        pretraining=PretrainingConfig(source="emoji", batch_size=64),
        rewards=RewardsConfig(parity=ParityConfig(credit="leave-one-out")),
    )


def baseline(folder: Path, method: str, task: str, seed: int, rate: float | None = None) -> TrainConfig:
    """RWR or RAFT (the best of the samples of a prompt, or for parity of a step), with as many queries."""
    config = base(folder, task, seed, rate or best_rate(folder, task, method))
    parity = task == "parity"
    per_prompt = GROUP if parity else 16
    best = 1 / 24 if parity else 1 / per_prompt  # the paper accepts 1 in 24
    algorithm = RWRConfig(
        variant="sparse" if method == "raft" else "rwr",
        inverse_temperature=INVERSE_TEMPERATURES[task],
        percentile=1 - best,
        normalisation="batch" if parity else "prompt",
        updates_per_step=5 * QUERIES // SAMPLES // ROUNDS,
        batch_size=64,
        micro_batch_size=64,
    )
    return replace(
        config,
        algorithm=algorithm,
        steps=ROUNDS,
        prompts_per_step=QUERIES // ROUNDS // per_prompt,
        samples_per_prompt=per_prompt,
        sampling=replace(config.sampling, batch_size=256),  # updates are made of shuffled parts of these
        evaluation=replace(config.evaluation, every=2),
        pretraining=replace(config.pretraining, updates=QUERIES // SAMPLES // ROUNDS),  # as many as DiffusionRL has
    )


def shared(config: TrainConfig) -> TrainConfig:
    """The paper's credit: every sample of a group gets its statistical parity."""
    return replace(config, rewards=replace(config.rewards, parity=replace(config.rewards.parity, credit="shared")))


def joint(folder: Path, seed: int) -> TrainConfig:
    """The three tasks in turn, at the learning rate that is best for the first one, preference."""
    config = base(folder, "preference", seed)
    further = tuple(
        TaskConfig(task, (task,), str(prompt_file(folder, TASKS[task])), SAMPLES // GROUP, GROUP)
        for task in ("composition", "parity")
    )
    return replace(config, tasks=further, evaluation=replace(config.evaluation, samples_per_prompt=GROUP))


def half(config: TrainConfig) -> TrainConfig:
    """Half of the queries, and only their beginning and end evaluated."""
    steps = config.steps // 2
    return replace(config, steps=steps, evaluation=replace(config.evaluation, every=steps))


def grid(folder: Path) -> Iterator[Run]:
    for task in TASKS:
        methods = ["diffusionrl", *(BASELINES if task in COMPARED else ()), *(["shared"] if task == "parity" else ())]
        for method in methods:
            for rate in rates(task, method):
                if method in BASELINES:
                    config = baseline(folder, method, task, GRID_SEED, rate)
                else:
                    config = base(folder, task, GRID_SEED, rate)
                yield Run(f"grid/{task}/{method}/{rate:g}", half(shared(config) if method == "shared" else config))


def single(folder: Path) -> Iterator[Run]:
    for task in TASKS:
        for seed in SEEDS:
            yield Run(f"single/{task}/seed_{seed}", base(folder, task, seed))


def credit(folder: Path) -> Iterator[Run]:
    for seed in SEEDS:
        rate = best_rate(folder, "parity", "shared")
        yield Run(f"credit/shared/seed_{seed}", shared(base(folder, "parity", seed, rate)))


def baselines(folder: Path) -> Iterator[Run]:
    for task in COMPARED:
        for method in BASELINES:
            for seed in SEEDS:
                yield Run(f"{method}/{task}/seed_{seed}", baseline(folder, method, task, seed))


def together(folder: Path) -> Iterator[Run]:
    """Table 5."""
    for seed in SEEDS:
        yield Run(f"joint/seed_{seed}", joint(folder, seed))


def without_pretraining(folder: Path) -> Iterator[Run]:
    """Appendix G."""
    for seed in SEEDS:
        config = replace(base(folder, "preference", seed), pretraining=PretrainingConfig())
        yield Run(f"without_pretraining/preference/seed_{seed}", config)


def final_runs(folder: Path) -> list[Run]:
    """Every run but the grid's, which must be there, in the order in which they are made."""
    parts = (single, credit, baselines, together, without_pretraining)
    return [run for part in parts for run in part(folder)]
