"""What millions of prompts cost: the start of a run and its memory, in a process of its own for each format.

The first start with a parquet file is told apart: the library ``datasets`` copies it to its cache, which it maps into memory.

    python benchmarks/prompts.py

Writes ``benchmarks/prompts.json`` and prints the table of docs/runs.md. Memory is the growth of the process's own pages; pages
of mapped files, which the kernel takes back when it needs them, are counted apart.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import tyro

HERE = Path(__file__).parent
WORDS = ("cat", "dog", "owl", "red", "blue", "old", "small", "castle", "forest", "river", "under", "near", "painting", "photo")
CHILD = """
import json, sys, time
import psutil
from diffusionrl.data.prompts import load_prompts

def memory():  # in MB: own pages, and those of files
    info = psutil.Process().memory_info()
    return (info.rss - info.shared) / 1e6, info.shared / 1e6

before, began = memory(), time.perf_counter()
load_prompts(sys.argv[1], 0, 1000)  # as the command line does before it imports torch
prompts = load_prompts(sys.argv[1])
seconds, loaded = time.perf_counter() - began, memory()
drawn = [len(prompts[i * 48_611 % len(prompts)].text) for i in range(200_000)]
after = memory()
print(json.dumps({
    "seconds": seconds, "megabytes": loaded[0] - before[0], "growth": after[0] - loaded[0], "mapped": after[1] - before[1]
}))
"""


@dataclass(frozen=True)
class Config:
    """Measure prompt files."""

    lines: int = 5_000_000
    rounds: int = 3


def texts(lines: int) -> Iterator[str]:
    """Of 40 to 90 characters."""
    random_ = random.Random(0)
    sentences = [" ".join(random_.choices(WORDS, k=random_.randint(8, 16))) for _ in range(10_000)]
    return (f"{sentences[index % len(sentences)]} {index}" for index in range(lines))


def write(file: Path, lines: int) -> None:
    """A prompt a line or a row."""
    if file.suffix == ".parquet":
        table = pyarrow.table({"prompt": pyarrow.array(texts(lines)), "id": range(lines)})
        pyarrow.parquet.write_table(table, file)
        return
    with file.open("w") as out:
        for index, text in enumerate(texts(lines)):
            out.write(json.dumps({"prompt": text, "id": index}) + "\n" if file.suffix == ".jsonl" else f"{text}\n")


def start(file: Path) -> dict[str, float]:
    """Seconds and megabytes of one."""
    environment = os.environ | {"HF_DATASETS_CACHE": str(file.parent / "cache")}
    command = [sys.executable, "-c", CHILD, str(file)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def main(config: Config) -> None:
    found = {}
    print(f"{config.lines:,} prompts\n\n| | size | start, median (lowest to highest) | memory | after 200,000 draws | mapped |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".txt", ".jsonl", ".parquet"):
            file = Path(folder) / f"prompts{suffix}"
            write(file, config.lines)
            first = start(file) if suffix == ".parquet" else None
            runs = [start(file) for _ in range(config.rounds)]
            seconds = [run["seconds"] for run in runs]
            found[suffix] = runs
            most = (max(run[key] for run in runs) for key in ("megabytes", "growth", "mapped"))
            memory = " | ".join(f"+{megabytes:.1f} MB" for megabytes in most)
            spread = f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
            print(f"| {suffix} | {file.stat().st_size / 1e6:.0f} MB | {spread} | {memory} |")
            if first is not None:
                print(f"\nThe first start with {suffix}: {first['seconds']:.1f} s")
                found[f"{suffix}, first start"] = [first]
            file.unlink()
    (HERE / "prompts.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
