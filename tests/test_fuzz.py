"""Whatever is in a file or comes from a reward: an error for the user, or something that works."""

import io
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusionrl import TrainConfig, UserError
from diffusionrl.cli import parse_train
from diffusionrl.config import to_yaml
from diffusionrl.data.prompts import load_prompts
from diffusionrl.rewards import score

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=5))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
plain = yaml.safe_load(to_yaml(TrainConfig()))
known = st.sampled_from([*plain, "nonsense", "algorithm.clip_range"])


@settings(max_examples=300, deadline=None)
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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


@settings(max_examples=300)
@given(st.one_of(values, st.lists(scalars, min_size=2, max_size=2), st.lists(st.floats(), min_size=2, max_size=2)))
def test_reward_results(returned: Any) -> None:
    scores = score(lambda images, prompts, metadata: returned, torch.zeros(2, 3, 4, 4), ["a", "b"], [{}, {}])
    assert scores.values.shape == scores.valid.shape == (2,)
    assert scores.values.isfinite().all()
    assert scores.valid.all() or scores.error
