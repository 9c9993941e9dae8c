"""The cards that a plan can be made for, and what was measured on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

NUMBERS = ("memory_gib", "tflops", "node_gb", "share")


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU.  ``key``: its short name; ``tflops``: dense bf16; ``node_gb``: GB/s to the others of
    its node; ``share`` of the TFLOP/s that steps reach, ``measured`` where, or empty."""

    key: str
    name: str
    memory_gib: float
    tflops: float
    node_gb: float
    share: float
    measured: str = ""


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind; ``network_gb``: GB/s that a node receives from the others."""

    card: Card
    gpus: int
    per_node: int
    network_gb: float

    @property
    def nodes(self) -> int:
        """How many."""
        return math.ceil(self.gpus / self.per_node)

    def seconds(self, received: float, between: float) -> float:
        """To move what a GPU receives, ``between`` of these bytes from other nodes."""
        if self.gpus == 1:
            return 0.0
        inside = received / (self.card.node_gb * 1e9)
        return max(inside, between / (self.network_gb * 1e9))


def read_cards(path: str | None = None) -> dict[str, Card]:
    """By short name; those of the file ``path`` (of the same form) beside the shipped ones.

    Raises ``ValueError`` for a file that is not of that form.
    """
    shipped = resources.files("coma_ds.planning").joinpath("cards.yaml").read_text()
    trees = yaml.safe_load(shipped)
    if path:
        if not Path(path).is_file():
            raise ValueError(f"--cards {path!r}: no such file")
        try:
            own = yaml.safe_load(Path(path).read_text())
            trees |= {str(name): {**trees.get(name, {}), **tree} for name, tree in own.items()}
        except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError) as error:
            raise ValueError(
                f"--cards {path!r}: expected YAML of the form NAME: {{{', '.join(NUMBERS)}}}"
            ) from error
    return {str(name): _card(str(name), tree, f"--cards {path!r}") for name, tree in trees.items()}


def _card(name: str, tree: dict, where: str) -> Card:
    for key in tree:
        if key not in (*NUMBERS, "name", "measured"):
            raise ValueError(
                f"{where}, {name}: unknown key {key!r}, known are {', '.join(NUMBERS)}, name, "
                "measured"
            )
    numbers = {}
    for key in NUMBERS:
        value = tree.get(key)
        if key not in tree:
            raise ValueError(f"{where}, {name}: {key} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{where}, {name}: {key} {value!r}: a number is expected")
        if not 0 < value < math.inf:
            raise ValueError(f"{where}, {name}: {key} {value}: a number above 0 is expected")
        numbers[key] = value
    if numbers["share"] > 1:
        raise ValueError(f"{where}, {name}: share {numbers['share']}: a part of 1 is expected")
    words = {key: str(tree.get(key) or other) for key, other in (("name", name), ("measured", ""))}
    return Card(key=name, **numbers, **words)
