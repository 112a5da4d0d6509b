"""YAML that people write, within bounds: a file that nests, repeats itself or explodes is refused, not waited for."""

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from diffusionrl.errors import UserError
from diffusionrl.paths import describe

_LARGEST = 1 << 20  # bytes of a file
_DEEPEST = 50
_NODES = 20_000  # with aliases written out


class _Loader(yaml.SafeLoader):
    """Safe, of bounded depth, and no key twice."""

    depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ConstructorError(None, None, f"it is nested more than {_DEEPEST} deep", self.get_mark())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise ConstructorError(None, None, f"{key.value!r} stands there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """What ``yaml.safe_load`` gives. Raises ValueError, in a line or two, for whatever is wrong with it."""
    return copy.deepcopy(_parsed(text))


@lru_cache(maxsize=16)  # a report reads the same settings again and again, and YAML is slow to read
def _parsed(text: str) -> Any:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _weigh(node, {}) > _NODES:
                raise ValueError(f"its aliases make more than {_NODES:,} values")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise ValueError("it is nested too deeply, or within itself") from error
    except (yaml.YAMLError, ArithmeticError, TypeError) as error:
        raise ValueError(str(error)) from error


def _weigh(node: Node, known: dict[int, int]) -> int:
    """How many values it is with aliases written out. Raises ValueError where it holds itself."""
    if id(node) not in known:
        known[id(node)] = -1
        inner: list[Node] = []
        if isinstance(node, SequenceNode):
            inner = node.value
        elif isinstance(node, MappingNode):
            inner = [each for pair in node.value for each in pair]
        known[id(node)] = 1 + sum(_weigh(each, known) for each in inner)
    if known[id(node)] < 0:
        raise ValueError("an alias stands within what it names")
    return known[id(node)]


def read_yaml(file: Path, what: str = "config file") -> dict[str, Any]:
    """A file of settings.

    Raises:
        UserError: naming the file, and what is wrong.
    """
    try:
        if not file.is_file():
            raise OSError(f"it is {describe(file)}")
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"it is larger than {_LARGEST >> 20} MB")
        content = parse_yaml(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} {file} must hold settings like 'steps: 20', not a {type(content).__name__}")
    return content
