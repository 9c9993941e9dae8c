"""Inputs, the definition and the comparison for the tests of attention pooling."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coma_ds.kernels.attention_pool import attention_pool, attention_pool_at


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call; ``length``: rows taken from a padded sequence."""

    samples: int = 3
    tokens: int = 5
    width: int = 24
    heads: int = 1
    query: bool = True
    valid: bool = False
    length: int | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def inputs(self) -> dict[str, torch.Tensor | None]:
        """Random inputs; what must not be looked at is NaN."""
        noise = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=noise)

        shape = (self.samples, self.tokens)
        valid = torch.full((self.samples,), self.tokens)
        if self.valid:
            valid = torch.randint(1, self.tokens + 1, (self.samples,), generator=noise)
        places = torch.arange(self.tokens).expand(shape)
        if self.length is not None:
            order = torch.rand((self.samples, self.length), generator=noise).argsort(1)
            places = order[:, : self.tokens].sort(1).values
        used = torch.arange(self.tokens) < valid[:, None]
        rows = normal(self.samples, self.length or self.tokens, self.width)
        seen = torch.zeros(rows.shape[:2], dtype=torch.bool)
        sample = torch.arange(self.samples)[:, None].expand(shape)
        seen[sample[used], places[used]] = True
        rows[~seen] = float("nan")
        places = torch.where(used, places, -7)  # not looked at either
        return {
            "rows": rows.to(self.dtype).requires_grad_(),
            "query": 0.7 * normal(self.width).requires_grad_() if self.query else None,
            "valid": valid if self.valid else None,
            "positions": None if self.length is None else places,
            "weight": normal(self.samples, self.width),
        }


def call(case: Case, inputs: dict) -> torch.Tensor:
    """The public function on inputs of ``Case``."""
    options = {"valid": inputs["valid"], "heads": case.heads}
    if case.length is None:
        return attention_pool(inputs["rows"], inputs["query"], **options)
    return attention_pool_at(inputs["rows"], inputs["positions"], inputs["query"], **options)


def values(case: Case, inputs: dict) -> dict[str, torch.Tensor]:
    """Result and gradients of ``sum(result * weight)``."""
    emb = call(case, inputs)
    leaves = {name: inputs[name] for name in ("rows", "query") if inputs[name] is not None}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad((emb * inputs["weight"]).sum(), list(leaves.values()))
    return {"emb": emb.detach(), **dict(zip(leaves, grads))}


def definition(case: Case, inputs: dict) -> dict[str, torch.Tensor]:
    """The same in float64, one sample and one head at a time, straight from the formula."""
    leaves = {
        name: inputs[name].detach().double().requires_grad_()
        for name in ("rows", "query")
        if inputs[name] is not None
    }
    size = case.width // case.heads
    out = []
    for sample in range(case.samples):
        count = case.tokens if inputs["valid"] is None else int(inputs["valid"][sample])
        places = range(count)
        if inputs["positions"] is not None:
            places = inputs["positions"][sample, :count].tolist()
        rows = torch.stack([leaves["rows"][sample, place] for place in places])
        parts = []
        for head in range(case.heads):
            part = rows[:, head * size : (head + 1) * size]
            if inputs["query"] is None:
                parts.append(sum(part) / count)
            else:
                query = leaves["query"][head * size : (head + 1) * size]
                grown = [torch.exp(row @ query / size**0.5) for row in part]
                parts.append(sum(g / sum(grown) * row for g, row in zip(grown, part)))
        pooled = torch.cat(parts)
        out.append(pooled / pooled.norm())
    emb = torch.stack(out)
    grads = torch.autograd.grad((emb * inputs["weight"]).sum(), list(leaves.values()))
    return {"emb": emb.detach(), **dict(zip(leaves, grads))}
