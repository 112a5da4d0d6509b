"""Rules of the house that a reader cannot see at a glance, checked on the syntax trees."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "diffusionrl"
FILES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "pickle.load", "pickle.loads", "numpy.load", "np.load"}
GLOBAL_GENERATORS = {"torch.manual_seed", "torch.seed", "np.random.seed", "random.seed", "random.random", "np.random.rand"}
# Imports point downwards: a room may import what stands in lines before its own.
FLOORS = [
    {"errors", "seeds", "transitions", "images", "emoji", "interruption", "intervals", "progress"},
    {"algorithm_config", "processes", "reward_config"},
    {"config", "prompts", "checkpoint", "hub", "trackers"},
    {"policies", "rewards", "alarms", "guard"},
    {"rollout", "advantages"},
    {"algorithms", "measures"},
    {"evaluation", "tracking", "optimization", "tasks"},
    {"pretraining", "recent"},
    {"state", "card", "monitor"},
    {"trainer"},
    {"sampling", "report", "presets", "doctor", "emoji.recipe"},
    {"api", "assessment"},
    {"cli"},
    {"__main__"},
]
GROUND = {("emoji", "seeds")}  # within the ground floor, this alone


def room_of(module: str) -> str:
    """``diffusionrl.emoji.recipe.vae`` -> ``emoji.recipe``."""
    parts = module.split(".")[1:]
    return "emoji.recipe" if parts[:2] == ["emoji", "recipe"] else parts[0]


def imported_rooms(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("diffusionrl.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "diffusionrl":
            found |= {f"diffusionrl.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusionrl."):
            found.add(node.module or "")
    return {room_of(module) for module in found}


def calls(file: Path) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_is_unpickled_or_evaluated(file: Path) -> None:
    assert not calls(file) & FORBIDDEN_CALLS
    nodes = list(ast.walk(ast.parse(file.read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not {name for name in imported if name.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "joblib")}
    assert not imported & FORBIDDEN_CALLS


@pytest.mark.parametrize(
    "file", [file for file in FILES if "recipe" not in file.parts], ids=lambda file: str(file.relative_to(PACKAGE))
)
def test_no_global_generator_is_used(file: Path) -> None:
    """The recipe alone seeds torch, for the initial weights of its networks."""
    found = calls(file)
    assert not found & GLOBAL_GENERATORS
    unseeded = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {"torch.randn", "torch.rand", "torch.randint", "torch.randperm"}
        and not any(keyword.arg == "generator" for keyword in node.keywords)
    ]
    assert not unseeded


def test_imports_point_downwards() -> None:
    height = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    for file in FILES:
        module = ".".join(["diffusionrl", *file.relative_to(PACKAGE).with_suffix("").parts])
        if file == PACKAGE / "__init__.py":
            continue
        room = room_of(module)
        for other in imported_rooms(file) - {room}:
            assert height[other] < height[room] or (room, other) in GROUND, f"{module} imports {other}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert len(file.read_text().splitlines()) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 70, f"{node.name} is longer than a screen"
