"""K compression tokens: one parameter, put into the sequence by hooks on the embedding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class CompressionTokens(nn.Module):
    """The rows of the K compression tokens, ``weight`` [K, D].

    They never live in the embedding table while training: the table has no gradient for 32 rows'
    sake, and under ZeRO-3 it is not gathered for them.  The ids ``first_id .. first_id + K - 1``
    may lie beyond the table; the hook looks row 0 up in their place and then writes these rows.
    """

    def __init__(self, count: int, width: int, first_id: int) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"{count} compression tokens: at least 1 is needed")
        self.first_id = first_id
        self._states: torch.Tensor | None = None
        self._ids: torch.Tensor | None = None
        self.weight = nn.Parameter(torch.empty(count, width))

    @torch.no_grad()
    def initialise(self, table_VD: torch.Tensor, seed: int = 0, spread: float = 0.5) -> None:
        """Draw the rows from the statistics of the embedding table (its mean and deviation).

        Half of the deviation keeps the rows near the words, and apart from each other.
        """
        if table_VD.is_meta:  # a model of shapes alone
            return
        table = table_VD.float()
        drawn = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.weight.shape, generator=drawn, device="cpu")
        rows = table.mean(0) + spread * table.std(0) * noise.to(table.device)
        self.weight.copy_(rows.to(self.weight.dtype))

    def forward(self, ids: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """``embeddings`` [..., D] with the token rows written where ``ids`` [...] names them."""
        place = ids - self.first_id
        is_token = (place >= 0) & (place < len(self.weight))
        if self._states is not None:
            return embeddings.masked_scatter(is_token[..., None], self._states.to(embeddings.dtype))
        rows = self.weight[place.clamp(0, len(self.weight) - 1)]
        return torch.where(is_token[..., None], rows.to(embeddings.dtype), embeddings)

    @contextmanager
    def replaced_by(self, states: torch.Tensor) -> Iterator[None]:
        """Write ``states`` [B * K, D], in the order of the sequence, in place of the rows."""
        self._states = states
        try:
            yield
        finally:
            self._states = None

    def attach(self, embedding: nn.Embedding) -> None:
        """Register the two hooks on the model's input embedding."""

        def look_up_row_zero(_, args):
            ids = args[0]
            place = ids - self.first_id
            is_token = (place >= 0) & (place < len(self.weight))
            self._ids = ids
            return (ids.masked_fill(is_token, 0),)

        def write_rows(_, args, output):
            ids, self._ids = self._ids, None
            return self(ids, output)

        embedding.register_forward_pre_hook(look_up_row_zero)
        embedding.register_forward_hook(write_rows)
