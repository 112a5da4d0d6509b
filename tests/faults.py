"""What the tests of faults share: the command line in processes that can be killed from outside, and what a run left behind.

Processes are forked from a server that has imported the package already: an import takes longer than a tiny run.
"""

import errno
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import random
import signal
import socket
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

# Python 3.11's server does not take over sys.path, and leaves out what it does not find.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("diffusionrl.cli", "diffusionrl.api", "diffusionrl.report.picture", "faults"),
        *("diffusers.guiders", "diffusers.schedulers.scheduling_dpmsolver_sde", "preloaded"),  # as loading a pipeline does
    ]
)


def _command(arguments: list[str], log: str, prepare: str | None) -> None:
    """Run the command line with its output in a file; ``prepare`` names a function of this module that plants a fault first.

    The last picture is left out: it is drawn after the run, and takes longer than a step.
    """
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from diffusionrl.cli import entry
    from diffusionrl.report import picture

    torch.set_num_threads(1)
    picture.draw_before_after = lambda run_dir: run_dir
    if prepare is not None:
        name, *options = prepare.split(":")
        globals()[name](*options)
    sys.argv[1:] = arguments
    entry()


def start(arguments: list[str], log: Path, prepare: str | None = None) -> ForkServerProcess:
    """``diffusionrl ARGUMENTS`` as a process of its own."""
    process = _CONTEXT.Process(target=_command, args=(arguments, str(log), prepare))
    process.start()
    return process


def finish(arguments: list[str], log: Path, prepare: str | None = None, limit: float = 60) -> int | None:
    """Run it to its end, within so many seconds; returns the exit code."""
    process = start(arguments, log, prepare)
    process.join(limit)
    assert process.exitcode is not None, f"still running: {log.read_text()[-2000:]}"
    return process.exitcode


def finish_elsewhere(log: Path) -> int | None:
    """Import every module of the package, and run a small part of it, as where Unix's own modules and functions are missing."""
    process = _CONTEXT.Process(target=_import_elsewhere, args=(str(log),))
    process.start()
    process.join(60)
    return process.exitcode


def _import_elsewhere(log: str) -> None:
    with open(log, "w") as sys.stderr:
        for name in [each for each in sys.modules if each.partition(".")[0] == "diffusionrl"]:
            del sys.modules[name]
        for name in ("resource", "fcntl", "termios", "pwd", "grp"):
            sys.modules[name] = None  # type: ignore[assignment]
        for owner, names in (
            (os, ("pread", "register_at_fork", "O_NOFOLLOW", "O_DIRECTORY", "getuid", "fchmod", "sched_getaffinity")),
            (signal, ("SIGHUP", "SIGUSR1", "SIGALRM", "SIGKILL", "setitimer", "getitimer", "ITIMER_REAL", "alarm")),
        ):
            for name in names:
                delattr(owner, name)
        import diffusionrl

        for module in pkgutil.walk_packages(diffusionrl.__path__, "diffusionrl."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        import torch

        from diffusionrl import devices
        from diffusionrl.data.prompts import load_prompts
        from diffusionrl.rewards import as_mixture, try_mixture

        prompts = Path(log).with_suffix(".txt")
        prompts.write_text("a cat\r\nan owl\n")
        assert [prompt.text for prompt in load_prompts(str(prompts))] == ["a cat", "an owl"]
        assert devices.peak_bytes(torch.device("cpu")) == 0
        assert not try_mixture(as_mixture(lambda images, *_: [0.5] * len(images)), (3, 8, 8), ["a", "b"], [{}, {}])


def finish_together(arguments: list[str], folder: Path, count: int) -> str:
    """Run it in a folder on several processes to their end; returns what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"log_{rank}" for rank in range(count)]
    prepared = [f"be_process:{rank}:{count}:{port}:{folder}" for rank in range(count)]
    group = [start(arguments, log, prepare) for log, prepare in zip(logs, prepared, strict=True)]
    for process in group:
        process.join(100)
    still = [process for process in group if process.exitcode is None]
    for process in still:
        kill(process)
    said = "".join(log.read_text() for log in logs)
    for log in logs:
        log.unlink()
    assert [process.exitcode for process in group] == [0] * count, f"{len(still)} hung; {said}"
    return said


def kill(process: ForkServerProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def tiny_run(model: Path, run_dir: Path, *more: str, algorithm: str = "--algorithm.min-count 2") -> list[str]:
    """A run of seconds: a checkpoint every other step, evaluations, and every kind of state that DDPO has."""
    options = f"""train --model {model} --run-dir {run_dir} --prompts ddpo-animals --reward incompressibility --steps 6
        --prompts-per-step 2 --samples-per-prompt 2 --sampling.num-steps 2 --sampling.batch-size 4
        {algorithm} --algorithm.updates-per-step 2 --evaluation.every 3 --evaluation.num-samples 2
        --checkpoint.every 2 --rewards.normalise"""
    return [*options.split(), *more]


def what_it_made(run_dir: Path) -> dict[str, Any]:
    """Weights, metrics apart from times, and samples: what must be the same to the bit however often a run was interrupted."""
    files = [*sorted((run_dir / "export").rglob("*")), *sorted((run_dir / "samples").rglob("*"))]
    hashes = {str(f.relative_to(run_dir)): _hash(f) for f in files if f.is_file()}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    newest = max((run_dir / "checkpoints").glob("step_*"))
    for name in ("policy.safetensors", "optimizer.safetensors", "state.json"):
        hashes[name] = hashlib.sha256((newest / name).read_bytes()).hexdigest()
    metrics = [{key: value for key, value in line.items() if not is_of_the_clock(key)} for line in lines]
    return {"files": hashes, "metrics": metrics}


def is_of_the_clock(metric: str) -> bool:
    """Of the run, or of one of its tasks."""
    return "time" in metric.split("/")[:-1] or metric == "peak_memory_gb"


def _hash(file: Path) -> str:
    """Of the content; in a safetensors file with metadata, whose entries come in any order, of the tensors."""
    if file.suffix != ".safetensors":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    tensors = sorted(load_file(file).items())
    return hashlib.sha256(b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in tensors)).hexdigest()


def die_at(place: str, nth: str = "1") -> None:
    """Kill the process at the nth call of one of the operations that a checkpoint is saved with."""
    from diffusionrl.runs import checkpoint

    left = [int(nth)]
    owner, name = {
        "write": (checkpoint, "save_file"),
        "describe": (checkpoint, "_describe"),
        "manifest": (checkpoint, "_manifest"),
        "flush": (checkpoint, "flush"),
        "rename": (Path, "rename"),
        "prune": (checkpoint, "prune"),
        "remove": (checkpoint.shutil, "rmtree"),
    }[place]
    original = getattr(owner, name)

    def dying(*arguments: Any, **keywords: Any) -> Any:
        saving = any("checkpoints" in str(argument) for argument in arguments) or place in ("manifest", "prune")
        if saving:
            left[0] -= 1
            if left[0] == 0:
                if place == "write":  # in the middle of a file
                    Path(arguments[1]).write_bytes(b"\0" * 100)
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    setattr(owner, name, dying)


def fill_disk_at(nth: str, kind: str = "ENOSPC") -> None:
    """No space is left (or the disk is read-only, EROFS) from the nth write of a checkpoint, its metrics or its samples on."""
    left = [int(nth)]

    def full(original: Any) -> Any:
        def writing(*arguments: Any, **keywords: Any) -> Any:
            to_memory = any(isinstance(argument, io.BytesIO) for argument in arguments)
            left[0] -= not to_memory
            if left[0] <= 0 and not to_memory:
                number = getattr(errno, kind)
                raise OSError(number, os.strerror(number))
            return original(*arguments, **keywords)

        return writing

    from PIL import Image

    from diffusionrl.runs import checkpoint
    from diffusionrl.runs import folder as tracking

    checkpoint.save_file = full(checkpoint.save_file)
    checkpoint._manifest = full(checkpoint._manifest)
    checkpoint.flush = tracking.checkpoint.flush = full(checkpoint.flush)
    os.fsync = full(os.fsync)
    Image.Image.save = full(Image.Image.save)  # type: ignore[method-assign]


def find_modules(folder: str) -> None:
    """Of a reward, in a folder."""
    sys.path.insert(0, folder)


def lose_terminal() -> None:
    """What reads the output is gone."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)


def cut_network() -> None:
    """Whoever tries to reach a host ends the process with 99."""

    def reached(*arguments: Any, **keywords: Any) -> Any:
        print(f"tried to reach {arguments[1:]}", flush=True)
        os._exit(99)

    socket.socket.connect = reached  # type: ignore[method-assign]
    socket.getaddrinfo = reached


def use_cache(folder: str) -> None:
    """A hub cache in a folder, and no network."""
    from huggingface_hub import constants

    constants.HF_HUB_CACHE = folder
    os.environ["HF_HUB_CACHE"] = folder
    cut_network()


def spoil_at(where: str, value: str, nth: str) -> None:
    """NaN or infinity in the loss or in the gradient of the nth micro-batch."""
    from diffusionrl.algorithms import DDPO

    original, calls, factor = DDPO.losses, [0], float(value)

    def spoiled(self: Any, *arguments: Any) -> Any:
        losses, figures = original(self, *arguments)
        calls[0] += 1
        if calls[0] != int(nth):
            return losses, figures
        if where == "loss":
            return losses * factor, figures
        losses.register_hook(lambda gradient: gradient * factor)
        return losses, figures

    DDPO.losses = spoiled  # type: ignore[method-assign]


def be_process(rank: str, count: str, port: str, folder: str) -> None:
    """One of several in a folder, as torchrun would start it."""
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.chdir(folder)
    sys.path.insert(0, folder)


def flip_bit(folder: Path, rng: random.Random) -> None:
    """One bit of one file."""
    file = rng.choice(sorted(folder.iterdir()))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
