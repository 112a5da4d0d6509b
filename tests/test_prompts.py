"""Prompt files, good and bad, and the built-in sets."""

from pathlib import Path

import pytest
from PIL import Image

from diffusionrl.data.prompts import Prompt, PromptFile, fingerprint, load_prompts
from diffusionrl.emoji.vocabulary import ACTIVE_ANIMALS, SKIN_TONE_SHARES, THINGS, with_article
from diffusionrl.errors import RunStopped, UserError


def texts(source: str | Path) -> list[str]:
    return [prompt.text for prompt in load_prompts(str(source))]


def test_built_in_sets_have_the_papers_sizes() -> None:
    assert len(texts("ddpo-animals")) == 45
    assert len(texts("activities")) == 135
    assert "a dolphin riding a bike" in texts("activities")
    assert len(texts("other-animals")) >= 25
    assert len(texts("things")) >= 30
    assert len(texts("occupations")) >= 14
    assert not set(texts("ddpo-animals")) & set(texts("other-animals"))


def test_sets_that_hold_something_out_of_training_by_reward() -> None:
    seen, unseen = texts("thing-pairs"), texts("unseen-thing-pairs")
    assert (len(seen), len(unseen)) == (24 * 23, 32 * 31 - 24 * 23)
    assert len(set(seen + unseen)) == 32 * 31
    assert seen[0] == "an apple and a banana" and "a banana and an apple" in seen
    held_out = [with_article(name) for name in list(THINGS)[-8:]]
    assert not [prompt for prompt in seen if set(prompt.split(" and ")) & set(held_out)]
    assert all(set(prompt.split(" and ")) & set(held_out) for prompt in unseen)
    assert texts("seen-occupations") + texts("unseen-occupations") == texts("occupations")
    assert len(texts("unseen-occupations")) == 4


def test_sets_from_imagenet_and_the_papers_unseen_ones() -> None:
    animals = texts("imagenet-animals")
    assert len(animals) == len(set(animals)) == 398
    assert animals[0] == "tench, Tinca tinca"
    assert animals[-1] == "puffer, pufferfish, blowfish, globefish"
    assert len(texts("unseen-animals")) == 38
    assert len(texts("everyday-objects")) == 50
    assert {"an ostrich", "a walrus", "an orangutan"} <= set(texts("unseen-animals"))
    assert {"an umbrella", "an iron", "scissors"} <= set(texts("everyday-objects"))
    assert not set(texts("unseen-animals")) & set(texts("ddpo-animals"))


def test_articles() -> None:
    assert [with_article(noun) for noun in ("ant", "cat", "umbrella")] == ["an ant", "a cat", "an umbrella"]


def test_the_stated_biases() -> None:
    assert SKIN_TONE_SHARES["light"] + SKIN_TONE_SHARES["medium-light"] == pytest.approx(0.8)
    assert sum(SKIN_TONE_SHARES.values()) == pytest.approx(1)
    assert len(ACTIVE_ANIMALS) == 15


def test_text_and_jsonl(tmp_path: Path) -> None:
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_bytes(b"\xef\xbb\xbfa cat\r\n\r\n  a d\xc3\xb6g \n<script>\n")
    assert texts(text) == ["a cat", "a dög", "<script>"]
    lines.write_text('{"prompt": "a cat", "colour": "red"}\n\n{"prompt": "a dog"}\n')
    assert list(load_prompts(str(lines))) == [Prompt("a cat", {"colour": "red"}), Prompt("a dog")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"", r"p\.txt holds no prompt"),
        ("p.txt", b"\n \n", r"p\.txt holds no prompt"),
        ("p.txt", b"a cat\n\xff\xfe\n", r"p\.txt:2: not UTF-8"),
        ("p.jsonl", b'{"prompt": "a cat"}\n{"text": "a dog"}\n', r"p\.jsonl:2: no \"prompt\".*\['text'\]"),
        ("p.jsonl", b'{"prompt": ""}\n', r"p\.jsonl:1: no \"prompt\""),
        ("p.jsonl", b'{"prompt": 3}\n', r"p\.jsonl:1: no \"prompt\""),
        ("p.jsonl", b'{"prompt": "a"}\n["a cat"]\n', r"p\.jsonl:2: .*is a list"),
        ("p.jsonl", b"a cat\n", r"p\.jsonl:1: not JSON"),
        ("p.txt", b"a cat\na \0 dog\n", r"p\.txt:2: a NUL character at column 3"),
        ("p.txt", b"a cat\n" + 10_000_000 * b"x", r"p\.txt:2: 10,000,000 characters in one prompt"),
        ("p.jsonl", b'{"prompt": "' + 20_000 * b"x" + b'"}', r"p\.jsonl:1: 20,000 characters"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_prompts(str(tmp_path / name))


def test_a_missing_file_names_the_built_in_sets() -> None:
    with pytest.raises(UserError, match=r"no such file, and no built-in set .*ddpo-animals"):
        load_prompts("animals")


def test_a_file_is_a_sequence(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n\n b \nc")
    prompts = load_prompts(str(tmp_path / "p.txt"))
    assert len(prompts) == 3 and prompts[-1] == Prompt("c") and prompts[:2] == [Prompt("a"), Prompt("b")]
    with pytest.raises(IndexError):
        prompts[3]


def test_broken_lines_are_passed_over_up_to_a_limit(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\nbroken\n{"prompt": "c"}\n{}\n')
    assert list(load_prompts(str(file), max_broken=2)) == [Prompt("a"), Prompt("c")]
    with pytest.raises(UserError, match=r"2 broken prompts, more than max_broken_prompts = 1: .*p\.jsonl:2: not JSON"):
        load_prompts(str(file), max_broken=1)


def test_lines_beyond_those_that_are_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken one is found when it is drawn; the next one stands in its place, whoever draws it and when."""
    monkeypatch.setattr("diffusionrl.data.prompts.CHECKED", 2)
    file = tmp_path / "p.jsonl"
    file.write_text('\n{"prompt": "a"}\n{"prompt": "b"}\nbroken\n{"prompt": "d"}\n\nalso broken')
    prompts = load_prompts(str(file), max_broken=1)
    assert isinstance(prompts, PromptFile) and len(prompts) == 6 and not prompts.broken
    assert [prompts[i].text for i in (0, 1, 2, 3, 2)] == ["a", "b", "d", "d", "d"]
    assert prompts.broken == {3: f"{file}:4: not JSON (Expecting value: line 1 column 1 (char 0)); " + EXAMPLE}
    with pytest.raises(RunStopped, match=r"2 broken prompts, more than max_broken_prompts = 1: .*:4: .*:7: not JSON"):
        prompts[5]


def test_a_broken_line_counts_beside_those_that_were_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusionrl.data.prompts.CHECKED", 2)
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\nbroken\nbroken too\n')
    with pytest.raises(RunStopped, match=r"2 broken prompts, more than max_broken_prompts = 1: .*:2: .*:3: not JSON"):
        load_prompts(str(file), max_broken=1)[1]


EXAMPLE = 'each line is an object like {"prompt": "a cat"}'


def test_parquet_and_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"prompt": ["a cat", " a dog ", None, ""], "colour": ["red", "blue", "green", "grey"]}
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "folder" / "p.parquet")
    for source in (str(tmp_path / "folder" / "p.parquet"), f"dataset:{tmp_path / 'folder'}"):
        prompts = load_prompts(source, max_broken=1)
        assert prompts[0] == Prompt("a cat", {"colour": "red"}) == prompts[2] == prompts[3]
        assert prompts[1] == Prompt("a dog", {"colour": "blue"})
        assert fingerprint(prompts) == fingerprint(load_prompts(source, max_broken=1))
        with pytest.raises(UserError, match="row 2: the prompt is a NoneType"):
            load_prompts(source)
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r'no column "prompt", but \[\'text\'\]'):
        load_prompts(str(tmp_path / "other.parquet"))
    with pytest.raises(UserError, match=r"cannot be loaded"):
        load_prompts(f"dataset:{tmp_path / 'nowhere'}")


def test_images_beside_prompts_are_left_out(tmp_path: Path) -> None:
    """Decoded, they would be other objects at every start, and no run could go on."""
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "p.parquet"
    rows = {"prompt": ["a cat", "a dog"], "colour": ["red", "blue"], "image": [Image.new("RGB", (4, 4))] * 2}
    features = {"prompt": datasets.Value("string"), "colour": datasets.Value("string"), "image": datasets.Image()}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(file)
    prompts = load_prompts(str(file))
    assert list(prompts) == [Prompt("a cat", {"colour": "red"}), Prompt("a dog", {"colour": "blue"})]
    assert fingerprint(prompts) == fingerprint(load_prompts(str(file)))


def test_rows_are_checked_many_at_once_and_no_more_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "p.parquet"
    datasets.Dataset.from_dict({"prompt": [f"prompt {i}" for i in range(5000)] + [None]}).to_parquet(file)
    read: list[int] = []
    original = datasets.Dataset.__getitem__
    monkeypatch.setattr(datasets.Dataset, "__getitem__", lambda self, key: (read.append(key), original(self, key))[1])
    assert len(load_prompts(str(file), limit=10)) == 5001, "as the command line looks at it first"
    with pytest.raises(UserError, match="row 5000: the prompt is a NoneType"):
        load_prompts(str(file))
    assert len(read) <= 2 * 2000, "two thousand for the fingerprint, and none one by one"


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    first = fingerprint(load_prompts(str(tmp_path / "p.txt")))
    (tmp_path / "q.txt").write_text("a cat\na dog\n")
    assert fingerprint(load_prompts(str(tmp_path / "q.txt"))) == first
    (tmp_path / "p.txt").write_text("a cat\nan ant\n")
    assert fingerprint(load_prompts(str(tmp_path / "p.txt"))) != first


def test_the_fingerprint_is_of_images_too(tmp_path: Path) -> None:
    """Of their content: a file that was written anew alike is the same, and so is an image from memory."""

    def found(shade: int) -> str:
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(tmp_path / "cat.png")
        (tmp_path / "p.jsonl").write_text('{"prompt": "make it snow", "image": "cat.png"}\n')
        return fingerprint(load_prompts(str(tmp_path / "p.jsonl")))

    assert found(1) == found(1) != found(2)
    first, same, other = (
        [Prompt("make it snow", media={"image": Image.new("RGB", (4, 4), (shade, 0, 0))})] for shade in (1, 1, 2)
    )
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)
    assert first[0].key == same[0].key != other[0].key
