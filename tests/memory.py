"""How much memory a computation asks for at a time, by watching every operation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


def largest_tensor(call: Callable[[], object]) -> int:
    """Elements of the largest tensor that any operation of ``call`` returns, backward included."""
    with _Largest() as seen:
        call()
    return seen.elements
