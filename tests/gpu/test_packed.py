"""On a GPU: the packages themselves, against fp64; collected only where there is one."""

from __future__ import annotations

import pytest
import torch

from coma_ds.model.liger import apply_liger, missing_liger
from coma_ds.model.varlen import CARRIERS, LOOPED, Spans
from tests.standins import defined
from tests.tiny import make_batch, tiny_model
from tests.unit.test_visibility import BATCHES

GPU = torch.device("cuda")
HALF = torch.bfloat16
USABLE = [name for name, carrier in CARRIERS.items() if not carrier.missing(GPU, HALF)]
LENGTHS = {"odd": [5, 1, 117, 64, 300], "equal": [96] * 4, "long": [1500, 33]}


def errors(attend, lengths, causal, width) -> list[float]:
    """Of output and gradients against fp64, the largest, relative to the largest value."""
    noise = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, width) for heads in (4, 2, 2)]
    seen = [torch.randn(s, generator=noise).to(GPU, HALF).requires_grad_() for s in shapes]
    wide = [x.detach().double().requires_grad_() for x in seen]
    spans = Spans.of(torch.tensor(lengths), GPU)
    scale = width**-0.5
    own = attend(*seen, spans, scale, causal)
    wanted = defined(*wide, spans.bounds_S1, scale, causal)
    grad = torch.randn(own.shape, generator=noise).to(GPU, HALF)
    own.backward(grad)
    wanted.backward(grad.double())
    pairs = [(own, wanted), *((a.grad, b.grad) for a, b in zip(seen, wide))]
    return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize("name", USABLE)
def test_as_exact_as_plain_torch_in_16_bits(name, width, lengths, causal) -> None:
    if name == "flex" and width == 80:
        width = 96  # its tiles are powers of two times 32
    own = errors(CARRIERS[name].attend, LENGTHS[lengths], causal, width)
    plain = errors(LOOPED["matmul"], LENGTHS[lengths], causal, width)
    assert all(a <= 2 * b + 1e-3 for a, b in zip(own, plain)), (own, plain)


def model_error(change, *, matching: bool) -> tuple[float, float]:
    """Relative error of the gradient in bf16 with a change, and of plain torch, against fp64."""
    found = []
    for dtype, apply in ((torch.float64, None), (HALF, change), (HALF, None)):
        made = {"carrier": "dense", "arithmetic": "sdpa"} if apply is None else apply[0]
        model = tiny_model(matching=matching, **made).to(GPU, dtype)
        if apply and apply[1]:
            apply[1](model)
        batch = make_batch(BATCHES["ragged"]).to(GPU)
        features = model.embed_images(batch.images)
        if matching:
            model.embeddings(batch, features).square()[:, :8].sum().backward()
        else:
            model.answer_loss(batch, features, "bottleneck")[0].backward()
        grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat(grads))
    exact, own, plain = found
    return float((own - exact).norm() / exact.norm()), float((plain - exact).norm() / exact.norm())


@pytest.mark.parametrize("matching", [True, False])
@pytest.mark.parametrize("name", USABLE)
def test_a_model_on_packed_sequences(name, matching) -> None:
    change = ({"carrier": "packed", "arithmetic": name}, None)
    own, plain = model_error(change, matching=matching)
    assert own <= 1.5 * plain + 1e-3, (own, plain)


@pytest.mark.parametrize("matching", [True, False] if not missing_liger(GPU, "bf16") else [])
def test_a_model_with_liger(matching) -> None:
    change = ({"carrier": "dense", "arithmetic": "sdpa"}, apply_liger)
    own, plain = model_error(change, matching=matching)
    assert own <= 1.5 * plain + 1e-3, (own, plain)
