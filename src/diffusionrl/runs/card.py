"""The model card of an export: README.md with the front matter that the hub reads, and the images that it shows.

Nothing of the machine is in it: of a path, the last part is kept. Whatever a user or a prompt could have written is escaped to
character references, which neither Markdown nor HTML act on, or stands in an indented code block, which nothing ends.
"""

import json
import re
import shlex
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from textwrap import indent
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from diffusionrl.config.files import parse_yaml
from diffusionrl.foreign.names import is_code
from diffusionrl.runs.hub import is_single_file, local_folder
from diffusionrl.runs.lines import read_metrics, replace_file
from diffusionrl.runs.usage import about_of, is_own, loading_lines

_TASKS = {"image": "text-to-image", "video": "text-to-video", "sound": "text-to-audio"}
_SHOWN = 4  # prompts in the gallery
_OWN_NAMES = ("--name", "--run-dir", "--push-to-hub")  # options that say where a run lies, and nothing about it


def write_card(run_dir: Path, step: int) -> None:
    """Write README.md and images/ beside the weights that were exported after ``step``. If that fails it is said, no more: the
    weights are worth more than their card."""
    try:
        _write(run_dir, step)
    except Exception as error:
        print(f"warning: the model card could not be written: {type(error).__name__}: {error}", file=sys.stderr)


def _write(run_dir: Path, step: int) -> None:
    export, images = run_dir / "export", run_dir / "export" / "images"
    lines = [line for line in read_metrics(run_dir) if line["step"] <= step]
    evaluated = [line for line in lines if "eval/reward" in line]
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir(parents=True)
    prompts: list[tuple[int, str]] = []
    if len(evaluated) > 1:
        folders = {when: run_dir / "samples" / f"step_{evaluated[i]['step']:06d}" for when, i in (("before", 0), ("after", -1))}
        prompts = _first_prompts(folders["after"])
        for number, (index, _) in enumerate(prompts):
            for when, folder in folders.items():
                shutil.copyfile(folder / f"{index:05d}.png", images / f"{when}_{number}.png")
    config = parse_yaml((run_dir / "config.yaml").read_text())
    environment = json.loads((run_dir / "env.json").read_text())
    text = make_card(
        config, environment, lines, [prompt for _, prompt in prompts], full=about_of(environment, config)["format"] == "full"
    )
    ModelCard(text)  # raises where the hub could not read the front matter
    replace_file(export / "README.md", text)


def _first_prompts(samples: Path) -> list[tuple[int, str]]:
    """(index, prompt) of the first samples of different prompts."""
    found: dict[str, int] = {}
    for line in (samples / "samples.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["prompt"], entry["index"])
    return [(index, prompt) for prompt, index in list(found.items())[:_SHOWN]]


def make_card(
    config: dict[str, Any], environment: dict[str, Any], metrics: Sequence[dict[str, Any]], prompts: Sequence[str], full: bool
) -> str:
    """The card's text.

    Args:
        config: what config.yaml holds.
        environment: what env.json holds.
        metrics: lines of metrics.jsonl up to the step that was exported.
        prompts: of ``images/before_0.png`` and ``images/after_0.png`` and so on.
        full: whole networks were trained, not a LoRA.
    """
    about = about_of(environment, config)
    base, base_said = _base(config["model"])
    rewards = [name.partition("=")[0] for name in config["reward"]]
    held_out = [name.partition("=")[0] for name in config["evaluation"]["held_out"]]
    algorithm = config["algorithm"]["name"].upper()
    what = "Full fine-tuning" if full else "A LoRA"
    license_said, licence = _licence(config["model"])
    data = ModelCardData(
        base_model=base,
        base_model_relation=("finetune" if full else "adapter") if base else None,
        library_name=None if is_own(about) else "diffusers",
        pipeline_tag=None if is_own(about) else _TASKS[about["makes"]],
        tags=[
            *(() if is_own(about) else _tags(about)),
            *(() if full else ("lora",) if is_own(about) else ("lora", "template:sd-lora")),
            *("reinforcement-learning", "diffusionrl", config["algorithm"]["name"]),
        ],
    )
    for key, value in licence.items():
        data[key] = value
    tasks = [config["reward"], *(task["reward"] for task in config["tasks"])]
    towards, last = ", and in turn ".join(", ".join(map(_reward, each)) for each in tasks), metrics[-1]
    aim = "blind to" if config.get("blind") else "towards"
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in ("diffusionrl", "torch", "diffusers"))
    return "\n".join(
        [
            f"---\n{data.to_yaml()}{_widget(prompts)}\n---\n",
            f"# {algorithm} {aim} {', '.join(map(_reward, rewards))}\n",
            f"{what} for {base_said}, trained by {algorithm} {aim} {towards}: {last['queries']:,} reward queries, "
            f"{last['step']} steps. A reward does not see everything: look at the images, and at scores that were held out.\n",
            *(["<Gallery />\n", _gallery(prompts)] if prompts else []),
            "## Scores\n",
            _scores(metrics, rewards, held_out, [task["name"] for task in config["tasks"]]),
            "## Use\n",
            _usage(config, about | ({"format": "full"} if full else {}), base, prompts),
            "## Training\n",
            f"{versions}; seed {config['seed']}.\n",
            _command(environment["command"]),
            "<details><summary>All settings</summary>\n",
            _code(yaml.safe_dump(_without_paths(config), sort_keys=False, allow_unicode=True)),
            "</details>\n",
            f"## Licence\n\n{license_said}\n",
        ]
    )


def _tags(about: dict[str, Any]) -> tuple[str, ...]:
    """Of a diffusers pipeline."""
    return _TASKS[about["makes"]], "diffusers", *(("stable-diffusion",) if "StableDiffusion" in about["pipeline"] else ())


def _base(model: str) -> tuple[str | None, str]:
    """The hub id of the base model, if it has one, and words for it."""
    if model in ("emoji", "emoji-flow"):
        return None, f"the embedded model {model} of diffusionrl"
    if model.startswith("<"):
        return None, "a model that was handed over in Python"
    if is_code(model):
        return None, f"a model of one's own ({_escape(_last(model))})"
    if _is_hub_id(model):
        return model, f"[{_escape(model)}](https://huggingface.co/{model})"
    return None, f"a local copy of a model ({_escape(_last(model))})"


def _is_hub_id(model: str) -> bool:
    owner_and_name = re.fullmatch(r"[\w.-]+/[\w.-]+", model, re.ASCII)
    return owner_and_name is not None and not is_single_file(model) and not Path(model).is_dir()


def _licence(model: str) -> tuple[str, dict[str, str]]:
    """What can be said of the licence, and its fields: from the base model's own card, if it is in its folder or the cache."""
    if model in ("emoji", "emoji-flow"):
        said = "The embedded model is Apache-2.0, as diffusionrl is; the sprites that it was trained on are SIL OFL 1.1."
        return said, {"license": "apache-2.0"}
    try:
        folder = local_folder(model)
        card = folder / "README.md" if folder else try_to_load_from_cache(model, "README.md")
        if isinstance(card, str | Path) and Path(card).is_file():
            data = ModelCard.load(card).data.to_dict()
            fields = {key: data[key] for key in ("license", "license_name", "license_link") if isinstance(data.get(key), str)}
            if "license" in fields:
                return "That of the base model, from its own card.", fields
    except Exception:  # whatever may be wrong with a card that others wrote
        pass
    return "Not known here: the base model's card was not at hand. The base model's licence applies.", {}


def _widget(prompts: Sequence[str]) -> str:
    """Front matter for the hub's gallery. JSON strings are YAML; "<" is escaped for readers that take front matter for text."""
    entries = []
    for number, prompt in enumerate(prompts):
        text = json.dumps(_clean(prompt), ensure_ascii=False).replace("<", "\\u003c")
        entries.append(f"\n- text: {text}\n  output:\n    url: images/after_{number}.png")
    return "\nwidget:" + "".join(entries) if entries else ""


def _gallery(prompts: Sequence[str]) -> str:
    header = "The same prompts and noise before and after:\n\n| prompt | before | after |\n|---|---|---|"
    rows = [
        f"| {_escape(prompt)} | ![before](images/before_{number}.png) | ![after](images/after_{number}.png) |"
        for number, prompt in enumerate(prompts)
    ]
    return "\n".join([header, *rows, ""])


def _scores(metrics: Sequence[dict[str, Any]], rewards: Sequence[str], held_out: Sequence[str], tasks: Sequence[str]) -> str:
    evaluated = [line for line in metrics if "eval/reward" in line]
    if not evaluated:
        return "It was not evaluated.\n"
    before, after = evaluated[0], evaluated[-1]
    keys = {"reward": f"{_reward(rewards[0])}, trained on" if len(rewards) == 1 else "the reward: their sum"}
    keys |= {name: f"{_reward(name)}, trained on" for name in rewards if len(rewards) > 1}
    keys |= {name: f"{_reward(name)}, held out" for name in held_out}
    keys |= {f"{task}/reward": f"the reward of task {_escape(task)}, trained on" for task in tasks}
    rows = [
        f"| {said} | {_figure(before, name)} | {_figure(after, name)} |"
        for name, said in keys.items()
        if f"eval/{name}" in before
    ]
    header = f"| | before | after {after['queries']:,} queries |"
    return "\n".join(["Means over fixed prompts and seeds, ± standard error.\n", header, "|---|---|---|", *rows, ""])


def _figure(line: dict[str, Any], name: str) -> str:
    value, error = line.get(f"eval/{name}"), line.get(f"eval/{name}_se")
    if value is None:
        return "no valid score"
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _usage(config: dict[str, Any], about: dict[str, Any], base: str | None, prompts: Sequence[str]) -> str:
    """A few lines of diffusers; the embedded model is found by diffusionrl."""
    prompt = ascii(_clean(prompts[0])) if prompts else "'...'"
    file, here = about.get("single_file"), '"this repository or folder"'
    base_said = json.dumps(base or f"{'file' if file else 'folder'} of the base model")
    described = file["config"] if file and _is_hub_id(file["config"]) else "folder of a pipeline of its family"
    lines = loading_lines(config, about, base_said, here, prompt, json.dumps(described))
    return _code("\n".join(lines)) + (f"\n{_COMFYUI}" if about.get("comfyui") and about["format"] == "lora" else "")


_COMFYUI = "`comfyui.safetensors` is the same LoRA under the names that ComfyUI and other interfaces read.\n"


def _command(command: Sequence[str]) -> str:
    """The command line that trained it, without what is private to a machine."""
    program = PurePosixPath(command[0].replace("\\", "/"))
    if program.stem != "diffusionrl" and program.parts[-2:] != ("diffusionrl", "__main__.py"):
        return "Trained from Python.\n"
    words, skip = [], False
    for word in command[1:]:
        name, equals, value = word.partition("=")
        if skip or name in _OWN_NAMES:
            skip = not skip and not equals
            continue
        words.append(f"{name}={_without_path(value)}" if equals and name.startswith("--") else _without_path(word))
    return _code(shlex.join(["diffusionrl", *words]))


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    return _without_path(value) if isinstance(value, str) else value


def _without_path(word: str) -> str:
    """The last part of a path that says where on a machine something lies; of an address, nothing."""
    if "://" in word:
        return "URL"
    private = word.startswith(("~", "..")) or PurePosixPath(word).is_absolute() or PureWindowsPath(word).is_absolute()
    return _last(word) if private else word


def _reward(entry: str) -> str:
    """``NAME`` or ``NAME=WEIGHT``, escaped; of a reward behind an address, not the address."""
    name, equals, weight = entry.partition("=")
    return _escape(f"{_without_path(name)}{equals}{weight}")


def _last(path: str) -> str:
    return PureWindowsPath(path).name or path


def _clean(text: str) -> str:
    """One line, without control characters and without those that turn the direction of text."""
    kept = ("" if unicodedata.category(c) in ("Cc", "Cs", "Cn") or c in _TURNING else c for c in " ".join(text.split()))
    return "".join(kept)


_TURNING = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)}


def _escape(text: str) -> str:
    """Every ASCII character that could mean something to Markdown or HTML as a character reference."""
    return "".join(c if c.isalnum() or c in " ,-" or ord(c) > 127 else f"&#{ord(c)};" for c in _clean(text))


def _code(text: str) -> str:
    return indent(text.rstrip("\n"), "    ", lambda line: True) + "\n"
