"""Rules of the house that a reader cannot see at a glance, checked on the syntax trees."""

import ast
import graphlib
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "diffusionrl"
FILES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "pickle.load", "pickle.loads", "numpy.load", "np.load"}
GLOBAL_GENERATORS = {"torch.manual_seed", "torch.seed", "np.random.seed", "random.seed", "random.random", "np.random.rand"}
# Imports point downwards: a room may import those in lines below its own. The recipe of the embedded world is a program.
ROOMS = [
    {"__main__"},
    {"cli"},
    {"api", "emoji.recipe"},
    {"report", "doctor", "serving"},
    {"training"},
    {"algorithms"},
    {"evaluation"},
    {"sampling"},
    {"rewards"},
    {"policies"},
    {"choosing"},
    {"runs"},
    {"data"},
    {"config"},
    {"emoji"},
    {"foreign"},
    {"web"},
    {"processes"},
    {"interruption", "seeds", "transitions"},
    {"devices"},
    {"paths"},
    {"errors"},
]


def room_of(module: str) -> str:
    """``diffusionrl.emoji.recipe.vae`` -> ``emoji.recipe``."""
    parts = module.split(".")[1:]
    return "emoji.recipe" if parts[:2] == ["emoji", "recipe"] else parts[0]


def module_of(file: Path) -> str:
    parts = ["diffusionrl", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


@cache
def nodes_of(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text())))


def imported_modules(file: Path) -> set[str]:
    """Of the project, wherever in the file they are imported, but for type checkers alone."""
    found = set()
    for node in nodes_of(file):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module or "")
    return found & set(MODULES) - {"diffusionrl"}


@cache
def calls(file: Path) -> set[str]:
    return {ast.unparse(node.func) for node in nodes_of(file) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_is_unpickled_or_evaluated(file: Path) -> None:
    assert not calls(file) & FORBIDDEN_CALLS
    nodes = nodes_of(file)
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
        for node in nodes_of(file)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {"torch.randn", "torch.rand", "torch.randint", "torch.randperm"}
        and not any(keyword.arg == "generator" for keyword in node.keywords)
    ]
    assert not unseeded


def test_imports_point_downwards() -> None:
    height = {room: -line for line, rooms in enumerate(ROOMS) for room in rooms}
    for module, file in MODULES.items():
        if module == "diffusionrl":
            continue
        for other in imported_modules(file):
            below = height[room_of(other)] < height[room_of(module)]
            assert below or room_of(other) == room_of(module), f"{module} imports {other}"


def test_no_circle_inside_a_room() -> None:
    graph = {module: imported_modules(file) for module, file in MODULES.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400
    for node in nodes_of(file):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 70, f"{node.name} is longer than a screen"
