"""Other implementations of the loss, where they can be imported.

Known by name: ``memeff`` (one direction and both) and ``inf_cl`` (Inf-CL, one card).  Others: a
folder given by ``--rivals`` is put on the path, and each ``rival_*.py`` in it must define ``NAME``
and ``loss(query_ND, target_MD, temperature) -> scalar`` (both get a gradient, positives on the
diagonal), and may define ``SYMMETRIC = True``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Rival:
    """``loss(query, target, temperature)`` for N = M; ``wants``: why it cannot take a width."""

    name: str
    loss: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    symmetric: bool = False
    multiple: int = 1  # of which the width must be


def _memeff() -> list[Rival]:
    import memeff

    def one_way(query, target, temperature):
        form = memeff.MemoryEfficientQwen3Loss(
            temperature=temperature, margin=2.0, normalized_inputs=True, stable=False
        )
        return form(query, target)

    def both_ways(query, target, temperature):
        form = memeff.MemoryEfficientCLIPLoss(
            temperature=temperature, normalized_inputs=True, stable=False
        )
        return form(query, target)

    return [Rival("memeff", one_way), Rival("memeff", both_ways, symmetric=True)]


def _inf_cl() -> list[Rival]:
    import inf_cl

    def one_way(query, target, temperature):
        own = torch.arange(len(query), device=query.device)
        return inf_cl.cal_flash_loss(query, target, own, 1 / temperature).mean()

    return [Rival("inf_cl", one_way, multiple=256)]


def find(folders: list[Path]) -> tuple[list[Rival], list[str]]:
    """The rivals that can be imported, and a line for each that cannot, with the reason.

    Raises ``ValueError`` for a folder that does not exist.
    """
    found, missing = [], []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--rivals {folder}: no such folder")
        sys.path.insert(0, str(folder.resolve()))
    for name, make in (("memeff", _memeff), ("inf_cl", _inf_cl)):
        try:
            found += make()
        except Exception as error:
            missing.append(f"{name}: not compared ({type(error).__name__}: {error})")
    for folder in folders:
        for path in sorted(folder.glob("rival_*.py")):
            try:
                module = importlib.import_module(path.stem)
                both = getattr(module, "SYMMETRIC", False)
                found.append(Rival(module.NAME, module.loss, symmetric=both))
            except Exception as error:
                missing.append(f"{path.name}: not compared ({type(error).__name__}: {error})")
    return found, missing
