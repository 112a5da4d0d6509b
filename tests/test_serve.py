"""``serve-reward`` and the reward that asks it, over real HTTP on loopback."""

import base64
import http.client
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import finish, tiny_run, what_it_made
from torch import Tensor

from diffusionrl.config.rewards import RemoteConfig, RewardsConfig, ServeConfig
from diffusionrl.data.images import to_png
from diffusionrl.errors import UserError
from diffusionrl.rewards import Scores, load_reward, score
from diffusionrl.rewards.http import MAX_REPLY_BYTES, BadAnswer, JSONClient
from diffusionrl.serving import server as server_module
from diffusionrl.serving.server import RewardServer

IMAGES = (torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255).round() / 255  # as a PNG holds them
PROMPTS, NOTHING = ["a", "b", "c", "d", "e"], [{"i": i} for i in range(5)]
QUICK = RemoteConfig(batch_size=2, timeout=5.0, retries=0, backoff=0.01)


def brightness(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.fixture
def serving() -> Iterator[Callable[..., RewardServer]]:
    servers: list[tuple[RewardServer, threading.Thread]] = []

    def serve(reward: Any, **settings: Any) -> RewardServer:
        server = RewardServer(reward, replace(ServeConfig("tested", port=0, timeout=5.0), **settings))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        return server

    yield serve
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(server: RewardServer, settings: RemoteConfig = QUICK) -> Scores:
    return score(load_reward(server.url, RewardsConfig(remote=settings)), IMAGES, PROMPTS, NOTHING)


def post(server: RewardServer, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    sent = {"Content-Type": "application/json"} | {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request("POST", "/score", body, sent)
    response = connection.getresponse()
    status, answer = response.status, json.loads(response.read())
    connection.close()
    return status, answer


def body(**changes: Any) -> bytes:
    images = [base64.b64encode(to_png(image)).decode() for image in IMAGES[:2]]
    return json.dumps({"images": images, "prompts": PROMPTS[:2], "metadata": NOTHING[:2]} | changes).encode()


def test_the_same_scores_as_in_the_process(serving: Callable[..., RewardServer]) -> None:
    seen: list[Any] = []

    def looking(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        seen.extend(zip(prompts, metadata, strict=True))
        return brightness(images, prompts, metadata)

    scores = ask(serving(looking))
    assert torch.equal(scores.values.float(), brightness(IMAGES, None, None)) and scores.valid.all()
    assert sorted(seen, key=str) == sorted(zip(PROMPTS, NOTHING, strict=True), key=str)


def test_requests_that_wait_are_scored_together(serving: Callable[..., RewardServer]) -> None:
    sizes: list[int] = []

    def slow(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        sizes.append(len(images))
        time.sleep(0.2)
        return brightness(images, prompts, metadata)

    scores = ask(serving(slow, wait=0.1, batch_size=4), replace(QUICK, batch_size=1, concurrency=5))
    assert torch.equal(scores.values.float(), brightness(IMAGES, None, None))
    assert sum(sizes) == 5 and len(sizes) < 5 and max(sizes) <= 4


def test_an_invalid_score_stays_its_own(serving: Callable[..., RewardServer]) -> None:
    def picky(images: Tensor, prompts: Any, metadata: Any) -> list[float | None]:
        return [None if prompt == "b" else 1.0 for prompt in prompts]

    scores = ask(serving(picky))
    assert scores.valid.tolist() == [True, False, True, True, True]
    assert "it returned nan for 'b'" in (scores.error or "")


def test_a_prompt_that_fails_fails_its_own_request_alone(serving: Callable[..., RewardServer]) -> None:
    def picky(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        if "b" in prompts:
            raise ValueError("bad prompt")
        return brightness(images, prompts, metadata)

    scores = ask(serving(picky, wait=0.2), replace(QUICK, batch_size=1, concurrency=5))
    assert scores.valid.tolist() == [True, False, True, True, True]
    assert scores.error == "ValueError: bad prompt"


def test_a_reward_that_ends_its_thread_does_not_end_the_servers(serving: Callable[..., RewardServer]) -> None:
    def leaving(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        raise SystemExit("enough")

    server = serving(leaving)
    for _ in range(2):
        scores = ask(server)
        assert not scores.valid.any() and scores.error == "SystemExit: enough"


def test_a_long_request_is_cut(serving: Callable[..., RewardServer]) -> None:
    sizes: list[int] = []

    def counting(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        sizes.append(len(images))
        return brightness(images, prompts, metadata)

    scores = ask(serving(counting, batch_size=2), replace(QUICK, batch_size=5))
    assert torch.equal(scores.values.float(), brightness(IMAGES, None, None)) and sizes == [2, 2, 1]


def test_a_reward_that_raises_says_so_at_the_other_end(serving: Callable[..., RewardServer]) -> None:
    def broken(images: Tensor, prompts: Any, metadata: Any) -> Any:
        raise RuntimeError("no weights")

    scores = ask(serving(broken))
    assert not scores.valid.any() and scores.error == "RuntimeError: no weights"


def test_a_reward_that_hangs_frees_the_client(serving: Callable[..., RewardServer]) -> None:
    def hangs(images: Tensor, prompts: Any, metadata: Any) -> Any:
        time.sleep(2)

    began = time.monotonic()
    scores = ask(serving(hangs, timeout=0.2))
    assert not scores.valid.any() and "no scores within 0.2 s" in (scores.error or "")
    assert time.monotonic() - began < 2


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scores = score(load_reward(f"http://127.0.0.1:{port}", RewardsConfig(remote=QUICK)), IMAGES, PROMPTS, NOTHING)
    assert not scores.valid.any() and "NewConnectionError" in (scores.error or "")


def test_an_open_address_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="set DIFFUSIONRL_REWARD_TOKEN"):
        RewardServer(brightness, ServeConfig("tested", host="0.0.0.0", port=0))


def test_a_token_is_asked_for_and_sent(serving: Callable[..., RewardServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSIONRL_REWARD_TOKEN", "sesame")
    server = serving(brightness)
    assert ask(server).valid.all()
    monkeypatch.setenv("DIFFUSIONRL_REWARD_TOKEN", "open")
    scores = ask(server)
    assert not scores.valid.any() and "401" in (scores.error or "") and "token" in (scores.error or "")


PNG = base64.b64encode(to_png(IMAGES[0])).decode()


@pytest.mark.parametrize(
    ("sent", "headers", "status", "said"),
    [
        (b"not JSON", {}, 400, "the body must be"),
        (b"[" * 100_000, {}, 400, "the body must be"),
        (body(prompts=["a"]), {}, 400, "2 images and 1 prompts"),
        (body(prompts=["a", 1]), {}, 400, "prompts must be a list of JSON strings"),
        (body(images=[PNG, "%%%"]), {}, 400, "image 1 does not decode"),
        (body(images=[PNG, base64.b64encode(b"GIF89a...").decode()]), {}, 400, "image 1 does not decode"),
        (body(images=[PNG, PNG[:60]]), {}, 400, "image 1 does not decode"),
        (body(images=[PNG, base64.b64encode(to_png(torch.zeros(3, 4, 4))).decode()]), {}, 400, "one size"),
        (body(), {"Content_Type": "text/plain"}, 415, "application/json"),
        (body(prompts=["a" * 200_000, "b"]), {}, 413, "longer than 100000"),
    ],
)
def test_bad_requests_are_refused(
    serving: Callable[..., RewardServer], sent: bytes, headers: dict[str, str], status: int, said: str
) -> None:
    server = serving(brightness, max_bytes=100_000)
    found, answer = post(server, sent, **headers)
    assert (found, said in answer["error"]) == (status, True), answer
    assert post(server, body())[0] == 200, "the server goes on"


def test_large_images_in_small_files_are_refused(serving: Callable[..., RewardServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_PIXELS", 100)
    status, answer = post(serving(brightness), body())
    assert status == 413 and "the request has 128 pixels, more than 100" in answer["error"]


def test_requests_share_one_budget_of_pixels(serving: Callable[..., RewardServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: the second one does not fit beside the first, and does after it."""
    monkeypatch.setattr(server_module, "MAX_PIXELS", 200)
    asked, go_on = threading.Event(), threading.Event()

    def slow(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        asked.set()
        assert go_on.wait(5)
        return brightness(images, prompts, metadata)

    server = serving(slow)
    first = threading.Thread(target=post, args=(server, body()))
    first.start()
    assert asked.wait(5)
    status, answer = post(server, body())
    assert status == 503 and "too many pixels at the moment" in answer["error"]
    go_on.set()
    first.join()
    assert post(server, body())[0] == 200


def test_too_many_images_and_absurd_lengths_are_refused(serving: Callable[..., RewardServer]) -> None:
    server = serving(brightness)
    many = body(images=[PNG] * 1025, prompts=["a"] * 1025, metadata=[{}] * 1025)
    assert post(server, many)[0] == 413
    with socket.create_connection(("127.0.0.1", server.server_port), 5) as connection:
        head = "POST /score HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
        connection.sendall(f"{head}{'9' * 5000}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(1000)


def test_strangers_take_no_place(serving: Callable[..., RewardServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """The token and the name that is asked for are looked at first: whoever has neither is told so although all is taken."""
    monkeypatch.setenv("DIFFUSIONRL_REWARD_TOKEN", "secret")
    server = serving(brightness, max_requests=1)
    assert server.places.acquire(blocking=False)
    knows = {"Authorization": "Bearer secret"}
    assert post(server, body())[0] == 401
    assert post(server, body(), Host="evil.example", **knows)[0] == 421
    assert post(server, body(), **knows)[0] == 503
    server.places.release()
    assert post(server, body(), Host="localhost:99", **knows)[0] == 200


def test_health_needs_the_token_too(serving: Callable[..., RewardServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSIONRL_REWARD_TOKEN", "secret")
    server = serving(brightness)
    for headers, status in (({}, 401), ({"Authorization": "Bearer secret"}, 200)):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
        connection.request("GET", "/health", headers=headers)
        assert connection.getresponse().status == status
        connection.close()


def test_nothing_is_scored_for_those_who_have_gone(serving: Callable[..., RewardServer]) -> None:
    calls: list[int] = []

    def slow(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        calls.append(len(images))
        time.sleep(0.2)
        return brightness(images, prompts, metadata)

    server = serving(slow, batch_size=1, timeout=0.3)
    many = body(images=[PNG] * 50, prompts=["a"] * 50, metadata=[{}] * 50)
    assert post(server, many)[0] == 503
    time.sleep(0.3)
    seen = len(calls)
    assert seen < 6
    assert post(server, body(images=[PNG], prompts=["a"], metadata=[{}]))[0] == 200, "the next one has its turn at once"
    assert len(calls) == seen + 1


def test_idle_connections_are_bounded_and_given_back(serving: Callable[..., RewardServer]) -> None:
    server = serving(brightness, max_requests=2)
    idle = [socket.create_connection(("127.0.0.1", server.server_port), 5) for _ in range(8)]
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", server.server_port), 5) as one_more:
        assert one_more.recv(10) == b""
    for each in idle:
        each.close()
    time.sleep(0.2)
    assert post(server, body())[0] == 200


def test_a_reply_is_one_packet_and_shows_nothing_of_our_own(serving: Callable[..., RewardServer]) -> None:
    server = serving(brightness)
    sent = body(images=[PNG, "AAAA"])
    with socket.create_connection(("127.0.0.1", server.server_port), 5) as connection:
        head = f"POST /score HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + sent)
        reply = connection.recv(65536)
    assert b" 400 " in reply and reply.endswith(b'{"error": "image 1 does not decode as PNG"}')


def test_a_secret_is_sent_without_its_newline_and_never_shown(
    serving: Callable[..., RewardServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFUSIONRL_REWARD_TOKEN", "s3cret")
    server = serving(brightness)
    monkeypatch.setenv("DIFFUSIONRL_REWARD_TOKEN", "s3cret\n")
    assert ask(server).valid.all()
    monkeypatch.setenv("DIFFUSIONRL_REWARD_TOKEN", "s3\ncret")
    with pytest.raises(UserError, match="DIFFUSIONRL_REWARD_TOKEN holds what is no token") as raised:
        ask(server)
    assert "cret" not in str(raised.value)


@pytest.mark.parametrize(
    "drips", [b"H", b"HTTP/1.1 200 OK\r\nX-A: b", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0"]
)
def test_a_server_that_drips_is_given_up_on_time(drips: bytes) -> None:
    """Status, headers, or the size of a chunk: one deadline for the whole exchange."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        over = threading.Event()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.sendall(drips)
                while not over.wait(0.05):
                    connection.sendall(b"0")

        thread = threading.Thread(target=serve)
        thread.start()
        began = time.monotonic()
        client = JSONClient(f"http://127.0.0.1:{listening.getsockname()[1]}", 1, 0.5, 0, 0.01, "NO_TOKEN", "an answer")
        with pytest.raises(BadAnswer, match="no answer within"):
            client.post(b"{}", "1")
        assert time.monotonic() - began < 2
        over.set()
        thread.join()


def test_a_client_that_drips_is_hung_up_on(serving: Callable[..., RewardServer]) -> None:
    server = serving(brightness, timeout=0.3)
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.server_port)) as slow, suppress(OSError):
        for _ in range(50):
            slow.sendall(b"a")
            time.sleep(0.1)
    assert time.monotonic() - began < 3


def test_replies_that_are_dropped_give_their_connections_back() -> None:
    """More of them than there are connections: a reward that was flooded once is not lost for good."""

    class Flood(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(b" " * 2 * MAX_REPLY_BYTES)

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flood) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        client = JSONClient(f"http://127.0.0.1:{server.server_port}", 1, 5.0, 1, 0.01, "NO_KEY", "scores")
        for _ in range(2):
            with pytest.raises(BadAnswer, match="longer than 1000000 bytes"):
                client.post(b"{}", "id")
        server.shutdown()


def test_a_client_that_stops_sending_frees_its_thread(serving: Callable[..., RewardServer]) -> None:
    server = serving(brightness, timeout=0.3, max_requests=1)
    with socket.create_connection(("127.0.0.1", server.server_port)) as silent:
        silent.sendall(b"POST /score HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
        time.sleep(0.1)
        assert post(server, body())[0] == 503, "busy"
        assert b" 408 " in silent.recv(1000)
        time.sleep(0.3)
    assert post(server, body())[0] == 200


NOT_NEEDED = ("accelerate", "diffusers", "huggingface_hub", "jinja2", "matplotlib", "peft", "psutil", "transformers")


def test_an_own_function_is_served_without_transformers(tmp_path: Path) -> None:
    """As in an environment of its own, where docs/serve_reward.md installs nothing of these."""
    (tmp_path / "my_scorer.py").write_text("def score(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    without = f"import sys; sys.modules.update(dict.fromkeys({NOT_NEEDED})); from diffusionrl.cli import entry; entry()"
    command = [sys.executable, "-c", without, "serve-reward", "my_scorer:score", "--port", "0"]
    alone = {"cwd": tmp_path, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **alone) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            assert said.startswith("serving my_scorer:score on http://"), said + server.stdout.read()
            scores = score(load_reward(said.split()[-1], RewardsConfig(remote=QUICK)), IMAGES, PROMPTS, NOTHING)
        finally:
            server.terminate()
    assert torch.equal(scores.values.float(), brightness(IMAGES, None, None)) and scores.valid.all()


def test_a_run_with_a_served_reward_is_that_with_the_reward_itself(tiny_folder: Path, tmp_path: Path) -> None:
    """Through the command line: JPEG sees 8-bit pixels in any case, so the runs agree to the bit."""
    command = [sys.executable, "-m", "diffusionrl", "serve-reward", "incompressibility", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            log = tmp_path / "log"
            assert finish(tiny_run(tiny_folder, tmp_path / "served", "--reward", url), log) == 0, log.read_text()
            assert finish(tiny_run(tiny_folder, tmp_path / "here"), log) == 0, log.read_text()
        finally:
            server.terminate()
    served, here = what_it_made(tmp_path / "served"), what_it_made(tmp_path / "here")
    asked = [line.pop(f"reward/{url}/asked", None) for line in served["metrics"]]
    assert asked[-1] >= 6
    failed = [line.pop(f"reward/{url}/failed", 0) for line in served["metrics"]]
    assert failed == [0] * len(failed)
    assert served["metrics"] == here["metrics"]
    weights = [name for name in here["files"] if name.endswith("weights.safetensors") or name == "policy.safetensors"]
    assert {name: served["files"][name] for name in weights} == {name: here["files"][name] for name in weights}
