"""The examples of papers at toy size: they run through, keep what they have, and measure what they say."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PAPERS = Path(__file__).parent.parent / "examples" / "papers"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"paper_{name}", PAPERS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rgm() -> ModuleType:
    return example("rgm")


def test_restoration_in_few_steps(rgm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(rgm, "MANY", 20)
    toy = ["--seeds", "0", "1", "--iterations", "3", "--steps", "1", "--count", "100", "--out", str(tmp_path)]
    rgm.main(toy)
    said = capsys.readouterr().out
    table = said[said.index("| arm |") :]
    assert all(f"| {name} |" in table for name in (*rgm.ARMS, rgm.DENOISER, "leave_the_left", "noise"))
    found = json.loads((tmp_path / "seed_0.json").read_text())
    assert (tmp_path / "seed_0.png").is_file() and (tmp_path / "leave_the_left_0" / "report.html").is_file()
    del found["T = 2"]
    (tmp_path / "seed_0.json").write_text(json.dumps(found))
    rgm.main(toy)
    again = capsys.readouterr().out
    assert again[: again.index("| arm |")].count("seed 0, ") == 1, "what is there is not made again"
    assert again[again.index("| arm |") :] == table


def test_what_restoration_measures(rgm: Any) -> None:
    points = torch.tensor([[0.0, 0.0]] * 4), torch.tensor([[3.0, 4.0]] * 4)
    assert rgm.energy_distance(*points) == pytest.approx(10) and rgm.energy_distance(points[0], points[0]) == 0
    right = rgm.MODES[rgm.MODES[:, 0] > -0.35]
    assert len(right) == 15 and rgm.modes_kept(rgm.MODES) == 15 and rgm.modes_kept(right[:7]) == 7
    assert rgm.on_the_left(rgm.MODES) == pytest.approx(10 / 25)
    assert (rgm.leave_the_left(right, [], []) == 0).all() and (rgm.leave_the_left(rgm.MODES, [], []) < 0).sum() == 10


def test_z_is_drawn_anew_at_each_step_of_restoration(rgm: Any) -> None:
    """As two dimensions of the latent that are restored to 0."""
    policy = rgm.policy_of(rgm.Generator(True))
    level = policy.grid(4).levels[torch.full((3,), 1)]
    x0, noise = policy.denoise(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), level, [None] * 3, 1.0)
    assert (x0[:, 2:] == 0).all() and (x0[:, :2] != 0).any() and noise.isfinite().all()
    assert policy.grid(4).sigma.tolist() == [1, 0.75, 0.5, 0.25] and policy.grid(4).sigma_next.tolist() == [0.75, 0.5, 0.25, 0]
