"""The vision-language rewards over real HTTP on loopback, with the faults that a server can produce."""

import base64
import io
import json
import math
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizer

from diffusionrl.config.judges import VLMConfig
from diffusionrl.config.rewards import RewardsConfig
from diffusionrl.errors import UserError
from diffusionrl.rewards import Scores, load_reward, score, try_reward
from diffusionrl.rewards.bertscore import BERTScore

Handler = BaseHTTPRequestHandler
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS, NOTHING = ["a cat", "a dog", "an ant"], [{}, {}, {}]


def text_answer(text: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def yes_answer(tokens: dict[str, float]) -> dict[str, Any]:
    top = [{"token": token, "logprob": logprob} for token, logprob in tokens.items()]
    return {"choices": [{"message": {"content": "?"}, "logprobs": {"content": [{"top_logprobs": top}]}}]}


SURE = yes_answer({"Yes": math.log(0.8), " no": math.log(0.2)})


def send(handler: Handler, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def reply(answer: Any, **keywords: Any) -> Callable[[Handler, dict[str, Any]], None]:
    return lambda handler, request: send(handler, json.dumps(answer).encode(), **keywords)


@dataclass
class Server:
    """What it does with a request is ``behaviour``; what it was asked is in ``requests``."""

    url: str = ""
    behaviour: Callable[[Handler, dict[str, Any]], None] = field(default_factory=lambda: reply(SURE))
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    busy: int = 0
    busiest: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Answering(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests.append(request)
                state.headers.append(dict(self.headers))
                state.busy += 1
                state.busiest = max(state.busiest, state.busy)
            try:
                state.behaviour(self, request)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with state.lock:
                    state.busy -= 1

        def log_message(self, *arguments: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def settings(server: Server, **changes: Any) -> VLMConfig:
    return replace(VLMConfig(url=server.url, model="llava", timeout=0.5, retries=1, backoff=0.01, cache=None), **changes)


def ask(server: Server, images: Tensor = IMAGES, **changes: Any) -> tuple[Scores, dict[str, int]]:
    reward = load_reward("vlm-yes", RewardsConfig(vlm=settings(server, **changes)))
    scores = score(reward, images, PROMPTS[: len(images)], NOTHING[: len(images)])
    return scores, reward.counts  # type: ignore[attr-defined]


def test_the_probability_of_yes(server: Server) -> None:
    tokens = {"Yes": math.log(0.3), " yes": math.log(0.3), "NO": math.log(0.2), "Maybe": math.log(0.1)}
    server.behaviour = reply(yes_answer(tokens))
    scores, counts = ask(server)
    torch.testing.assert_close(scores.values.float(), torch.full((3,), 0.75))
    assert scores.valid.all()
    assert counts == {"asked": 3, "cached": 0, "failed": 0}


def test_what_is_sent_is_the_image_to_the_pixel_and_the_question(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    ask(server, IMAGES[:1])
    (request,) = server.requests
    picture, question = request["messages"][0]["content"]
    pixels = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))))
    sent = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).view(8, 8, 3)
    assert torch.equal(sent, (IMAGES[0] * 255).round().to(torch.uint8).permute(1, 2, 0))
    assert question["text"] == "Does this image show a cat? Answer yes or no."
    assert (request["model"], request["logprobs"], request["max_tokens"]) == ("llava", True, 1)
    assert server.headers[0]["Authorization"] == "Bearer sesame"


def test_requests_run_together_up_to_the_limit(server: Server) -> None:
    def slow(handler: Handler, request: dict[str, Any]) -> None:
        time.sleep(0.05)
        send(handler, json.dumps(SURE).encode())

    server.behaviour = slow
    images = IMAGES.repeat(4, 1, 1, 1)
    reward = load_reward("vlm-yes", RewardsConfig(vlm=settings(server, concurrency=3, timeout=5.0)))
    assert score(reward, images, PROMPTS * 4, NOTHING * 4).valid.all()
    assert 1 < server.busiest <= 3


def hang(handler: Handler, request: dict[str, Any]) -> None:
    time.sleep(1.0)
    handler.close_connection = True


def drip(handler: Handler, request: dict[str, Any]) -> None:
    """A byte now and then: no read times out, the whole never comes."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        time.sleep(0.05)
    handler.close_connection = True


def cut(handler: Handler, request: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def hang_up(handler: Handler, request: dict[str, Any]) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def flood(handler: Handler, request: dict[str, Any]) -> None:
    send(handler, b"[" * 1_200_000)


@pytest.mark.parametrize(
    ("behaviour", "said", "tries"),
    [
        (hang, "no answer within 0.3 s, at the last of 2 tries", 2),
        (drip, "no answer within 0.3 s, at the last of 2 tries", 2),
        (cut, "IncompleteRead", 2),
        (hang_up, "at the last of 2 tries", 2),
        (flood, "longer than 1000000 bytes", 2),
        (reply({"error": "overloaded"}, status=503), r'503: {"error": "overloaded"}, at the last of 2', 2),
        (reply({"error": "slow down"}, status=429), "429", 2),
        (reply({"error": "no such model"}, status=404), 'answered 404: {"error": "no such model"}', 1),
        (reply({"error": "who are you"}, status=401), "401", 1),
        (reply(SURE, status=307, headers={"Location": "http://127.0.0.1:1/"}), "307", 1),
        (lambda handler, request: send(handler, b"<html>hello</html>"), "something else than JSON", 2),
        (lambda handler, request: send(handler, b"\xff\xfe"), "something else than JSON", 2),
        (reply([1, 2]), "a JSON list, not a chat completion", 1),
        (reply({"choices": []}), "the reply has no log-probabilities", 1),
        (reply(text_answer("yes")), "the reply has no log-probabilities", 1),
        (reply(yes_answer({"maybe": -0.1})), "neither yes nor no", 1),
        (reply(yes_answer({"yes": 5.0, "no": -1.0})), "log-probabilities are none", 1),
        (reply(yes_answer({"yes": math.nan, "no": -1.0})), "log-probabilities are none", 1),
        (reply(SURE, headers={"X-Request-Id": "diffusionrl-of-another"}), "answered for another image", 1),
    ],
)
def test_a_fault_makes_the_sample_invalid_and_says_what_happened(
    server: Server, behaviour: Callable[[Handler, dict[str, Any]], None], said: str, tries: int
) -> None:
    server.behaviour = behaviour
    scores, counts = ask(server, IMAGES[:1], timeout=0.3)
    assert not scores.valid.any()
    assert scores.error is not None
    assert said in scores.error and "asked about 'a cat'" in scores.error
    assert counts == {"asked": tries, "cached": 0, "failed": 1}
    assert len(server.requests) == tries


def test_a_server_that_is_not_there_is_named_before_anything_slow(server: Server) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        reward = load_reward("vlm-yes", RewardsConfig(vlm=settings(server, url=url)))
        with pytest.raises(UserError, match=r"grey 8 x 8 images: .*refused"):
            try_reward(reward, (3, 8, 8), ["a cat"], [{}])


@pytest.mark.parametrize("bad", ["{}", "[" * 90_000, json.dumps(yes_answer({"yes": 10**400})), "1" + 90_000 * "0"])
def test_only_the_failed_sample_is_invalid(server: Server, bad: str) -> None:
    def picky(handler: Handler, request: dict[str, Any]) -> None:
        about_the_dog = "a dog" in request["messages"][0]["content"][1]["text"]
        send(handler, (bad if about_the_dog else json.dumps(SURE)).encode())

    server.behaviour = picky
    scores, counts = ask(server)
    assert scores.valid.tolist() == [True, False, True]
    assert counts["failed"] == 1


def test_a_second_try_may_be_luckier(server: Server) -> None:
    def recovering(handler: Handler, request: dict[str, Any]) -> None:
        first = len(server.requests) == 1
        send(handler, json.dumps(SURE).encode(), status=500 if first else 200)

    server.behaviour = recovering
    scores, counts = ask(server, IMAGES[:1])
    assert scores.valid.all()
    assert counts == {"asked": 2, "cached": 0, "failed": 0}


def test_after_a_time_out_the_late_answer_is_not_taken_for_the_next_one(server: Server) -> None:
    def late_once(handler: Handler, request: dict[str, Any]) -> None:
        late = len(server.requests) == 1
        time.sleep(0.5 if late else 0)
        send(handler, json.dumps(yes_answer({"no": -0.01, "yes": -9.0}) if late else SURE).encode())

    server.behaviour = late_once
    reward = load_reward("vlm-yes", RewardsConfig(vlm=settings(server, concurrency=1, timeout=0.3, retries=0)))
    scores = score(reward, IMAGES, PROMPTS, NOTHING)
    assert scores.valid.tolist() == [False, True, True]
    torch.testing.assert_close(scores.values[1:].float(), torch.full((2,), 0.8))


def test_answers_are_kept_by_image_and_question(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cache.sqlite"
    first, _ = ask(server, cache=cache)
    again, counts = ask(server, cache=cache)  # a new client, as a new process would have
    assert torch.equal(first.values, again.values)
    assert counts == {"asked": 0, "cached": 3, "failed": 0}
    _, other_question = ask(server, cache=cache, ask="Is this {prompt}?")
    _, other_model = ask(server, cache=cache, model="another")
    _, other_images = ask(server, 1 - IMAGES, cache=cache)
    _, other_server = ask(server, cache=cache, url=server.url.replace("127.0.0.1", "localhost"))
    assert other_question["asked"] == other_model["asked"] == other_images["asked"] == other_server["asked"] == 3


def test_a_refused_answer_is_not_kept(server: Server, tmp_path: Path) -> None:
    server.behaviour = reply(text_answer("yes"))
    ask(server, cache=tmp_path / "cache.sqlite")
    server.behaviour = reply(SURE)
    scores, counts = ask(server, cache=tmp_path / "cache.sqlite")
    assert scores.valid.all() and counts["asked"] == 3


def test_what_a_user_can_mend_is_an_error_at_once(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no database, but quite long enough to be looked at " * 20)
    for changes, said in [({"model": ""}, "rewards.vlm.model is needed"), ({"cache": tmp_path / "cache"}, "cannot be opened")]:
        with pytest.raises(UserError, match=said):
            load_reward("vlm-yes", RewardsConfig(vlm=settings(server, **changes)))
    for changes, said in [
        ({"url": "file:///etc/passwd"}, "http"),
        ({"concurrency": 0}, "at least 1"),
        ({"timeout": 0.0}, "positive"),
    ]:
        with pytest.raises(UserError, match=said):
            settings(server, **changes)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights and a vocabulary of a few words."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "image", "contains", "a", "cat", "dog", "sits", "here"]
    (folder / "vocab.txt").write_text("\n".join(words))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_bertscore_recall_is_its_definition(bert_folder: Path) -> None:
    scorer = BERTScore(str(bert_folder), layer=1)
    reference, text = "the image contains a cat", "a dog sits here"

    def states(words: str) -> Tensor:
        tokens = scorer.tokenizer(words, return_tensors="pt")
        hidden = scorer.model(**tokens, output_hidden_states=True).hidden_states[1][0]
        return hidden / hidden.norm(dim=1, keepdim=True)

    with torch.no_grad():
        similarity = states(reference) @ states(text).T
    expected = sum(row.max().item() for row in similarity[1:-1]) / 5  # [CLS] and [SEP] of the reference do not count
    assert scorer.recall([text], [reference])[0] == pytest.approx(expected, abs=1e-6)
    assert scorer.recall([reference], [reference])[0] == pytest.approx(1, abs=1e-6)


def test_descriptions_are_scored_against_the_prompt(server: Server, bert_folder: Path) -> None:
    server.behaviour = reply(text_answer("the image contains a cat"))
    config = RewardsConfig(vlm=settings(server, bert=str(bert_folder), bert_layer=2))
    scores = score(load_reward("vlm-bertscore", config), IMAGES[:2], ["a cat", "a dog"], NOTHING[:2])
    assert scores.values[0].item() == pytest.approx(1, abs=1e-6)
    assert scores.values[1] < 0.999
    assert server.requests[0]["messages"][0]["content"][1]["text"] == "Answer concisely: what is going on in this image?"
    for nonsense in (None, "", 7, ["a cat"]):
        server.behaviour = reply(text_answer(nonsense))
        scores = score(load_reward("vlm-bertscore", config), IMAGES[:1], ["a cat"], NOTHING[:1])
        assert not scores.valid.any() and "the reply holds no text" in (scores.error or "")


def test_a_text_model_that_fails_on_one_answer_fails_that_sample_alone(server: Server, bert_folder: Path) -> None:
    def long_about_the_second(handler: Handler, request: dict[str, Any]) -> None:
        sent = request["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
        white = max(Image.open(io.BytesIO(base64.b64decode(sent))).tobytes()) == 255
        answer = "a cat sits here " * 200 if white else "a cat"  # 800 tokens, of which the model takes 512
        send(handler, json.dumps(text_answer(answer)).encode())

    server.behaviour = long_about_the_second
    config = RewardsConfig(vlm=settings(server, bert=str(bert_folder), bert_layer=2, timeout=5.0))
    reward = load_reward("vlm-bertscore", config)
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8), torch.zeros(3, 8, 8)])
    scores = score(reward, images, ["a cat", "a dog", "a cat"], NOTHING)
    assert scores.valid.tolist() == [True, False, True]
    assert scores.error is not None and scores.error.endswith("(asked about 'a dog')") and "Error: " in scores.error
    assert reward.counts["failed"] == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("row", ['{"choices": [{"mess', "", "[1, 2]", "{}"])
def test_a_torn_row_of_the_cache_is_as_if_it_were_not_there(server: Server, tmp_path: Path, row: str) -> None:
    cache = tmp_path / "cache.sqlite"
    whole, _ = ask(server, cache=cache)
    with closing(sqlite3.connect(cache)) as database, database:
        database.execute("UPDATE answers SET answer = ? WHERE rowid = 2", (row,))
    scores, counts = ask(server, cache=cache)
    assert scores.valid.all() and torch.equal(scores.values, whole.values)
    assert counts == {"asked": 1, "cached": 2, "failed": 0}
    assert ask(server, cache=cache)[1]["cached"] == 3, "it is written again"


def test_a_text_model_without_weights_that_are_used_is_refused(bert_folder: Path, tmp_path: Path) -> None:
    """The pooler is not used, and checkpoints of masked language models lack it."""
    for name, missing, said in [
        ("masked", "pooler.", None),
        (
            "part",
            "encoder.layer.1.output.dense.",
            r"lack encoder\.layer\.1\.output\.dense\.bias; encoder.*weight,",
        ),
    ]:
        folder = tmp_path / name
        shutil.copytree(bert_folder, folder)
        weights = load_file(folder / "model.safetensors")
        kept = {key: value for key, value in weights.items() if not key.startswith(missing)}
        assert len(kept) == len(weights) - 2
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        if said:
            with pytest.raises(UserError, match=said):
                BERTScore(str(folder))
        else:
            same = [BERTScore(str(each), layer=2).recall(["a cat sits here"], ["a dog"]) for each in (folder, bert_folder)]
            assert same[0] == same[1]


def test_a_text_model_that_does_not_fit_is_an_error(bert_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 2 layers: layer 40 does not exist"):
        BERTScore(str(bert_folder), layer=40)
    with pytest.raises(UserError, match="could not be loaded"):
        BERTScore(str(tmp_path))
    with pytest.raises(UserError, match="give the revision"):
        BERTScore("some/model")
