"""What is typed, on the command line or in Python, is checked alike, recorded as it was, and refused early."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel

import diffusionrl.cli.train as train_command
from diffusionrl import Prompt, TrainConfig, UserError, train
from diffusionrl.cli import evaluate, main, parsing, sample
from diffusionrl.config import DDPOConfig, EvaluationConfig, PolicyConfig, SamplingConfig
from diffusionrl.config.files import parse_yaml
from diffusionrl.policies import StableDiffusionPolicy, find_trained, load_policy
from diffusionrl.policies.adapters import find_lora


def small(run_dir: Path, **changed: Any) -> TrainConfig:
    given: dict[str, Any] = {"steps": 1, "prompts_per_step": 2, "algorithm": DDPOConfig(updates_per_step=1)}
    given |= {"sampling": SamplingConfig(num_steps=2), "evaluation": EvaluationConfig(num_samples=2), "run_dir": run_dir}
    return TrainConfig(**given | changed)


def bright(images: torch.Tensor, prompts: Any, metadata: Any) -> torch.Tensor:
    return images.mean((1, 2, 3))


# Python


def drawn(run_dir: Path) -> set[str]:
    lines = (run_dir / "samples" / "step_000001" / "samples.jsonl").read_text().splitlines()
    return {json.loads(line)["prompt"] for line in lines}


@pytest.mark.parametrize(
    "prompts", [["a cat", {"prompt": "an owl", "size": 2}], (text for text in ("a cat", "an owl")), "p.txt", Path("p.txt")]
)
def test_prompts_in_python(make_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat\nan owl\n")
    train(small(Path("run")), policy=make_policy(), reward=bright, prompts=prompts)
    assert drawn(tmp_path / "run") == {"a cat", "an owl"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompts": "a cat"}, "prompts 'a cat': no such file"),
        ({"prompts": ["a cat", None]}, r"prompts\[1\]: no .prompt. with text in it .*NoneType"),
        ({"prompts": [""]}, r"prompts\[0\]: no .prompt."),
        ({"prompts": [Prompt("a \ud83d")]}, r"prompts\[0\]: half a character"),
        ({"prompts": []}, "prompts is empty"),
        ({"reward": 3}, "reward is a int: give a function"),
        ({"reward": [bright, bright]}, "reward is a list: give a function"),
        ({"reward": "compresibility"}, "did you mean 'compressibility'"),
    ],
)
def test_what_python_hands_over_is_checked(make_policy: Any, tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(small(tmp_path / "run"), policy=make_policy(), **{"prompts": ["a cat"], **given})
    assert not (tmp_path / "run").exists()


def test_names_of_rewards_in_python(make_policy: Any, tmp_path: Path) -> None:
    train(small(tmp_path / "run"), policy=make_policy(), reward="incompressibility", prompts=["a cat"])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["reward"] == ["incompressibility"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"training": "LoRA"}, "unknown policy.training 'LoRA'; did you mean 'lora'|There are full, lora"),
        ({"dtype": "fp16"}, "policy.dtype 'fp16'"),
        ({"dtype": "float16"}, "policy.dtype 'float16'"),
        ({"lora_targets": "attn"}, "no layer 'attn'"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"lora_rank": 2.5}, "lora_rank must be a whole number"),
    ],
)
def test_policies_are_checked_in_python_too(tiny_folder: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_policy(str(tiny_folder), **given)


def test_the_record_is_of_the_policy_that_is_trained(tiny_folder: Path, make_policy: Any, tmp_path: Path) -> None:
    for policy, rank, training in (
        (load_policy(str(tiny_folder), lora_rank=2, lora_targets=("to_q",)), 2, "lora"),
        (make_policy(lora_rank=3), 3, "lora"),
        (make_policy(lora_rank=None), 4, "full"),
    ):
        assert policy.settings is not None
        run_dir = tmp_path / f"{training}{rank}"
        train(small(run_dir, policy=PolicyConfig(lora_rank=16)), policy=policy, reward=bright, prompts=["a cat"])
        recorded = yaml.safe_load((run_dir / "config.yaml").read_text())["policy"]
        assert (recorded["training"], recorded["lora_rank"]) == (training, rank)


# LoRA files as they lie about


def test_a_lora_as_peft_saves_it(tiny_folder: Path, tmp_path: Path) -> None:
    """Beside its adapter_config.json, with an alpha other than its rank."""
    fresh = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = PeftModel(fresh.unet, config)
    wrapped.save_pretrained(tmp_path / "peft")
    fresh.unet = wrapped.merge_and_unload()
    policies = [
        StableDiffusionPolicy(fresh),
        load_policy(str(tiny_folder), lora=tmp_path / "peft"),
        load_policy(str(tiny_folder)),
    ]
    x, levels = torch.randn(1, 4, 4, 4), policies[0].grid(3).levels[torch.tensor([1])]
    with torch.no_grad():
        expected, found, base = (policy.denoise(x, levels, [Prompt("a cat")], 3.0)[0] for policy in policies)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - base).abs().max() > 0.01
    assert find_trained(str(tiny_folder), tmp_path / "peft").lora == tmp_path / "peft" / "adapter_model.safetensors"


def test_what_is_there_is_never_not_found(tmp_path: Path) -> None:
    (tmp_path / "x.bin").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.safetensors").touch()
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    expected = {"x.bin": "convert it", "folder": "holds mine.safetensors", "run": "is a run folder", "no": "not found"}
    for name, said in expected.items():
        with pytest.raises(UserError, match=said):
            find_lora(tmp_path / name)


# The command line: early, short, and 2


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", "--run-dir", "file"], "is a file, not a folder"),
        (["train", "--run-dir", "file/run"], "is a file, not a folder"),
        (["train", "--run-dir", "dangling"], "a link to what is not there"),
        (["train", "--run-dir", "/proc/x"], "cannot be made"),
        (["train", "--run-dir", "x" * 300], "too long"),
        (["train", "--name", "../x"], "without slashes"),
        (["train", "--name", "/abs"], "without slashes"),
        (["train", "--model", "models/bass"], "did you mean models/base?"),
        (["train", "--model", "file"], "is a file, and no"),
        (["train", "--model", "~nosuchuser/x"], "no user of that name"),
        (["train", "--model", "models/base"], "no model_index.json"),
        (["train", "--reward", "nomodule:f"], "no module 'nomodule'"),
        (["train", "--reward", "./no/file.py:f"], "there is no file ./no/file.py"),
        (["train", "--steps", "1" + 30 * "0"], "must be at most 1,000,000,000"),
        (["train", "--steps", 5000 * "9"], "steps"),
        (["train", "--prompts-per-step", "100000000"], "samples a step"),
        (["train", "--optimizer.learning-rate", "inf"], "finite number"),
        (["train", "--rewards.timeout", "1e10"], "seconds"),
        (["serve-reward", "compressibility", "--timeout", "inf"], "finite number"),
        (["sample", "--prompts"], "prompts names none"),
        (["sample", "--seeds"], "seeds names none"),
        (["sample", "--model", "models/bass"], "did you mean"),
        (["evaluate", "--model", "models/bass"], "did you mean"),
        (["train", "--config", "bad.yaml"], "'steps' stands there twice"),
        (["train", "--config", "list.yaml"], "reads as an option"),
        (["train", "--config", "empty.yaml"], "nothing under optimizer"),
        (["train", "--config", "deep.yaml"], "nested more than 50 deep"),
        (["train", "--config", "self.yaml"], "within what it names"),
        (["train", "--config", "bomb.yaml"], "aliases make more than"),
        (["train", "--config", "date.yaml"], "month must be in 1..12"),
        (["train", "--config", "/dev/zero"], "a pipe or a device"),
    ],
)
def test_refusals_are_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, command: list[str], said: str
) -> None:
    """Before a model or a reward is loaded, and with nothing made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "models" / "base").mkdir(parents=True)
    bomb = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    written = {"bad": "steps: 1\nsteps: 2\n", "list": 'reward: [compressibility, --steps, "99"]\n', "empty": "optimizer:\n"}
    written |= {"deep": "a: " + "[" * 4000, "self": "a: &x [*x]\n", "bomb": bomb, "date": "steps: 2024-13-45\n"}
    for name, text in written.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    for module in (parsing, train_command, sample, evaluate):
        monkeypatch.setattr(module, "quiet_libraries", lambda: pytest.fail("something slow has begun"))
    before = set(tmp_path.rglob("*"))
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    heard = capsys.readouterr()
    assert code == 2
    assert said in " ".join((heard.err + heard.out).replace("│", " ").split())
    assert set(tmp_path.rglob("*")) == before


def test_streams_that_are_closed_full_or_ascii() -> None:
    code = "import sys; from diffusionrl.cli.commands import entry; sys.argv = ['diffusionrl', '--help']; entry()"
    for redirection in (">&-", ">/dev/full", "2>&- >&-", "| head -1 >/dev/null"):
        command = f'{sys.executable} -c "{code}" {redirection}; exit ${{PIPESTATUS[0]}}'
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
        assert (done.returncode, done.stderr) == (0, ""), redirection
    printed = "from diffusionrl.cli.streams import steady_streams; steady_streams(); print('1 \\u00b1 2')"
    ascii = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", printed], capture_output=True, text=True, env=ascii, timeout=100)
    assert (done.returncode, done.stdout) == (0, "1 \\xb1 2\n")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("abcdefg: -[]{}&*!|>'\"\n", max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
)


@settings(max_examples=examples(200))
@given(values, st.text("abc01: -[]{}&*!|>'\"\n#%@`,?", max_size=40))
def test_yaml_is_what_was_written_or_a_value_error(value: Any, text: str) -> None:
    assert parse_yaml(yaml.safe_dump(value)) == value
    try:
        expected = yaml.safe_load(text)
        assert parse_yaml(text) == expected
    except (ValueError, yaml.YAMLError, RecursionError, TypeError):
        return
