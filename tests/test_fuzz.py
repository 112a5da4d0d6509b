"""Whatever is in a file or comes from a reward: an error for the user, or something that works."""

import io
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusionrl import TrainConfig, UserError
from diffusionrl.cli import parse_train
from diffusionrl.config import ALGORITHMS, to_yaml
from diffusionrl.data.prompts import load_prompts
from diffusionrl.rewards import score
from diffusionrl.runs.places import flat, same

configs = [TrainConfig(prompts_per_step=16, samples_per_prompt=8, algorithm=make()) for make in ALGORITHMS.values()]
settings_of = [(config, name) for config in configs for name in sorted(flat(yaml.safe_load(to_yaml(config))))]
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=5))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
plain = yaml.safe_load(to_yaml(TrainConfig()))
known = st.sampled_from([*plain, "nonsense", "algorithm.clip_range"])


@settings(max_examples=examples(300))
@given(st.binary(max_size=200), st.sampled_from(["p.txt", "p.jsonl"]))
def test_prompt_files(content: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(content)
        try:
            prompts = load_prompts(str(file))
        except UserError as error:
            assert name in str(error)  # noqa: PT017
        else:
            assert prompts and all(prompt.text.strip() for prompt in prompts)


@settings(max_examples=examples(30), suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        known, values | st.dictionaries(st.sampled_from(["name", "every", "clip_range", "vlm"]), values), max_size=3
    )
)
def test_configuration_files(content: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump(content))
        heard = io.StringIO()
        try:
            with redirect_stdout(heard), redirect_stderr(heard):
                config = parse_train(["--config", str(file)])
        except UserError:
            pass
        except SystemExit as stop:
            assert stop.code == 2 and heard.getvalue()  # noqa: PT017
        else:
            assert isinstance(config, TrainConfig)


@settings(max_examples=examples(300))
@given(st.one_of(values, st.lists(scalars, min_size=2, max_size=2), st.lists(st.floats(), min_size=2, max_size=2)))
def test_reward_results(returned: Any) -> None:
    scores = score(lambda images, prompts, metadata: returned, torch.zeros(2, 3, 4, 4), ["a", "b"], [{}, {}])
    assert scores.values.shape == scores.valid.shape == (2,)
    assert scores.values.isfinite().all()
    assert scores.valid.all() or scores.error


def with_field(settings: Any, name: str, value: Any) -> Any:
    """A dataclass with a field changed, by its dotted name."""
    first, _, rest = name.partition(".")
    return replace(settings, **{first: with_field(getattr(settings, first), rest, value) if rest else value})


plausible = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3000),
    st.floats(allow_nan=False, width=32),
    st.text("abc ~/:=-.#'\"{}é", min_size=1, max_size=6),
    st.sampled_from(["full", "lora", "cosine", "emoji", "cps", "a: b", "null", "1", "--steps", "-1", "1e3", "yes"]),
    st.lists(st.sampled_from(["compressibility", "aesthetic=2", "to_q", "-x"]), max_size=2).map(tuple),
)


@settings(max_examples=examples(30), suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(settings_of), plausible)
def test_what_python_takes_a_file_gives_back(setting: tuple[TrainConfig, str], value: Any) -> None:
    """Any setting with any value: refused in one message, or the same when it is read again from what a run writes."""
    config, name = setting
    try:
        changed = with_field(config, name, value)
    except UserError:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(to_yaml(changed))
        heard = io.StringIO()
        try:
            with redirect_stdout(heard), redirect_stderr(heard):
                again = parse_train(["--config", str(file)])
        except UserError as error:
            assert "reads as an option" in str(error)  # noqa: PT017
            return
        except SystemExit as stop:
            raise AssertionError(f"{name} = {value!r} is taken in Python, and refused from a file") from stop
        then, now = (flat(yaml.safe_load(to_yaml(each))) for each in (changed, again))
        assert [key for key in then.keys() | now.keys() if not same(then.get(key) or None, now.get(key) or None)] == []
