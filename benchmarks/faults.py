"""The whole campaign of faults: kills, flipped bits, non-finite numbers, a soak. Hours; may be stopped and taken up again.

    python benchmarks/faults.py                       # or: make test-faults
    python benchmarks/faults.py --kills 50 --flips 20 --nans 10 --soak-steps 500

The runs are tiny (32 x 32 pixels, 3 denoising steps), real processes of the command line, killed from outside. Writes the table
of docs/reliability.md and ``benchmarks/faults.json``. The faults are those of ``tests/test_faults.py``.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import tyro

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from faults import finish, flip_bit, kill, spoil_at, start, tiny_run, what_it_made  # noqa: E402, F401
from shared_fixtures import build_tiny_pipeline  # noqa: E402

from diffusionrl.runs import checkpoint  # noqa: E402

PAGE = HERE.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: benchmarks/faults.py writes these lines -->", "<!-- end of figures -->"

PATIENCE = 1800  # seconds for a run of seconds: it may stand back behind other work
WITH_COPIES = "--algorithm.name nft --optimizer.average 0.5"

JOINT = """
tasks:
  - {name: plain, reward: [compressibility], prompts: ddpo-animals, prompts_per_step: 2, samples_per_prompt: 2}
"""


@dataclass(frozen=True)
class Config:
    """Run the campaign."""

    kills: int = 500
    flips: int = 200
    nans: int = 100
    soak_steps: int = 10_000
    folder: Path = HERE.parent / "runs" / "benchmarks" / "faults"


class Campaign:
    """Counts what was done, in a file, so that it can go on where it was stopped."""

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, config.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "state.json"
        self.state: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.model = self.folder / "pipeline"
        if not self.model.is_dir():
            build_tiny_pipeline(self.folder / "parts").save_pretrained(self.model)
        (self.folder / "joint.yaml").write_text(JOINT)
        self.kinds: dict[str, Callable[[Path], list[str]]] = {
            "two tasks": lambda run_dir: tiny_run(self.model, run_dir, "--config", str(self.folder / "joint.yaml")),
            "DiffusionNFT with an average": lambda run_dir: tiny_run(self.model, run_dir, algorithm=WITH_COPIES),
            "DDPO": lambda run_dir: tiny_run(self.model, run_dir),
        }
        self.undisturbed: dict[str, dict[str, Any]] = {}
        for kind in self.kinds:  # the last one's time counts: whatever is slow the first time is slow before
            began = time.monotonic()
            self.undisturbed[kind] = self._undisturbed(kind)
            self.seconds = time.monotonic() - began

    def _undisturbed(self, kind: str) -> dict[str, Any]:
        """What a run makes that nothing happens to."""
        run_dir = self.folder / f"undisturbed_{kind.replace(' ', '_')}"
        shutil.rmtree(run_dir, ignore_errors=True)
        if finish(self.kinds[kind](run_dir), self.folder / "log", limit=PATIENCE) != 0:
            raise SystemExit((self.folder / "log").read_text())
        return what_it_made(run_dir)

    def count(self, **changes: int) -> None:
        for name, change in changes.items():
            self.state[name] = self.state.get(name, 0) + change
        self.file.write_text(json.dumps(self.state, indent=1) + "\n")

    def kills(self) -> None:
        """SIGKILL at random moments of runs that are taken up again, each run to its end; the kinds of runs take turns."""
        rng = random.Random(self.state.get("kills", 0))
        run_dir = self.folder / "killed"
        shutil.rmtree(run_dir, ignore_errors=True)
        while self.state.get("kills", 0) < self.config.kills:
            before = checkpoint.complete_steps(run_dir)
            kind = list(self.kinds)[self.state.get("killed_runs", 0) % len(self.kinds)]
            process = start(self.kinds[kind](run_dir), self.folder / "log")
            process.join(rng.uniform(0, self.seconds))
            if process.exitcode is None:
                kill(process)
                after = checkpoint.complete_steps(run_dir)
                lost = bool(before) and (not after or after[-1] < before[-1])
                torn = sum(not _whole(checkpoint.folder_of(run_dir, step)) for step in after)
                self.count(kills=1, checkpoints_lost=int(lost), torn_checkpoints=torn)
            else:
                good = process.exitcode == 0 and what_it_made(run_dir) == self.undisturbed[kind]
                self.count(killed_runs=1, killed_runs_identical=int(good), **{f"killed_runs of {kind}": 1})
                if not good:
                    shutil.copytree(run_dir, self.folder / f"failed_{self.state['killed_runs']}")
                shutil.rmtree(run_dir)

    def flips(self) -> None:
        """One bit of one file of the newest checkpoint."""
        rng = random.Random(1)
        source, copy = self.folder / "undisturbed_DDPO", self.folder / "flipped"
        for number in range(self.config.flips):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source, copy)
            newest = checkpoint.complete_steps(copy)[-1]
            flip_bit(checkpoint.folder_of(copy, newest), rng)
            if number >= self.state.get("flips", 0):
                found = not _whole(checkpoint.folder_of(copy, newest))
                older = checkpoint.load_newest(copy, exact=False)
                self.count(flips=1, flips_found=int(found), fallbacks=int(older is not None and older.step < newest))

    def nans(self) -> None:
        """NaN or infinity in the loss or in the gradient of a random micro-batch."""
        rng = random.Random(self.state.get("nans", 0))
        run_dir = self.folder / "spoiled"
        while self.state.get("nans", 0) < self.config.nans:
            shutil.rmtree(run_dir, ignore_errors=True)
            where, value, nth = rng.choice(["loss", "gradient"]), rng.choice(["nan", "inf"]), rng.randint(1, 12)
            code = finish(tiny_run(self.model, run_dir), self.folder / "log", f"spoil_at:{where}:{value}:{nth}", PATIENCE)
            steps = checkpoint.complete_steps(run_dir)
            saved = checkpoint.load(checkpoint.folder_of(run_dir, steps[-1])) if steps else None
            clean = saved is not None and all(
                tensor.isfinite().all() for file in saved.tensors.values() for tensor in file.values()
            )
            went_on = finish(tiny_run(self.model, run_dir), self.folder / "log", limit=PATIENCE) == 0
            identical = went_on and what_it_made(run_dir) == self.undisturbed["DDPO"]
            self.count(nans=1, nans_stopped=int(code == 1), nans_clean=int(clean), nans_resumed_identical=int(identical))

    def soak(self) -> None:
        """One process, many steps: memory and open files must not grow."""
        if self.state.get("soak_steps", 0) >= self.config.soak_steps:
            return
        run_dir = self.folder / "soak"
        shutil.rmtree(run_dir, ignore_errors=True)
        options = ["--steps", str(self.config.soak_steps), "--checkpoint.every", "100", "--evaluation.every", "500"]
        process = start(tiny_run(self.model, run_dir, *options), self.folder / "soak_log")
        samples = []
        while process.exitcode is None:
            process.join(5)
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
                resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
                samples.append((resident, len(list(Path(f"/proc/{process.pid}/fd").iterdir()))))
            except (OSError, IndexError):
                break
        process.join()
        warm = samples[max(1, len(samples) // 10) : -1] or samples
        self.state |= {
            "soak_steps": self.config.soak_steps,
            "soak_exit_code": process.exitcode,
            "soak_mb_after_warm_up": round(warm[0][0]),
            "soak_mb_at_the_end": round(warm[-1][0]),
            "soak_open_files": [warm[0][1], warm[-1][1]],
            "soak_checkpoints": len(checkpoint.complete_steps(run_dir)),
            "soak_commit": _output("git", "rev-parse", "--short", "HEAD"),
        }
        self.count()

    def write(self) -> None:
        """The table, between its two marks in the page."""
        state = self.state
        commit = state.setdefault("commit", _output("git", "rev-parse", "--short", "HEAD"))  # where the campaign began
        kinds = ", ".join(f"{state.get(f'killed_runs of {kind}', 0)} of {kind}" for kind in self.kinds)
        rows = [
            ("a run killed at any moment ends bit-identical", "SIGKILL from outside at random moments, the same command again",
             f"{state['kills']} kills in {state.get('killed_runs', 0)} runs ({kinds}): "
             f"{state.get('killed_runs_identical', 0)} identical, "
             f"{state['checkpoints_lost']} checkpoints lost, {state['torn_checkpoints']} torn"),
            ("a flipped bit is found before weights are used", "a random bit of a random file of the newest checkpoint",
             f"{state['flips_found']} of {state['flips']} found, {state['fallbacks']} fell back to the one before"),
            ("nothing non-finite reaches weights or a checkpoint", "NaN or infinity in a loss or a gradient",
             f"{state['nans_stopped']} of {state['nans']} stopped, {state['nans_clean']} clean, "
             f"{state['nans_resumed_identical']} resumed bit-identical"),
            ("memory and open files over a long run",
             f"{state['soak_steps']} steps in one process (exit code {state['soak_exit_code']}), "
             f"after commit {state.get('soak_commit', commit)}",
             f"{state['soak_mb_after_warm_up']} MB after the first tenth, {state['soak_mb_at_the_end']} MB at the end; "
             f"{state['soak_open_files'][0]} and {state['soak_open_files'][1]} open files; "
             f"{state['soak_checkpoints']} checkpoints kept"),
        ]  # fmt: skip
        lines = ["| promise | test | figure |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
        lines += ["", f"{date.today()}, after commit {commit}."]
        page = PAGE.read_text()
        first, rest = page.split(BEGIN)
        PAGE.write_text(first + BEGIN + "\n\n" + "\n".join(lines) + "\n\n" + END + rest.split(END)[1])
        figures = state | {"config": asdict(self.config) | {"folder": None}}
        (HERE / "faults.json").write_text(json.dumps(figures, indent=2) + "\n")
        print("\n".join(lines))


def _whole(folder: Path) -> bool:
    try:
        checkpoint.verify(folder)
    except checkpoint.Corrupted:
        return False
    return True


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=HERE).stdout.strip()


def main(config: Config) -> None:
    campaign = Campaign(config)
    for part in (campaign.flips, campaign.nans, campaign.kills, campaign.soak):
        began = time.monotonic()
        part()
        print(f"{part.__name__}: {time.monotonic() - began:.0f} s", flush=True)
    campaign.write()


if __name__ == "__main__":
    main(tyro.cli(Config))
