"""Recipes and overrides as trees of plain values, before they are checked."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

import yaml


def merge(base: dict, over: dict) -> dict:
    """``base`` with the leaves of ``over``; sections are merged."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key that is a list or a mapping", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_overrides(overrides: list[str]) -> dict:
    """``["optim.lr=2e-5", ...]`` as a tree; values are YAML.

    Raises ``ValueError`` for a word without ``=``, a value that is not YAML, or a section that is
    given a value and keys.
    """
    tree: dict[str, Any] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ValueError(f"override {word!r}: expected KEY=VALUE, for example optim.lr=2e-5")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            why = getattr(error, "problem", None) or error
            raise ValueError(f"override {word!r}: the value is not YAML ({why})") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        _check_both_fit(tree, value, word)
        tree = merge(tree, value)
    return tree


def _check_both_fit(tree: dict, other: dict, word: str) -> None:
    for key in tree.keys() & other.keys():
        one, two = tree[key], other[key]
        if isinstance(one, dict) != isinstance(two, dict):
            raise ValueError(
                f"override {word!r}: {key!r} is given a value and keys; give its keys (KEY=VALUE)"
            )
        if isinstance(one, dict):
            _check_both_fit(one, two, word)


def recipe_names() -> list[str]:
    """The recipes shipped in the package."""
    folder = resources.files("coma_ds.recipes")
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml"))


def _recipe_text(name: str) -> str:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"recipe file {name!r} does not exist")
        try:
            return path.read_text()
        except UnicodeDecodeError as error:
            raise ValueError(f"recipe file {name!r} is not UTF-8 text ({error.reason})") from None
    if name in recipe_names():
        return resources.files("coma_ds.recipes").joinpath(f"{name}.yaml").read_text()
    close = difflib.get_close_matches(name, recipe_names(), 1, 0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"recipe {name!r}: {hint}shipped are {', '.join(recipe_names())}")


def read_recipe(name: str, above: tuple[str, ...] = ()) -> dict:
    """The tree of a shipped recipe or of a YAML file, its ``base`` recipe merged below it.

    ``above`` are the recipes whose base this one is.  Raises ``ValueError`` for a name that is
    neither, a file that is not a YAML mapping, a key given twice, or bases that go in a circle.
    """
    if name in above:
        raise ValueError(f"recipe {above[0]!r}: its bases go in a circle, {' -> '.join(above)}")
    try:
        tree = yaml.load(_recipe_text(name), _Loader)
    except yaml.YAMLError as error:
        mark, problem = (getattr(error, part, None) for part in ("problem_mark", "problem"))
        where = f" in line {mark.line + 1}" if mark else ""
        why = f" ({problem})" if problem else ""
        raise ValueError(f"recipe {name!r} is not YAML: an error{where}{why}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"recipe {name!r}: expected a mapping of keys, found {tree!r:.60}")
    base = tree.pop("base", None)
    return merge(read_recipe(str(base), (*above, name)), tree) if base else tree


def wrong_values(errors: list[Any], known: list[str]) -> list[str]:
    """A line for each wrong value that pydantic found: its key, what was expected, what was given.

    ``known`` keys; a value that may be of several types has an error for each of them, below it.
    """
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for item in errors:
        parts = [str(part) for part in item["loc"]]
        place = ".".join(parts)
        while parts and ".".join(parts) not in known:
            parts.pop()
        given = "" if item["type"] == "value_error" else f" (given: {item['input']!r})"
        said = place, item["msg"].removeprefix("Value error, ")
        found.setdefault((".".join(parts) or place, given), []).append(said)
    lines = []
    for (key, given), same in found.items():
        place, first = same[0]
        words = [first, *(said.removeprefix("Input should be ") for _, said in same[1:])]
        place = place if len(same) == 1 else key
        lines.append(f"{place}: {', or '.join(words)}{given}" if place else f"{words[0]}{given}")
    return lines
