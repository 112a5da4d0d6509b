"""Code that is not ours, a reward above all, does nothing to the run and the process but give scores, or is refused by name."""

import contextlib
import functools
import json
import math
import os
import random
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusionrl import RunStopped, TrainConfig, UserError, train
from diffusionrl.algorithms.advantages import batch_advantages
from diffusionrl.config import (
    CheckpointConfig,
    DDPOConfig,
    EvaluationConfig,
    GuardConfig,
    OptimizerConfig,
    PretrainingConfig,
    SamplingConfig,
)
from diffusionrl.config.judges import AestheticConfig, ParityConfig
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.data.prompts import Prompt
from diffusionrl.errors import clean
from diffusionrl.evaluation.assessment import score_model
from diffusionrl.evaluation.guard import judge
from diffusionrl.foreign import surroundings
from diffusionrl.rewards import Mixture, RewardCall, Scores, as_mixture, load_reward, score, try_mixture
from diffusionrl.rewards.base import counts_of
from diffusionrl.rewards.jpeg import compressibility
from diffusionrl.rewards.loading import require_world
from diffusionrl.runs.checkpoint import complete_steps, folder_of, load

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ASKED = (["a cat", "an owl"], [{"n": [1]}, {"n": [2]}])
BRIGHT = IMAGES.mean((1, 2, 3)).double()


def bright(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return images.mean((1, 2, 3))


def called(reward: Any, images: Tensor = IMAGES) -> Scores:
    """As a run calls it: in the thread of foreign code."""
    call = RewardCall(as_mixture(reward), images, *ASKED)
    call.start()
    return call.result(10)


def settings_for(tmp_path: Path, steps: int = 1, **changes: Any) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        prompts_per_step=2,
        run_dir=tmp_path / "run",
        sampling=SamplingConfig(num_steps=2, guidance=2.0),
        algorithm=DDPOConfig(updates_per_step=1, min_count=1),
        evaluation=EvaluationConfig(every=0, num_samples=2),
        **changes,
    )


# What a reward writes to is its own


def spoil(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    images.sub_(0.5).mul_(9)
    prompts.clear()
    for each in metadata:
        each["n"].append(9)
        each["more"] = 1
    return images[:, 0].mean((1, 2))


def test_a_reward_changes_nothing_that_others_see() -> None:
    images, prompts, metadata = IMAGES.clone(), ["a cat", "an owl"], [{"n": [1]}, {"n": [2]}]
    mixed = Mixture({"spoils": spoil, "bright": bright, "again": spoil}).score(images, prompts, metadata)
    assert torch.equal(images, IMAGES) and (prompts, metadata) == ASKED
    torch.testing.assert_close(mixed.parts["bright"], BRIGHT)
    assert torch.equal(mixed.parts["spoils"], mixed.parts["again"])


def test_samples_of_one_prompt_have_metadata_of_their_own() -> None:
    told: dict[str, Any] = {"seen": []}

    def count(images: Tensor, prompts: Any, metadata: Any) -> list[int]:
        for each in metadata:
            each["seen"].append(1)
        return [len(each["seen"]) for each in metadata]

    assert score(count, IMAGES, ["a", "a"], [told, told]).values.tolist() == [1, 1]
    assert told == {"seen": []}


def test_one_thread_from_the_import_to_the_last_call(make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection of SQLite belongs to the thread that made it: here the one that imports the module."""
    (tmp_path / "keeps.py").write_text(
        "import sqlite3\n"
        "db = sqlite3.connect('cache.db')\n"
        "db.execute('create table seen (v real)')\n"
        "def bright(images, prompts, metadata):\n"
        "    db.executemany('insert into seen values (?)', [(float(v),) for v in images.mean((1, 2, 3))])\n"
        "    db.commit()\n"
        "    return images.mean((1, 2, 3))\n"
        "def dark(images, prompts, metadata):\n"
        "    db.execute('select * from seen')\n"
        "    return 1 - images.mean((1, 2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    config = settings_for(tmp_path, 2, reward=("keeps:bright",))
    train(config, policy=make_policy(), prompts=["a cat", "a dog"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["reward/invalid"] for line in lines[1:]] == [0, 0]
    assert sqlite3.connect(tmp_path / "cache.db").execute("select count(*) from seen").fetchone() == (3 + 2 + 2 + 2 + 2,)


def test_a_call_that_hangs_costs_the_thread_and_no_other_call() -> None:
    seen: list[str] = []
    free = threading.Event()

    def hangs_at_first(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        seen.append(threading.current_thread().name)
        if len(seen) == 1:
            free.wait(30)
        return bright(images, prompts, metadata)

    calls = [RewardCall(as_mixture(hangs_at_first), IMAGES, *ASKED) for _ in range(3)]
    for call in calls:
        call.start()
    assert [call.result(0.3).valid.all().item() for call in calls] == [False, True, True]
    free.set()
    assert len(seen) == 3


# The process is as it was before

CHANGES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "gradient mode": (lambda: torch.set_grad_enabled(not torch.is_grad_enabled()), torch.is_grad_enabled),
    "default dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "default device": (lambda: torch.set_default_device("meta"), torch.get_default_device),
    "threads": (lambda: torch.set_num_threads(3), torch.get_num_threads),
    "determinism": (lambda: torch.use_deterministic_algorithms(True), torch.are_deterministic_algorithms_enabled),
    "precision": (lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
    "cuDNN": (lambda: setattr(torch.backends.cudnn, "benchmark", True), lambda: torch.backends.cudnn.benchmark),
    "anomaly mode": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
    "torch's generator": (lambda: torch.manual_seed(3), lambda: torch.get_rng_state().tolist()),
    "Python's generator": (lambda: random.seed(3), random.getstate),
    "NumPy's generator": (lambda: np.random.seed(3), lambda: np.random.get_state()[1].tolist()),  # type: ignore[index,union-attr]
    "folder": (lambda: os.chdir("/"), os.getcwd),
    "output": (lambda: setattr(sys, "stdout", None), lambda: sys.stdout),
    "errors": (lambda: setattr(sys, "stderr", sys.stdin), lambda: sys.stderr),
    "descriptor": (lambda: os.close(1), lambda: os.fstat(1).st_ino),
    "recursion": (lambda: sys.setrecursionlimit(400), sys.getrecursionlimit),
    "warnings": (lambda: __import__("warnings").simplefilter("error", SyntaxWarning), surroundings._alarming),
    "timer": (lambda: signal.alarm(60), lambda: round(signal.getitimer(signal.ITIMER_REAL)[0] / 50)),
    "arguments": (lambda: sys.argv.clear(), lambda: list(sys.argv)),
    "collection": (lambda: __import__("gc").disable(), __import__("gc").isenabled),
}
REFUSED = {"default dtype", "determinism", "precision", "cuDNN"}


@pytest.mark.parametrize("what", CHANGES)
def test_the_process_is_as_it_was_after_every_call(what: str) -> None:
    """What is computed beside the call depends on some settings: to change them is refused, in the trial and later."""
    change, read = CHANGES[what]
    before = read()

    def changes(images: Tensor, prompts: Any, metadata: Any) -> list[float]:
        change()
        return [0.5] * len(images)

    if what in REFUSED:
        with pytest.raises(UserError, match=r"changes changes (torch's|the settings of cuDNN)"):
            try_mixture(as_mixture(changes), (3, 8, 8), *ASKED)
        assert read() == before
        found = called(changes)
        assert not found.valid.any() and "sampling beside it" in str(found.error)
        with pytest.raises(RunStopped, match="changes"):
            surroundings.check()
    else:
        assert try_mixture(as_mixture(changes), (3, 8, 8), *ASKED) == []
        assert called(changes).values.tolist() == [0.5, 0.5]
    assert read() == before
    called(bright)
    assert read() == before


HEADS = {
    "torch.set_grad_enabled(False)": None,
    "torch.set_default_dtype(torch.float64)": "changes torch's default dtype, which is put back",
    "os.chdir('/')": "changes the working directory, which is put back",
    "torch.manual_seed(1)": None,
    "sys.exit(3)": "SystemExit: 3",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "argparse.ArgumentParser().parse_args()": "parse the command line",
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)": "main thread",
    "import nowhere_to_be_found": "nowhere_to_be_found",
}


def state() -> list[Any]:
    return [read() for _, read in CHANGES.values()] + [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("head", HEADS)
def test_the_process_is_as_it_was_after_an_import(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said, name = HEADS[head], f"head_{list(HEADS).index(head)}"
    (tmp_path / f"{name}.py").write_text(
        f"import argparse, os, signal, sys, torch\n{head}\ndef bright(images, p, m): return images.mean((1, 2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["diffusionrl", "train", "--model", "x"])
    before = state()
    if head.startswith(("sys.exit", "raise", "argparse", "signal", "import")):
        with pytest.raises(UserError, match=f"reward '{name}:bright' does not import.*{said}"):
            load_reward(f"{name}:bright")
    else:
        assert score(load_reward(f"{name}:bright"), IMAGES, *ASKED).valid.all()
        told = capsys.readouterr().err
        assert (said is None and not told) or (said is not None and said in told and f"{name}:bright" in told)
    assert state() == before


def test_a_stream_that_a_reward_closes_is_opened_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", open(os.dup(1), "w"))  # noqa: SIM115

    def closes(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        sys.stdout.close()
        os.close(1)
        return bright(images, prompts, metadata)

    assert called(closes).valid.all()
    print("still here", flush=True)
    assert capfd.readouterr().out == "still here\n"


def test_what_a_reward_draws_goes_on_from_call_to_call() -> None:
    drawn = [called(lambda images, p, m: torch.rand(2)).values.tolist() for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_a_run_is_the_same_beside_a_reward_that_changes_the_process(make_policy: Any, tmp_path: Path) -> None:
    def changing(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        for name in CHANGES.keys() - REFUSED - {"output", "errors", "descriptor"}:
            CHANGES[name][0]()
        return bright(images, prompts, metadata)

    ended = []
    for name, reward in (("calm", bright), ("wild", changing)):
        config = settings_for(tmp_path / name, 2)
        train(config, policy=make_policy(), reward=reward, prompts=["a cat", "a dog"])
        lines = [json.loads(line) for line in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()]
        ended.append([line.get("eval/reward", line.get("reward/mean")) for line in lines])
    assert ended[0] == ended[1] and None not in ended[0]


def test_a_run_folder_stays_where_it_was_named(make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever folder a reward works in meanwhile."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def works_elsewhere(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        with contextlib.chdir("elsewhere"):
            time.sleep(0.05)
        return bright(images, prompts, metadata)

    config = replace(settings_for(tmp_path, 2), run_dir=Path("runs/relative"))
    train(config, policy=make_policy(), reward=works_elsewhere, prompts=["a cat", "a dog"])
    assert (tmp_path / "runs" / "relative" / "finished.json").is_file() and not list((tmp_path / "elsewhere").iterdir())


# Whatever it returns or raises


class Odd:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __float__(self) -> float:
        raise self.error


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def raising(error: BaseException) -> Any:
    def raises(images: Tensor, prompts: Any, metadata: Any) -> Any:
        raise error

    return raises


def generator(images: Tensor, prompts: Any, metadata: Any) -> Any:
    yield 1.0
    raise OSError("half-way")


RETURNED: dict[str, Any] = {
    "dict": {0: 1.0, 1: 2.0},
    "set": {1.0, 2.0},
    "text": "11",
    "texts": ["1", "2"],
    "bytes": b"11",
    "complex": torch.tensor([1j, 2j]),
    "complex numbers": [np.complex64(1), np.complex64(2)],
    "meta": torch.zeros(2, device="meta"),
    "no validity": Scores(torch.zeros(2), None),  # type: ignore[arg-type]
    "odd validity": Scores(torch.zeros(2), torch.ones(3).bool()),
    "odd number": [1.0, Odd(OSError("no number"))],
    "exit": [1.0, Odd(SystemExit(0))],
    "two columns": torch.zeros(2, 2),
    "for ever": __import__("itertools").repeat(1.0),
}
RAISED = {
    "exit": SystemExit(0),
    "interrupt": KeyboardInterrupt(),
    "no words": Silent(),
    "memory": MemoryError(),
    "recursion": RecursionError(),
    "end": GeneratorExit(),
}


@pytest.mark.parametrize(
    "reward",
    [
        *(pytest.param(lambda *asked, value=value: value, id=f"returns {name}") for name, value in RETURNED.items()),
        *(pytest.param(raising(error), id=f"raises {name}") for name, error in RAISED.items()),
        pytest.param(generator, id="generator"),
    ],
)
def test_what_is_no_score_is_an_error_at_first_and_invalid_later(reward: Any) -> None:
    with pytest.raises(UserError, match=r"^(the reward failed on 3 grey 8 x 8 images|a reward returns one number a)"):
        try_mixture(as_mixture(reward), (3, 8, 8), *ASKED)
    found = called(reward)
    assert found.valid.tolist() == [False, False] and found.error


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((value for value in (1.0, 2.0)), [1, 2]),
        (np.array([1, 2]), [1, 2]),
        (np.array([True, False]), [1, 0]),
        ([np.float32(1), torch.tensor(2.0)], [1, 2]),
        (torch.tensor([1.0, 2.0]).to_sparse(), [1, 2]),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), [1, 2]),
        ([10**400, 2.0], [None, 2]),
        (torch.tensor([1e300, 2.0], dtype=torch.float64), [None, 2]),
        ([1e9 + 0.25, 1e9 + 0.5], [1e9 + 0.25, 1e9 + 0.5]),
    ],
)
def test_what_is_a_number_is_a_score(value: Any, expected: list[Any]) -> None:
    found = called(lambda *asked: value)
    assert [each if ok else None for each, ok in zip(found.values.tolist(), found.valid, strict=True)] == expected


def test_what_a_reward_says_of_itself_may_be_anything() -> None:
    class Odd:
        range = "low"
        counts = None
        whole_groups = "perhaps"

        def __call__(self, *asked: Any) -> list[float]:
            return [0.5, 1.0]

    class Raises:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

        def __call__(self, *asked: Any) -> list[float]:
            return [0.5, 1.0]

    assert counts_of(Odd()) == {} and as_mixture(Odd()).grouped == ()
    assert not called(Odd()).valid.any()  # of which nobody can say what is in its range
    assert called(Raises()).valid.all()
    assert called(functools.partial(bright)).valid.all()


@settings(max_examples=examples(60))
@given(
    st.sampled_from([*CHANGES.keys() - REFUSED - {"output", "errors", "descriptor"}, None]),
    st.one_of(
        st.lists(st.one_of(st.floats(), st.integers(), st.none(), st.text(), st.complex_numbers()), max_size=3),
        st.dictionaries(st.integers(), st.floats()),
        st.text(),
        st.builds(
            lambda kind, said: kind(said), st.sampled_from([OSError, SystemExit, KeyboardInterrupt, KeyError]), st.text()
        ),
    ),
)
def test_nothing_that_a_reward_does_is_felt(what: str | None, answer: Any) -> None:
    """It changes something, then returns or raises something: scores are finite where they are valid, the message is short and
    clean, its thread lives, and the process is as before."""
    before = None if what is None else CHANGES[what][1]()

    def odd(images: Tensor, prompts: Any, metadata: Any) -> Any:
        if what is not None:
            CHANGES[what][0]()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    found = called(odd)
    assert found.values.shape == found.valid.shape == (2,) and found.values.isfinite().all()
    numbers = [each for each in answer if isinstance(each, int | float)] if isinstance(answer, list) else []
    assert found.valid.any() <= (len(numbers) > 0 and len(answer) == 2)
    assert found.valid.all() or (found.error and found.error.isprintable() and len(found.error) < 1100)
    assert torch.equal(called(bright).values, BRIGHT.float().double())
    assert what is None or CHANGES[what][1]() == before


def test_messages_are_clean_and_short() -> None:
    said = called(raising(OSError("\x1b]0;owned\x07\x9b31m" + "red\n" * 10**6))).error
    assert said is not None and said.isprintable() and len(said) < 1100 and "red red" in said
    assert clean("a \ud800 b\u202e") == "a b"


# Nothing that is not finite is praised


def broken_at(rows: list[int], value: float = float("nan")) -> Tensor:
    images = IMAGES.clone()
    images[rows, 0, 3, 3] = value
    return images


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_reward_sees_an_image_that_is_not_finite(value: float) -> None:
    found = called(compressibility, broken_at([1], value))
    assert found.valid.tolist() == [True, False]
    assert found.error is not None and "not finite" in found.error and "compress" not in found.error
    assert not called(compressibility, broken_at([0, 1], value)).valid.any()
    assert not score(load_reward("http://127.0.0.1:1"), broken_at([0, 1], value), *ASKED).valid.any()


def test_a_group_with_a_broken_image_is_invalid() -> None:
    def spread(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        assert len(images) == 2
        return images.mean((1, 2, 3))

    spread.whole_groups = True  # type: ignore[attr-defined]
    images = torch.cat([broken_at([0]), IMAGES])
    found = as_mixture(spread).score(images, ["a"] * 4, [{}] * 4, 2)
    assert found.valid.tolist() == [False, False, True, True]


def spoiled(policy: Any, where: str) -> Any:
    """A policy whose latents or images are not finite."""
    if where == "latents":
        denoise = policy.denoise
        policy.denoise = lambda x, *asked: tuple(each * torch.inf for each in denoise(x, *asked))
    else:
        decode = policy.decode
        policy.decode = lambda *asked: decode(*asked) * torch.nan
    return policy


@pytest.mark.parametrize(
    ("where", "said"), [("latents", "not finite from denoising step 1 of 2 on"), ("images", "the decoder overflows")]
)
def test_a_model_without_a_finite_image_is_named_and_nothing_is_finished(
    make_policy: Any, tmp_path: Path, where: str, said: str
) -> None:
    config = settings_for(tmp_path)
    with pytest.raises(RunStopped, match=f"before training: 2 of 2 images .* are not finite, .*{said}"):
        train(config, policy=spoiled(make_policy(), where), reward=compressibility, prompts=["a cat"])
    assert not (tmp_path / "run" / "finished.json").exists() and not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize("steps", [1, 2])
def test_weights_whose_images_are_not_finite_are_neither_saved_nor_exported(
    make_policy: Any, tmp_path: Path, steps: int
) -> None:
    """A learning rate that leaves them finite: of one step, those before it are exported; of two, there are none that were
    tried, as step 1 was never evaluated."""
    config = settings_for(tmp_path, steps, optimizer=OptimizerConfig(learning_rate=1e37), checkpoint=CheckpointConfig(every=1))
    before = {name: weight.detach().clone() for name, weight in make_policy().trainable().items()}
    policy = make_policy()
    with pytest.raises(RunStopped, match="not finite"):
        train(config, policy=policy, reward=compressibility, prompts=["a cat", "a dog"])
    assert complete_steps(tmp_path / "run") == ([0] if steps == 1 else [])
    assert (tmp_path / "run" / "export").exists() == (steps == 1)
    assert steps == 2 or all(torch.equal(weight, before[name]) for name, weight in policy.trainable().items())


@pytest.mark.parametrize("where", ["weights", "moments", "overflow"])
def test_weights_that_are_not_finite_are_taken_back(
    make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """They, or what AdamW remembers, become infinite in a step whose losses and gradient are finite."""
    policy, original = make_policy(), torch.optim.AdamW.step
    before = {name: weight.detach().clone() for name, weight in policy.trainable().items()}

    def spoils(self: Any, closure: Any = None) -> None:
        original(self, closure)
        parameter = self.param_groups[0]["params"][-1]
        (parameter.data if where == "weights" else self.state[parameter]["exp_avg"]).fill_(math.inf)

    if where != "overflow":
        monkeypatch.setattr(torch.optim.AdamW, "step", spoils)
    config = settings_for(tmp_path, optimizer=OptimizerConfig(learning_rate=1e38 if where == "overflow" else 1e-3))
    said = "the step is" if where == "overflow" else "the weights after the update are"
    with pytest.raises(RunStopped, match=f"{said} not finite in step 1"):
        train(config, policy=policy, reward=bright, prompts=["a cat", "a dog"])
    assert all(torch.equal(weight, before[name]) for name, weight in policy.trainable().items())
    saved = load(folder_of(tmp_path / "run", 0))
    assert all(tensor.isfinite().all() for file in saved.tensors.values() for tensor in file.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda: TrainConfig(optimizer=OptimizerConfig(learning_rate=math.inf)),
        lambda: TrainConfig(optimizer=OptimizerConfig(weight_decay=math.inf)),
        lambda: TrainConfig(optimizer=OptimizerConfig(epsilon=math.inf)),
        lambda: TrainConfig(algorithm=DDPOConfig(step_weight_power=math.inf)),
        lambda: TrainConfig(pretraining=PretrainingConfig(weight=math.inf)),
        lambda: SamplingConfig(guidance=math.inf),
    ],
)
def test_infinite_settings_are_refused(make: Any) -> None:
    with pytest.raises(UserError, match="finite"):
        make()


def test_the_guard_never_prefers_a_broken_evaluation() -> None:
    lines = [{"step": step, "eval/reward": step, "eval/held": 1.0, "eval/broken_images": step == 2} for step in (0, 1, 2)]
    assert judge(lines, ["held"], GuardConfig()).best == 1


# A run of which nothing was scored is not done


@pytest.mark.parametrize("answer", [[math.nan] * 2, [math.inf] * 2, [1e300] * 2, [None] * 2])
def test_a_run_whose_first_evaluation_has_no_score_stops_with_the_rewards_error(
    make_policy: Any, tmp_path: Path, answer: list[Any]
) -> None:
    def nothing(images: Tensor, prompts: Any, metadata: Any) -> list[Any]:
        return (answer * 9)[: len(images)]

    with pytest.raises(RunStopped, match=r"the evaluation before training has no valid score; .*nothing: it returned"):
        train(settings_for(tmp_path), policy=make_policy(), reward=nothing, prompts=["a cat"])


@pytest.mark.parametrize(
    ("good", "said"), [(2, "2 of 2 samples of the last 1 steps"), (3, "evaluation after step 1 has no valid")]
)
def test_a_run_that_ends_without_scores_is_not_done(make_policy: Any, tmp_path: Path, good: int, said: str) -> None:
    """Trial and first evaluation pass, or the step too; the reward is gone afterwards. The command takes it up again."""
    calls: list[int] = []

    def dying(images: Tensor, prompts: Any, metadata: Any) -> Any:
        calls.append(1)
        if len(calls) > good:
            raise OSError("\x1b[31mgone")
        return bright(images, prompts, metadata)

    with pytest.raises(RunStopped, match=rf"{said}.*OSError: \[31mgone"):
        train(settings_for(tmp_path), policy=make_policy(), reward=dying, prompts=["a cat", "a dog"])
    assert not (tmp_path / "run" / "finished.json").exists()
    calls.clear()
    good += 9
    assert train(settings_for(tmp_path), policy=make_policy(), reward=dying, prompts=["a cat", "a dog"]).after.mean > 0


def test_a_model_of_which_nothing_is_scored_is_not_assessed(make_policy: Any) -> None:
    rewards = Mixture({"broken": raising(OSError("gone"))})
    with pytest.raises(RunStopped, match="no image of mine has a valid score; the last error: broken: OSError: gone"):
        score_model("mine", make_policy(), rewards, [Prompt("a cat")], 1, SamplingConfig(num_steps=2), 0)


# Small and large rewards are rewards


@pytest.mark.parametrize(("scale", "shift"), [(1e-30, 0.0), (1.0, 1e9), (1e30, 0.0), (1.0, 0.0)])
def test_rewards_of_any_scale_give_the_same_advantages(scale: float, shift: float) -> None:
    found = called(lambda images, p, m: [shift + scale * value for value in (0.25, 0.75)])
    torch.testing.assert_close(batch_advantages(found), torch.tensor([-1.0, 1.0]), rtol=1e-4, atol=1e-4)
    alike = called(lambda images, p, m: [shift + scale * 0.3] * 2)
    assert not batch_advantages(alike).any()


# Judges of the embedded world


@pytest.mark.parametrize(
    ("reward", "held_out", "said"),
    [
        ("aesthetic", (), "aesthetic judges .* name its own with --rewards.aesthetic.model"),
        ("clip-score=2", (), "--rewards.clip-score.model"),
        ("composition", (), "--rewards.composition.model"),
        ("preference", (), "choose another reward"),
        ("parity", (), "--rewards.parity.attribute"),
        ("compressibility", ("emoji-judge",), "emoji-judge judges images of the embedded world alone, not those of"),
        ("compressibility", ("composition-judge",), "choose another reward"),
    ],
)
def test_judges_of_the_embedded_world_judge_no_other_model(
    tiny_folder: Path, tmp_path: Path, reward: str, held_out: tuple[str, ...], said: str
) -> None:
    config = settings_for(tmp_path, model=str(tiny_folder), reward=(reward,))
    config = replace(config, evaluation=replace(config.evaluation, held_out=held_out))
    with pytest.raises(UserError, match=said):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_model_may_have_its_own_judge_and_the_embedded_one_its_own() -> None:
    own = RewardsConfig(aesthetic=AestheticConfig(model="some/clip"), parity=ParityConfig(attribute="ita"))
    require_world(["aesthetic", "parity", "compressibility", "mine:own"], own, "some/model")
    require_world(["aesthetic", "emoji-judge", "parity", "preference"], RewardsConfig(), "emoji-flow")
