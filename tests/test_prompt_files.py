"""A prompt file is what it looks like: content decides, and what cannot be meant as prompts is refused with the way out."""

import contextlib
import csv
import gzip
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusionrl.data.prompts import Prompt, fingerprint, load_prompts
from diffusionrl.errors import RunStopped, UserError

TWO = [Prompt("a cat"), Prompt("a dog")]
AIMED = [Prompt("a red cat, sitting", {"target": "0.3"}), Prompt("a dog", {"target": "0.7"})]


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.csv", b'prompt,target\n"a red cat, sitting",0.3\n"a dog",0.7\n', AIMED),
        ("p.txt", b'prompt,target\n"a red cat, sitting",0.3\n"a dog",0.7\n', AIMED),
        ("p", b"\xef\xbb\xbftarget ; Prompt\r\n0.3;a red cat, sitting\r\n\r\n0.7; a dog\r\n;\r\n", AIMED),
        ("p.TSV", b"prompt\ttarget\na red cat, sitting\t0.3\na dog\t0.7\n", AIMED),
        ("p.tsv", b"target|prompt\r0.3|a red cat, sitting\r0.7|a dog\r", AIMED),
        ("p.csv", b'prompt\n"a cat,\nasleep"\n', [Prompt("a cat,\nasleep")]),
        ("p.csv", b",prompt\n0,a cat\n1,a dog\n", [Prompt("a cat", {"": "0"}), Prompt("a dog", {"": "1"})]),
        ("p.json", b'["a cat", "a dog"]', TWO),
        ("p.json", b'[\n "a cat",\n "a dog"\n]', TWO),
        ("p.txt", b'[\n {"prompt": "a cat"},\n {"prompt": "a dog"}\n]', TWO),
        ("p.jsonl", b'[{"prompt": "a cat"},\n{"prompt": "a dog"}]\n', TWO),
        ("p.JSONL", b'{"prompt": "a cat"}\n{"prompt": "a dog"}\n', TWO),
        ("p.ndjson", b'{"prompt": "a cat"}\n{"prompt": "a dog"}\n', TWO),
        ("p.json", b'{"prompt": "a cat"}\n{"prompt": "a dog"}\n', TWO),
        ("p.json", b'{\n"prompt": "a cat"\n}\n', TWO[:1]),
        ("p.txt", b'{"prompt": "a cat"}\n{"prompt": "a dog"}\n', TWO),
        ("p.jsonl", b'"a cat"\n"a dog"\n', TWO),
        ("p.txt", b"a cat\ra dog\r", TWO),
        ("p.txt", b"\xef\xbb\xbfa cat\r\n\r\na dog", TWO),
        ("p.jsonl", b'\xef\xbb\xbf{"prompt": "a cat"}\r\n\r\n{"prompt": "a dog"}\r\n', TWO),
        ("p.txt", b"[blurry] cat\n{red|blue} dog\n", [Prompt("[blurry] cat"), Prompt("{red|blue} dog")]),
        ("p.txt", b"prompt, a great one\n", [Prompt("prompt, a great one")]),
        ("p.txt", b"text, logo\nred, flat, vector\n", [Prompt("text, logo"), Prompt("red, flat, vector")]),
        ("p.txt", b"a well-known cat - asleep -- or not\n", [Prompt("a well-known cat - asleep -- or not")]),
        ("p.jsonl", b'{"prompt": "a castle --n trees"}', [Prompt("a castle --n trees")]),
    ],
)
def test_content_decides(tmp_path: Path, name: str, content: bytes, prompts: list[Prompt]) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(load_prompts(str(tmp_path / name))) == prompts


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b'--prompt "a castle" --negative_prompt "trees" --steps 20\n', r"p\.txt:1: --prompt reads as an option"),
        ("p.txt", b"a cat\na castle --n trees, plants --w 512\n", r"p\.txt:2: --n reads .*--sampling\.negative-prompt"),
        ("p.txt", b"a castle -W 512 -H 512\n", r"p\.txt:1: -W reads"),
        ("p.txt", b"a cat --ar=16:9\n", r"p\.txt:1: --ar reads"),
        ("p.txt", b'a cat\n{"prompt": "a dog"}\n', r"p\.txt:2: a line of JSON in a text file"),
        ("p.txt", b'{"prompt": "a cat",}\n', r"p\.txt:1: not JSON"),
        ("p.txt", b'["a cat, "a dog"]\n', r"p\.txt:1: not JSON"),
        ("p.json", b'{"prompts": ["a cat"]}\n', r"""no "prompt" with text in it .*\['prompts'\]"""),
        ("p.json", b'{\n"prompts": ["a cat"]\n}\n', r"an object with the keys \['prompts'\], not a list"),
        ("p.json", b"[3]", r"entry 1: no \"prompt\" .*is a int"),
        ("p.json", b"a cat\n", "not JSON"),
        ("p.json", b"[" * 9000, "not JSON"),
        ("p.csv", b"a cat\na dog\n", r"no column \"prompt\" in its first line, but \['a cat'\]"),
        ("p.txt", b"caption,target\na cat,1\na dog,2\n", r"no column \"prompt\" .*\['caption', 'target'\]"),
        ("p.csv", b"prompt,target\na cat, red,1\n", r"p\.csv:2: 3 columns, and the first line names 2 .*double quotes"),
        ("p.csv", b"prompt,target\na cat\n", r"p\.csv:2: 1 columns"),
        ("p.csv", b"prompt,target\n,1\n", r"p\.csv:2: no \"prompt\" with text"),
        ("p.csv", b"prompt,a,a\nx,1,2\n", "two columns 'a'"),
        ("p.csv", b'prompt,a\n"x,1\ny,2\n', "double quotes"),
        ("p.csv", b"prompt,a\n\xff,1\n", r"p\.csv:2: not UTF-8"),
        ("p.csv", b"", "holds no prompt"),
        ("p.csv", b"prompt\n", "holds no prompt"),
        ("p.json", b"[]", "holds no prompt"),
        ("p.csv", b"prompt,negative_prompt\na cat,ugly\n", r"p\.csv:2: .*--sampling\.negative-prompt is one for all"),
        ("p.jsonl", b'{"prompt": "a \\ud83d cat"}\n', r"p\.jsonl:1: half a character at column 3"),
        ("p.json", b'["a cat", "a \\ud800 dog"]', "entry 2: half a character"),
        ("p.txt", "a cat\n".encode("utf-16"), "UTF-16: save"),
        ("p.txt.gz", gzip.compress(b"a cat\n", mtime=0), "is compressed"),
        ("p.csv", b"PK\x03\x04...", "spreadsheet"),
        ("p.txt", b"PAR1...", "datasets|cannot be loaded"),
    ],
)
def test_what_is_no_prompt_is_refused_with_the_way_out(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_prompts(str(tmp_path / name))


def test_broken_rows_count_as_broken_lines(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,target\na cat,1\na dog, red,2\nan owl,3\n")
    prompts = load_prompts(str(tmp_path / "p.csv"), max_broken=1)
    assert [prompts[i].text for i in range(3)] == ["a cat", "an owl", "an owl"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a \\ud83d"}\n')
    assert list(load_prompts(str(tmp_path / "p.jsonl"), max_broken=1)) == TWO[:1]


def test_paths_are_what_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    assert list(load_prompts("~/p.txt")) == TWO
    os.mkfifo(tmp_path / "pipe")
    for source, said in [
        ("~nosuchuser/p.txt", "no user"),
        (str(tmp_path / "pipe"), "a pipe or a device"),
        ("x" * 300, "no such file"),
        ("a\0b", "no such file"),
    ]:
        with pytest.raises(UserError, match=said):
            load_prompts(source)


def test_a_look_at_the_first_lines_does_not_take_blank_ones_for_all(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n" * 50 + "a cat\n")
    assert len(load_prompts(str(tmp_path / "p.txt"), limit=10)) == 0
    assert list(load_prompts(str(tmp_path / "p.txt"))) == TWO[:1]


def test_a_file_that_is_written_to_while_it_is_read_stops_the_run(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a cat\na dog\n")
    prompts = load_prompts(str(file))
    assert prompts[0] == TWO[0]
    file.write_text("an elephant\na dog\n")
    with pytest.raises(RunStopped, match=r"p\.txt was written to while it was in use"):
        prompts[1]


def test_captions_beside_images_are_prompts(tmp_path: Path) -> None:
    for name in ("0", "1"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a cat, number {name}\n")
    expected = [Prompt(f"a cat, number {i}", {"file_name": f"{i}.png"}) for i in range(2)]
    assert list(load_prompts(str(tmp_path))) == expected
    (tmp_path / "1.txt").unlink()
    with pytest.raises(UserError, match=r"1 images .* have no caption in a .txt file beside them: 1\.png"):
        load_prompts(str(tmp_path))


def _written(kind: str, entries: list[dict[str, str]]) -> str:
    if kind == "json lines":
        return "".join(json.dumps(entry) + "\n" for entry in entries)
    if kind.startswith("json"):
        return json.dumps(entries, indent=1 if kind == "json, indented" else None)
    table = io.StringIO()
    rows = csv.DictWriter(table, ["prompt", "note"], delimiter=kind, quoting=csv.QUOTE_ALL)
    rows.writeheader()
    rows.writerows(entries)
    return table.getvalue()


words = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cc"]), min_size=1, max_size=30)
texts = words.map(str.strip).filter(bool)


@settings(max_examples=examples(150))
@given(
    st.lists(st.fixed_dictionaries({"prompt": texts, "note": texts}), min_size=1, max_size=4),
    st.sampled_from(["json lines", "json", "json, indented", ",", ";", "\t", "|"]),
    st.sampled_from([".txt", "", ".JSON", ".jsonl", ".csv", ".tsv", ".prompts"]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_prompts_written_in_any_format_under_any_name_are_read_or_refused(
    entries: list[dict[str, str]], kind: str, suffix: str, end: str, mark: bool
) -> None:
    """Never as other prompts, and those of the same content have the same fingerprint."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"p{suffix}"
        text = _written(kind, entries).replace("\r\n", "\n").replace("\n", end)
        file.write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
        prompts: Any = None
        with contextlib.suppress(UserError):
            prompts = load_prompts(str(file))
            assert list(prompts) == [Prompt(entry["prompt"], {"note": entry["note"]}) for entry in entries]
            assert fingerprint(prompts) == fingerprint(load_prompts(str(file)))
        assert prompts is not None or suffix in (".csv", ".tsv", ".JSON", ".jsonl"), "a plain name says nothing else"


@settings(max_examples=examples(150))
@given(st.lists(texts, min_size=1, max_size=5), st.sampled_from(["\n", "\r\n", "\r"]))
def test_plain_lines_are_themselves_or_refused(lines: list[str], end: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "p.txt"
        file.write_bytes(end.join(lines).encode())
        with contextlib.suppress(UserError):
            assert [prompt.text for prompt in load_prompts(str(file))] == lines
