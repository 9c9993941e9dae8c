"""What the card itself gives: a large product, and attention over spans."""

from __future__ import annotations

import statistics
import time

import torch

from coma_ds.model.varlen import CARRIERS, Spans, best_carrier


def matmul_rate(device: torch.device, size: int = 8192) -> float:
    """TFLOP/s of a square product in bf16: what the card gives at best, here and now."""
    size = size if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    times = []
    for _ in range(12):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times[2:]) / 1e12


def attention(device: torch.device, samples: int = 16) -> dict[str, float]:
    """Stage 1's two spans a sample against causal ones over the same tokens, forward and backward,
    at the heads of the 3B model; seconds, and their ratio."""
    name = best_carrier(device, torch.bfloat16)[0]
    if not name:
        return {}
    attend = CARRIERS[name].attend
    context, tokens, dialogue = 640, 32, 320
    found = {}
    for way, lengths in {
        "causal": [context + tokens + dialogue] * samples,
        "bottleneck": [context + tokens, tokens + dialogue] * samples,
    }.items():
        spans = Spans.of(torch.tensor(lengths), device)
        seen = [
            torch.randn(
                sum(lengths), heads, 128, dtype=torch.bfloat16, device=device, requires_grad=True
            )
            for heads in (16, 2, 2)
        ]
        times = []
        for _ in range(12):
            torch.cuda.synchronize(device)
            began = time.perf_counter()
            attend(*seen, spans, 128**-0.5, True).sum().backward()
            torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
        found[way] = statistics.median(times[2:])
    return found | {"ratio": found["bottleneck"] / found["causal"], "by": name}
