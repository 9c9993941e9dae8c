"""Other tiles of the pooling kernels than the shipped ones, to choose by on a new card."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from coma_ds.kernels.attention_pool import launch, reference
from coma_ds.kernels.bench.measure import Budget, Candidate, compare, row
from coma_ds.kernels.bench.pooling import Inputs, Shape

AT_A_TIME = 12  # candidates of one comparison


def tiles(width: int, count: int, *, backward: bool) -> list[launch.Config]:
    """The shipped tile first, then others that may fit."""
    shipped = launch.choose(width, 1, count, backward=backward)
    others = {
        launch.Config(rows, warps, stages, per_sm)
        for rows in (1, 2, 4, 8)
        for warps in (4, 8, 16)
        for stages in (1, 2, 3, 4)
        for per_sm in ((1, 2, 4) if backward else (1,))
        if rows * width <= 16384 and stages * rows * width <= 49152
    }
    return [shipped, *sorted(others - {shipped}, key=str)]


def candidates(shape: Shape, dtype: torch.dtype, device: torch.device, *, backward: bool):
    """One for each tile."""
    one = Inputs.make(shape, dtype, device, 0)
    rows, query = one.rows.detach(), one.query.detach()
    common = {"heads": 1, "eps": reference.EPS}
    saved = launch.forward(rows, None, query, None, train_query=True, **common)

    def forward(config: launch.Config):
        return [
            launch.forward(
                rows, None, query, None, train_query=True, config=config, **common
            ).emb_BD
        ]

    def run_backward(config: launch.Config):
        return launch.backward(
            one.weight,
            rows,
            None,
            query,
            None,
            saved,
            length=shape.count,
            dtype=dtype,
            wanted=(True, True),
            config=config,
            **common,
        )

    for number, config in enumerate(tiles(shape.width, shape.count, backward=backward)):
        name = (
            f"{config.rows} rows {config.warps} warps {config.stages} stages "
            f"{config.per_sm} a processor{'' if number else ' (shipped)'}"
        )
        run = run_backward if backward else forward
        yield Candidate(name, run, lambda number, config=config: config)


def bench(
    device: torch.device,
    budget: Budget,
    wanted: tuple[Shape, ...] = (Shape(4096, 32, 3584), Shape(4096, 32, 2048)),
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[dict]:
    """Rows of the report, until the budget is spent."""
    for shape in wanted:
        for backward in (False, True):
            mine = list(candidates(shape, dtype, device, backward=backward))
            for first in range(0, len(mine), AT_A_TIME):
                if budget.spent:
                    return
                found = compare(mine[first : first + AT_A_TIME], device, budget)
                for name, result in found.items():
                    yield row(
                        "attention_pool",
                        f"coma {name}",
                        result,
                        None,
                        N=shape.samples,
                        D=shape.width,
                        K=shape.count,
                        dtype=str(dtype).removeprefix("torch."),
                        options={"form": "rows", "pass": "backward" if backward else "forward"},
                    )
