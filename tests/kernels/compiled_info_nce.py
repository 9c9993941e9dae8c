"""Compile the kernels of InfoNCE as they are shipped; prints one JSON object a kernel.

``python -m tests.kernels.compiled_info_nce`` without TRITON_INTERPRET; with names of kernels as
arguments, those alone.
"""

from __future__ import annotations

import json
import re
import sys

import torch

from coma_ds.kernels.info_nce import jit, rows
from coma_ds.kernels.info_nce.tiles import SHIPPED, SINGLE, Tile
from tests.kernels.compiling import build, resources

NUMBERS = ("sums", "slopes", "peaks", "drops", "positive", "scale", "reference", "temperature")
NUMBERS += ("weight", "scores", "loss", "push", "pull", "heat", "own_push", "hardest", "masked")
NUMBERS += ("query_grad", "more", "target_sum", "negative_grad", "target_grad", "out", "grad")
IDS = ("own", "row_a", "column_a", "row_b", "column_b", "index", "ids", "negative_ids")
IDS += ("places", "order")
COUNTS = ("rows", "columns", "width", "height", "depth", "first_column", "first_tile", "tiles")
COUNTS += ("targets", "target_tiles", "count", "elements")
STRIDES = ("stride_out", "stride_query", "stride_target", "stride_grad", "stride_scaled")
TYPES = {
    **dict.fromkeys(NUMBERS, "*fp32"),
    **dict.fromkeys(IDS, "*i64"),
    **dict.fromkeys(COUNTS + STRIDES, "i32"),
    **dict.fromkeys(("query", "target", "negative", "scaled_query", "scaled_target"), "*bf16"),
    **dict.fromkeys(("hardness", "margin"), "fp32"),
    "flags": "*i32",
}
OFF = dict.fromkeys(("row_a", "column_a", "row_b", "column_b", "drops", "slopes"))
ALIGNED = ("width", *STRIDES)


def descriptor(dtype: str, *shape: int) -> str:
    return f"tensordesc<{dtype}[{','.join(map(str, shape))}]>"


def terms(tile: Tile, card: int, *, options: bool, gated: bool = False, dtype: str = "bf16"):
    """The kernel with every option, or with none."""
    types = TYPES | {
        "row": descriptor(dtype, tile.rows, tile.depth),
        "column": descriptor(dtype, tile.columns, tile.depth),
        "panel": descriptor(dtype, tile.rows, tile.columns // tile.split),
    }
    constants = {} if options else dict(OFF)
    constants |= {
        "HARDNESS": options,
        "MARGIN": options,
        "GATED": gated,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "BLOCK_D": tile.depth,
        "SPLIT": tile.split,
        "GROUP": tile.group,
        "STAGES": tile.stages,
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        "INTERPRETED": False,
    }
    return build(jit.terms, types, constants, card, divisible=ALIGNED, num_warps=tile.warps)


def accumulate(tile: Tile, card: int, *, transposed: bool = True):
    """The kernel that adds to what is there."""
    block = (tile.depth, tile.rows) if transposed else (tile.rows, tile.depth)
    types = TYPES | {
        "panel": descriptor("bf16", *block),
        "row": descriptor("bf16", tile.depth, tile.columns),
    }
    constants = {
        "TRANSPOSED": transposed,
        "ADD": True,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "BLOCK_K": tile.depth,
        "SPLIT": tile.split,
        "GROUP": tile.group,
        "STAGES": tile.stages,
        "PRECISION": "tf32",
        "INTERPRETED": False,
    }
    divisible = (*ALIGNED, "depth")
    return build(jit.accumulate, types, constants, card, divisible=divisible, num_warps=tile.warps)


def small(name: str, card: int):
    """A kernel of the rows, at width 2048 with two own negatives and everything there."""
    wide = {"BLOCK_R": 1, "BLOCK_D": 2048}
    constants = {
        "cosines": {"TEMPERATURES": 2, "OWN": 2, "MARGIN": True, **wide},
        "gather": {"BLOCK": 256},
        "finish": {"TEMPERATURES": 2, "OWN": 2, "BLOCK_R": 32, "BLOCK_T": 16},
        "spread": {"OWN": 2, "INTERPRETED": False, **wide},
        "collect": wide,
        "rescale": {"BLOCK": 4096},
    }[name]
    types = TYPES | {"out": "*i64"} if name == "gather" else TYPES | {"factor": "fp32"}
    if name == "rescale":
        types = TYPES | {"factor": "*fp32"}
    kernel = getattr(rows, name)
    return build(kernel, types, constants, card, divisible=ALIGNED, num_warps=4)


def shipped(card: int) -> dict:
    """What is launched on a card, by name, as calls that compile it."""
    first = card // 10
    plain, narrow = SHIPPED["terms", first]
    large, little = SHIPPED["terms with options", first]
    calls = {
        "terms": lambda: terms(plain, card, options=False),
        "terms, options": lambda: terms(large, card, options=True),
        "terms, options, gated": lambda: terms(large, card, options=True, gated=True),
        "terms, small": lambda: terms(narrow, card, options=False),
        "terms, options, small": lambda: terms(little, card, options=True),
        "terms, float32": lambda: terms(SINGLE[first], card, options=True, dtype="fp32"),
    }
    for size, tile in zip(("", ", small"), SHIPPED["accumulate", first]):
        calls[f"accumulate{size}"] = lambda tile=tile: accumulate(tile, card)
    calls["accumulate, columns"] = lambda: accumulate(
        SHIPPED["accumulate", first][0], card, transposed=False
    )
    for name in ("cosines", "gather", "finish", "spread", "collect", "rescale"):
        calls[name] = lambda name=name: small(name, card)
    return calls


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for card in (80, 90, 100):
        for name, call in shipped(card).items():
            if names and name not in names:
                continue
            kernel = call()
            ptx = kernel.asm["ptx"]
            found = {
                "kernel": name,
                "card": card,
                "wgmma": ptx.count("wgmma.mma_async"),
                "tcgen05": ptx.count("tcgen05.mma"),
                "mma": ptx.count("mma.sync"),
                "bulk": ptx.count("cp.async.bulk.tensor"),
                "minima": len(re.findall(r"\bmin\.(?:ftz\.)?f32", ptx)),
                "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
                **resources(kernel, card),
            }
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
