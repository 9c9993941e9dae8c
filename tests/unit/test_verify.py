"""What ``--verify-gradients`` makes of gradients that are no numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from coma_ds.config import RunConfig
from coma_ds.verify import verify_gradients


class Engine:
    """Gives the chunked gradients, then the plain ones."""

    device = torch.device("cpu")
    model = SimpleNamespace(backbone=SimpleNamespace(carrier="split"))

    def __init__(self, *gradients: dict[str, torch.Tensor]) -> None:
        self.given = list(gradients)

    def gradients(self) -> dict[str, torch.Tensor]:
        return self.given.pop(0)

    def eval(self) -> None: ...

    train = discard_gradients = eval


@pytest.mark.parametrize("place", ["layers.0.a", "tokens.weight"])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_is_never_equal(monkeypatch, place, which):
    """Whatever stands in the other groups, and whichever of the two steps it is in."""
    for name in ("accumulate", "plain_step"):
        monkeypatch.setattr(f"coma_ds.verify.{name}", lambda *_, **__: None)
    fine = {"layers.0.a": torch.ones(2), "tokens.weight": torch.ones(2), "visual.b": torch.ones(1)}
    given = [fine, fine]
    batch = SimpleNamespace(to=lambda _: None)
    assert set(verify_gradients(Engine(*given), None, batch, RunConfig()).values()) == {0.0}
    given[which] = fine | {place: torch.tensor([1.0, math.nan])}
    with pytest.raises(ValueError, match="differs from the plain one by nan"):
        verify_gradients(Engine(*given), None, batch, RunConfig())
