"""Compile the pooling kernels as they are shipped; prints one JSON object a kernel.

``python -m tests.kernels.compiled_pool`` without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import sys

from coma_ds.kernels.attention_pool import jit, launch
from tests.kernels.compiling import build, resources

TYPES = {
    "positions": "*i64",
    "query": "*fp32",
    "valid": "*i64",
    **dict.fromkeys(("emb", "scores", "softmax", "divisor", "grad_emb"), "*fp32"),
    **dict.fromkeys(("grad_query", "partial"), "*fp32"),
    "counters": "*i32",
    **dict.fromkeys(("samples", "per_group", "tokens", "length"), "i32"),
    **dict.fromkeys(("stride_sample", "stride_row"), "i32"),
    **dict.fromkeys(("scale", "eps"), "fp32"),
}
# the barrier, then no store to device memory until the atomic
TICKET = re.compile(
    r"bar\.sync\s+0;(?:(?!st\.global)[^@])*@%p\d+ atom\.global\.gpu\.acq_rel\.add\.u32"
)
ASKED = ("query", "scores", "softmax", "counters")


def absent(form: str, backward: bool) -> list[str]:
    """Arguments that are None: ``mean`` has no query, ``rows`` no positions, only ``at`` valid."""
    names = [] if form == "at" else ["positions", "valid"]
    if form == "mean":
        names += ASKED
        names += ["hidden", "grad_query", "partial"] if backward else []
    return names


def compiled(form: str, backward: bool, width: int, heads: int, dtype: str, card: int, config=None):
    """The kernel, its resources and what its code loads and stores; 32 tokens."""
    config = config or launch.choose(width, heads, 32, backward=backward)
    block_h, block_e = launch.tile(width, heads)
    kernel = jit.pool_backward if backward else jit.pool_forward
    constants = {
        "HEADS": heads,
        "WIDTH": width // heads,
        "BLOCK_K": config.rows,
        "BLOCK_H": block_h,
        "BLOCK_E": block_e,
        "STAGES": config.stages,
        **dict.fromkeys(absent(form, backward)),
        "BLOCK_T": 32,
        **({} if backward else {"COUNTERS": launch.COUNTERS}),
    }
    done = build(
        kernel,
        TYPES | {"hidden": f"*{dtype}", "grad_hidden": f"*{dtype}"},
        constants,
        card,
        divisible=("stride_sample", "stride_row", "tokens"),
        **{k: v for k, v in config.options.items() if v},
    )
    ptx = done.asm["ptx"]
    return {
        "kernel": f"{form}.{'backward' if backward else 'forward'}",
        "width": width,
        "heads": heads,
        "dtype": dtype,
        "card": card,
        "warps": config.warps,
        "rows": config.rows,
        "stages": config.stages,
        **resources(done, card),
        "wide_copies": ptx.count("cp.async.cg"),
        "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global[.\w:]*\.v4\.b32", ptx)),
        "float_atomics": len(re.findall(r"\b(?:atom|red)\.[.\w:]*\.f(?:16|32|64)", ptx)),
        "atomics": len(re.findall(r"\batom\.", ptx)),
        "tickets": len(TICKET.findall(ptx)),
    }


SHIPPED = [
    (form, backward, width, heads, dtype, card)
    for form in ("rows", "mean", "at")
    for backward in (False, True)
    for width, heads, dtype, card in (
        (1024, 1, "bf16", 90),
        (2048, 1, "bf16", 90),
        (3584, 1, "bf16", 90),
    )
] + [
    ("rows", backward, width, heads, dtype, card)
    for backward in (False, True)
    for width, heads, dtype, card in (
        (64, 1, "bf16", 90),
        (896, 14, "bf16", 90),
        (2048, 2, "bf16", 90),
        (3584, 7, "bf16", 90),
        (3584, 28, "bf16", 90),
        (8192, 1, "bf16", 90),
        (3584, 1, "fp32", 90),
        (3584, 1, "bf16", 80),
        (3584, 1, "fp32", 80),
        (3584, 1, "bf16", 100),
        (2048, 1, "bf16", 100),
    )
]

if __name__ == "__main__":
    for case in SHIPPED:
        sys.stdout.write(json.dumps(compiled(*case)) + "\n")
        sys.stdout.flush()
