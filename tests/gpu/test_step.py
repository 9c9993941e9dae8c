"""On a GPU: whole steps against the same on the CPU, and what is measured of memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coma_ds.budget import measure
from coma_ds.config import CompressConfig, MatchConfig
from coma_ds.objectives.compress import Compress
from coma_ds.objectives.match import Match
from coma_ds.planning.graphs import measure_graphs
from coma_ds.step import Budget, accumulate, grad_cache
from tests.tiny import PlainEngine, demo_processing, make_batch, tiny_model

GPU, CPU = torch.device("cuda"), torch.device("cpu")
SAMPLES = [
    {"text": 5 + n, "images": [(2, 2 + n % 3)] * (n % 2), "dialogue": 6, "answers": [(1, 4)]}
    for n in range(6)
]


class Engine(PlainEngine):
    """On the GPU."""

    device = GPU
    reduces_once = False


def step(device: torch.device, *, matching: bool, budget: Budget) -> dict[str, torch.Tensor]:
    """Gradients of a step in fp32."""
    samples = [{k: v for k, v in s.items() if not (matching and k in ("dialogue", "answers"))}
               for s in SAMPLES]  # fmt: skip
    model = tiny_model(matching=matching).to(device)
    batch = make_batch(samples, pairs=3 if matching else 0).to(device)
    if matching:
        nothing = torch.zeros(3, dtype=torch.int64)
        batch = replace(batch, negative_counts_N=nothing, task_ids_N=nothing)
    engine = Engine(model) if device == GPU else PlainEngine(model)
    objective = Match(MatchConfig()) if matching else Compress(CompressConfig())
    take = grad_cache if matching else accumulate
    take(engine, objective, batch, budget, seed=0, step=0)
    return {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("matching", [True, False])
@pytest.mark.parametrize("budget", [Budget(2), Budget(2, keep=2), Budget(64, tokens=40)])
def test_a_step_is_that_of_the_cpu(matching, budget) -> None:
    """In fp32, without TF32; dropout is none here, whose masks differ between devices."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found, wanted = (step(d, matching=matching, budget=budget) for d in (GPU, CPU))
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=1e-5, rtol=1e-3), name


def test_pixels_have_the_same_values() -> None:
    processing = demo_processing()
    patch = 3 * processing.image_processor.patch_size**2
    noise = torch.randint(256, (64, patch), dtype=torch.uint8, generator=torch.Generator())
    images = processing.image_batch(noise.numpy(), [(1, 8, 8)])
    assert torch.equal(images.values(GPU).cpu(), images.values(CPU))


def test_a_pinned_batch_arrives_whole() -> None:
    batch = make_batch(SAMPLES)
    pinned = batch.pin_memory()
    assert pinned.images.pixels_PC.is_pinned() and pinned.input_ids_T.is_pinned()
    moved = pinned.to(GPU)
    assert torch.equal(moved.input_ids_T.cpu(), batch.input_ids_T)
    assert torch.equal(moved.images.values(GPU).cpu(), batch.images.pixels_PC)


def test_a_token_costs_what_the_planner_says() -> None:
    """In bf16, over rows enough that the allocator's blocks do not matter; attention is torch's
    here, whose operands are as many."""
    model = tiny_model().to(GPU, torch.bfloat16).train()
    batch = make_batch([{"text": 500}] * 8, pairs=4).to(GPU)
    cost, free = measure(Engine(model), Match(MatchConfig()), batch)
    with torch.device("meta"):
        outline = tiny_model().to(torch.bfloat16).train()
    planned = measure_graphs(outline, liger=False).held
    assert cost.graph == pytest.approx(planned, rel=0.3)
    assert cost.transient > 0 and free > 2**30
