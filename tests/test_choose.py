"""``diffusionrl choose`` and the reward "human", without a browser: what is shown, what is kept, what is waited for."""

import json
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from choosers import Program, ask, choices_in, choose, lines_of, make_images, until
from PIL import Image

from diffusionrl.choosing import choices as choices_module
from diffusionrl.choosing.board import Round
from diffusionrl.choosing.choices import KIND
from diffusionrl.choosing.page import PageServer
from diffusionrl.choosing.rounds import plan
from diffusionrl.cli import main
from diffusionrl.config import RewardsConfig, SamplingConfig
from diffusionrl.config.rewards import HumanConfig
from diffusionrl.config.search import DemonConfig
from diffusionrl.data.gallery import gallery
from diffusionrl.data.preferences import load_preferences
from diffusionrl.errors import UserError
from diffusionrl.rewards import RewardCall, as_mixture, load_reward, score, try_mixture
from diffusionrl.rewards.human import Human
from diffusionrl.runs.work import held
from diffusionrl.sampling.search import search

# What is shown


def test_every_image_comes_once_beside_others_of_its_prompt() -> None:
    images = [(Path(f"{prompt}{i}"), prompt) for prompt, count in (("a", 6), ("b", 5), ("c", 1)) for i in range(count)]
    rounds, prompts = plan(images, 2, None, 0), dict(images)
    shown = Counter(image for each in rounds for image in each.images)
    assert all({prompts[image] for image in each.images} == {each.prompt} for each in rounds)
    assert all(len(set(each.images)) == 2 for each in rounds)
    assert sorted(shown.values()) == [1] * 10 + [2] and Path("c0") not in shown, "one of an odd number comes again"
    assert plan(images, 2, 20, 0)[: len(rounds)] == rounds, "more rounds begin alike"
    assert plan(images, 2, None, 1) != rounds
    assert {len(each.images) for each in plan(images, 8, None, 0)} == {6, 5}
    with pytest.raises(UserError, match="no prompt has two images"):
        plan(images[-1:], 2, None, 0)


def test_a_runs_samples_have_the_prompts_that_they_were_made_from(tmp_path: Path) -> None:
    for step in ("step_000000", "step_000002", "recent/step_000001"):
        folder = tmp_path / "run/samples" / step
        folder.mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (8, 8)).save(folder / f"{index:05d}.png")
        (folder / "samples.jsonl").write_text("".join(json.dumps({"index": i, "prompt": "ab"[i]}) + "\n" for i in range(2)))
    (tmp_path / "run/config.yaml").write_text("model: emoji\n")
    found = gallery(tmp_path / "run")
    assert [(str(file.relative_to(tmp_path / "run/samples")), prompt) for file, prompt in found] == [
        ("step_000000/00000.png", "a"),
        ("step_000000/00001.png", "b"),
        ("step_000002/00000.png", "a"),
        ("step_000002/00001.png", "b"),
    ]


# What is kept


def round_of(folder: Path, size: int = 2) -> Round:
    return Round("a cat", [folder / f"{index:04d}.png" for index in range(size)])


def test_what_was_chosen_is_read_by_dpo_and_kto(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", ["a cat"])
    choices = choices_in(tmp_path / "judged", round_of(images, 4), round_of(images), round_of(images))
    for number, chosen in enumerate(([2], None, [1])):
        choices.act("choose", number, chosen)
    found = load_preferences(str(tmp_path / "judged"))
    assert found is not None and found.size == 2 and len(found) == 4, "the best with each of the three others, and one pair"
    judged, pictures = found.draw(0)
    assert judged.prompt == "a cat" and [each.getpixel((0, 0)) for each in pictures] == [(50, 215, 20), (0, 255, 0)]


def test_a_choice_that_cannot_be_kept_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, (left, right) = make_images(tmp_path / "images", ["a cat"]), ([0], [1])

    def full(*arguments: Any) -> None:
        raise OSError("no space left")

    choices = choices_in(tmp_path / "judged", *[round_of(images)] * 3)
    choices.act("choose", 0, left)
    before = (tmp_path / "judged/metadata.jsonl").read_text()
    for action in ("choose", "undo"):
        with monkeypatch.context() as patch:
            patch.setattr(choices_module, "replace_file", full)
            with pytest.raises(OSError, match="no space"):
                choices.act(action, 1, right)
    assert choices.answers == [left] and (tmp_path / "judged/metadata.jsonl").read_text() == before
    choices.act("choose", 1, right)
    assert choices_in(tmp_path / "judged").answers == [left, right]


def test_the_pairs_are_what_the_choices_say(tmp_path: Path) -> None:
    """A killed process may have written one file and not the other."""
    images = make_images(tmp_path / "images", ["a cat"])
    choices_in(tmp_path / "judged", round_of(images)).act("choose", 0, [0])
    pairs = lines_of(tmp_path / "judged/metadata.jsonl")
    (tmp_path / "judged/metadata.jsonl").unlink()
    choices_in(tmp_path / "judged")
    assert lines_of(tmp_path / "judged/metadata.jsonl") == pairs


def test_a_model_draws_as_you_go(tiny_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed and taken up, it goes on as if it had not been."""
    monkeypatch.chdir(tmp_path)
    asked = ["choose", "--model", str(tiny_folder), "--prompts", "a cat", "a dog", "--sampling.num-steps", "2"]
    for out, stops in (("whole", (3,)), ("parts", (2, 3))):
        for stop in stops:
            program = Program(capsys, *asked, "--out", out)
            while ask(program.address)[1]["done"] < stop:
                choose(program.address, [0])
            assert ask(program.address, "finish", {"round": None, "chosen": None})[0] == 200
            assert program.code() == 0 and f"{stop} choices in {out}" in program.said
    pairs = lines_of(tmp_path / "whole/metadata.jsonl")
    assert [pair["prompt"] for pair in pairs] == ["a cat", "a dog", "a cat"]
    assert lines_of(tmp_path / "parts/metadata.jsonl") == pairs
    names = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    drawn = [(tmp_path / "whole" / name).read_bytes() for name in names]
    assert len(set(drawn)) == 6 and [(tmp_path / "parts" / name).read_bytes() for name in names] == drawn


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name one thing to choose among"),
        (["images", "--model", "emoji"], "name one thing to choose among"),
        (["nowhere"], "nowhere is not there, no folder of images"),
        (["empty"], "empty holds no image"),
        (["bare"], "name what all its images show with --prompt"),
        (["broken"], "1 images in broken are not there, or no JPEG, PNG or WebP: 0000.png"),
        (["alone"], "no prompt has two images"),
        (["images", "--out", "bare"], "bare is there, and no selection: choose another --out"),
        (["images", "--out", "kept"], "kept holds another selection: images was '3 images, "),
        (["images", "--out", "kept/lock"], "a file, not a folder: choose another --out"),
        (["images", "--port", "PORT"], "choose another --port, or 0 for any free one"),
        (["--model", "emoij", "--prompts", "a cat"], "emoij"),
    ],
)
def test_what_cannot_be_is_named_with_the_remedy(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    make_images(Path("images"), ["a cat"])
    make_images(Path("alone"), ["a cat", "a dog"], each=1)
    (make_images(Path("broken"), ["a cat"]) / "0000.png").write_text("no image")
    (make_images(Path("bare"), ["a cat"]) / "metadata.jsonl").unlink()
    Path("empty").mkdir()
    with held(Path("kept"), KIND, {"images": "3 images, abc"}):
        pass
    before = sorted(Path().rglob("*"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["choose", *[port if each == "PORT" else each for each in arguments]]) == 2
    assert said in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before, "nothing is written"


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    choices_in(tmp_path / "judged")
    (tmp_path / "judged/choices.jsonl").write_text('{"prompt": "a", "shown": ["1", "2"], "chosen": 7}\n')
    with pytest.raises(UserError, match=r"choices.jsonl:1 is broken .*: remove it and all below"):
        choices_in(tmp_path / "judged")


# Who may


def test_strangers_see_and_choose_nothing(tmp_path: Path) -> None:
    choices = choices_in(tmp_path / "judged", round_of(make_images(tmp_path / "images", ["a cat"])))
    with PageServer(0) as page:
        page.show(choices)
        vote = {"round": 0, "chosen": [0]}
        assert ask(page.address)[0] == 200 and ask(page.address, "image/0/1")[0] == 200
        for status, place, body, headers in (
            (403, "choose", vote, {"Origin": "http://127.0.0.1:9"}),
            (403, "choose", vote, {"Origin": "null"}),
            (403, "choose", vote, {"Origin": ""}),
            (415, "choose", vote, {"Content-Type": "text/plain"}),
            (421, "choose", vote, {"Host": "evil.example"}),
            (421, "state", None, {"Host": "evil.example"}),
            (400, "choose", {"round": 0, "chosen": [2]}, {}),
            (400, "choose", {"round": 0, "chosen": [0, 1]}, {}),
            (400, "choose", {"round": 0, "chosen": "0"}, {}),
            (400, "vote", vote, {}),
            (409, "choose", {"round": 1, "chosen": [0]}, {}),
            (404, "image/0/2", None, {}),
            (404, "image/7/0", None, {}),
            (404, "image/0/../../page.py", None, {}),
        ):
            assert ask(page.address, place, body, **headers)[0] == status, (place, body, headers)
        for stranger in (page.url + "/", f"{page.url}/{'x' * len(page.token)}/"):
            assert ask(stranger)[0] == 403 and ask(stranger, "image/0/0")[0] == 403 and ask(stranger, "choose", vote)[0] == 403
        assert choices.answers == []


# A person as the reward


def judge(human: Human, answers: list[list[int] | None]) -> threading.Thread:
    """A person who answers so, one after the other."""

    def work() -> None:
        for answer in answers:
            until(lambda: len(human.board.answers) < len(human.board.rounds))
            human.board.act("choose", len(human.board.answers), answer)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "a", "a", "b", "b"]


def test_a_person_likes_some_and_passes_over_others(capsys: Any) -> None:
    human = Human(HumanConfig(size=2), 60.0)
    assert capsys.readouterr().err == f"you are the reward: open {human.page.address}\n"
    person = judge(human, [[1], None, []])  # of two of "a", the third, and both of "b"
    found = score(human, IMAGES, PROMPTS, [{}] * 5)
    person.join()
    assert found.valid.tolist() == [True, True, False, True, True]
    assert found.values.tolist() == [0, 1, 0, 0, 0] and "1 of 5 images were passed over" in str(found.error)
    assert "5 images wait for you at" in capsys.readouterr().err
    assert human.counts == {"asked": 5, "judged": 4}
    with pytest.raises(LookupError):
        human.board.image(0, 0)  # which nobody needs any more
    human.page.__exit__()


def test_what_is_not_judged_in_time_is_invalid_and_a_pause_stops_the_clock() -> None:
    human = Human(HumanConfig(size=3), 1.5)
    call = RewardCall(as_mixture(human), IMAGES, PROMPTS, [{}] * 5)
    person = judge(human, [[0]])
    call.start()
    found = call.result(1.5)
    person.join()
    assert found.valid.tolist() == [True] * 3 + [False] * 2 and "not judged within 1.2 s" in str(found.error)

    human.board.act("pause", None, None)
    call = RewardCall(as_mixture(human), IMAGES, PROMPTS, [{}] * 5)
    call.start()
    late = threading.Timer(1.8, lambda: (judge(human, [[0], [1]]), human.board.act("pause", None, None)))
    late.start()
    found = call.result(1.5)
    assert found.valid.all() and found.values.tolist() == [1, 0, 0, 0, 1]
    assert call.seconds > 1.8 - 0.1
    human.page.__exit__()


def test_a_person_is_not_asked_about_grey_images() -> None:
    human = load_reward("human", RewardsConfig(timeout=60.0))
    assert try_mixture(as_mixture(human), (3, 8, 8), ["a"], [{}], timeout=5.0) == []
    assert human.board.rounds == []  # type: ignore[attr-defined]
    human.page.__exit__()  # type: ignore[attr-defined]


def test_a_taken_port_is_named_by_its_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match=r"--rewards\.human\.port, or 0"):
        load_reward("human", RewardsConfig(human=HumanConfig(port=taken.getsockname()[1])))


def test_demon_with_a_person(make_policy: Callable[..., Any]) -> None:
    """Who likes the brighter half at each step, and is asked once more before and after."""
    human = Human(HumanConfig(), 60.0)
    config, sampling = DemonConfig(candidates=4, queries=8, lookahead=1), SamplingConfig(num_steps=3, eta=1.0)

    def likes() -> None:
        for _ in range(4):
            until(lambda: len(human.board.answers) < len(human.board.rounds))
            now = len(human.board.answers)
            images = human.board.rounds[now].images
            human.board.act("choose", now, list(range(len(images) // 2 + 1)))

    person = threading.Thread(target=likes)
    person.start()
    (found,) = search(make_policy(), human, ["a cat"], config=config, sampling=sampling, rewards=replace(RewardsConfig()))
    person.join()
    assert found.spent.queries == 8 and found.spent.invalid == 0 and len(found.rounds) == 2
    assert found.rounds[0].values == [1, 1, 1, 0] and found.scores["after"]["reward"] == 1
    human.page.__exit__()
