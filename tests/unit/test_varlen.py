"""Attention over packed spans: every implementation is softmax(QK')V inside each span."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from coma_ds.config import ModelConfig, RunConfig
from coma_ds.model import varlen
from coma_ds.model.loading import choose_attention
from coma_ds.model.varlen import ARITHMETIC, CARRIERS, LOOPED, Spans, best_carrier
from coma_ds.report import describe_arithmetic
from tests.standins import (
    defined,
    flash_attn_4_package,
    flash_attn_package,
    install,
    torch_varlen,
)
from tests.tiny import make_batch, tiny_model
from tests.unit.test_visibility import BATCHES, assert_equal, results

ALL = (torch.float64, torch.float32, torch.bfloat16)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
LENGTHS = {"odd": [5, 1, 17, 8], "equal": [6, 6, 6], "one": [9], "with none": [3, 0, 4]}
STANDINS = {
    "flash_attn": lambda p, **k: install(p, flash_attn_package(**k)),
    "flash_attn_4": lambda p, **k: install(p, flash_attn_4_package(**k)),
    **{
        f"varlen {release}": lambda p, release=release, **k: p.setattr(
            "torch.nn.attention.varlen.varlen_attn", torch_varlen(release, **k)
        )
        for release in ("2.10", "2.11", "2.13")
    },
}


def rows(lengths: list[int], dtype=torch.float64, seed: int = 0, width: int = 8):
    """Queries of 4 heads, keys and values of 2, and the spans."""
    noise = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    made = [torch.randn(total, h, width, generator=noise, dtype=torch.float64) for h in (4, 2, 2)]
    return [x.to(dtype).requires_grad_() for x in made], Spans.of(torch.tensor(lengths), CPU)


def both(attend, lengths, causal, dtype=torch.float64):
    """Output and the three gradients, of ``attend`` and of the definition."""
    found = []
    for call in (attend, lambda q, k, v, s, *more: defined(q, k, v, s.bounds_S1, *more)):
        seen, spans = rows(lengths, dtype)
        out = call(*seen, spans, 0.3, causal)
        weight = torch.arange(out.numel(), dtype=out.dtype).view_as(out) / out.numel()
        (out * weight).sum().backward()
        found.append([out.detach(), *(x.grad for x in seen)])
    return zip(*found)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_the_loop_is_the_definition(arithmetic, name, causal) -> None:
    for own, wanted in both(LOOPED[arithmetic], LENGTHS[name], causal):
        assert (own - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", [n for n in LENGTHS if n != "with none"])
@pytest.mark.parametrize("package", STANDINS)
def test_a_package_is_called_as_it_wants_to_be(package, name, causal, monkeypatch) -> None:
    """Against stand-ins that hold the packages to their contracts."""
    STANDINS[package](monkeypatch, dtypes=ALL)
    for own, wanted in both(CARRIERS[package.split()[0]].attend, LENGTHS[name], causal):
        assert (own - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("package", STANDINS)
def test_rows_that_autocast_left_in_fp32_follow_the_values(package, monkeypatch) -> None:
    STANDINS[package](monkeypatch)
    (query, key, value), spans = rows([5, 3])
    attend = CARRIERS[package.split()[0]].attend
    out = attend(query.float(), key.float(), value.bfloat16(), spans, 0.3, True)
    assert out.dtype == torch.bfloat16


def test_this_torch_takes_what_it_is_given(monkeypatch) -> None:
    """The real signature; it has no CPU path to run."""
    real = inspect.signature(varlen_attn)
    seen = []

    def bound(*args, **kwargs):
        seen.append(real.bind(*args, **kwargs).arguments)
        return args[0]

    bound.__signature__ = real
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", bound)
    (query, key, value), spans = rows([5, 3], torch.bfloat16)
    varlen.varlen(query, key, value, spans, 0.3, True)
    assert seen[0]["window_size"] == (-1, 0) and seen[0]["scale"] == 0.3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", LENGTHS)
def test_flex_is_the_definition(name, causal) -> None:
    """Its forward alone: torch has no backward of it on a CPU."""
    seen, spans = rows(LENGTHS[name], torch.float32, width=16)
    with torch.no_grad():
        own = varlen.flex(*seen, spans, 0.3, causal)
        wanted = defined(*seen, spans.bounds_S1, 0.3, causal)
    assert (own - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_model_on_flash_attention_is_the_dense_one(family, name, monkeypatch) -> None:
    """Both stages, output and every gradient, the tower's too, through the stand-in in fp64."""
    STANDINS["flash_attn"](monkeypatch, dtypes=ALL)
    found = []
    for carrier, arithmetic in (("dense", "sdpa"), ("packed", "flash_attn")):
        made = {"carrier": carrier, "arithmetic": arithmetic, "train_vision": True}
        model = tiny_model(family, matching=False, **made).double()
        found.append(results(model, make_batch(BATCHES[name], family), "bottleneck"))
    assert_equal(found[1], found[0])


def test_one_call_a_layer_and_none_that_is_dense(monkeypatch) -> None:
    """Two segments a dialogue in one call; the tower's calls see its windows."""
    calls = []
    attend = CARRIERS["flash_attn"].attend

    def counted(query, key, value, spans, scale, causal):
        calls.append((causal, spans.bounds_S1.diff().tolist()))
        return attend(query, key, value, spans, scale, causal)

    STANDINS["flash_attn"](monkeypatch, dtypes=ALL)
    monkeypatch.setitem(
        CARRIERS, "flash_attn", varlen.Carrier(counted, "flash_attn.flash_attn_interface", "")
    )
    batch = make_batch(BATCHES["ragged"])
    model = tiny_model(matching=False, carrier="packed", arithmetic="flash_attn")
    features = model.embed_images(batch.images)
    layers = len(model.backbone.visual.blocks)
    assert len(calls) == layers and not any(causal for causal, _ in calls)
    calls.clear()
    model.answer_loss(batch, features, "bottleneck")
    spans = []
    for context, tokens, dialogue in batch.lengths_B3.tolist():
        spans += [context + tokens, tokens + dialogue]
    assert calls == [(True, spans)] * len(model.backbone.text.layers)
    calls.clear()
    model.embeddings(batch, features)
    assert calls == [(True, batch.sizes_B.tolist())] * len(model.backbone.text.layers)


def test_auto_takes_the_first_that_is_there(monkeypatch) -> None:
    half = torch.bfloat16
    name, lacks = best_carrier(GPU, half)
    assert name == "varlen" and "flash-attn 2: not installed" in lacks
    assert best_carrier(GPU, torch.float32)[0] == "flex"
    assert best_carrier(CPU, half)[0] == ""
    STANDINS["flash_attn_4"](monkeypatch)
    assert best_carrier(GPU, half)[0] == "flash_attn_4"
    STANDINS["flash_attn"](monkeypatch)
    assert best_carrier(GPU, half) == ("flash_attn", "")
    assert choose_attention(ModelConfig(), GPU, half) == ("packed", "flash_attn")
    assert choose_attention(ModelConfig(attention="dense"), GPU, half) == ("dense", "sdpa")
    assert choose_attention(ModelConfig(), CPU, half) == ("split", "matmul")
    asked = ModelConfig(arithmetic="varlen")
    assert choose_attention(asked, GPU, half) == ("packed", "varlen")
    with pytest.raises(ValueError, match=r"'varlen' .* cannot be used: it needs a GPU"):
        choose_attention(asked, CPU, half)
    with pytest.raises(ValueError, match="16 bits only"):
        choose_attention(asked, GPU, torch.float32)


def test_a_package_that_does_not_load_is_said(monkeypatch, tmp_path) -> None:
    """Built for another torch: its import fails, and the next one is taken."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn/__init__.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    name, lacks = best_carrier(GPU, torch.bfloat16)
    assert name == "varlen" and "flash_attn does not load (undefined symbol)" in lacks


def test_the_report_says_what_and_why(monkeypatch) -> None:
    assert describe_arithmetic("matmul", "fp32", CPU).startswith("matmul: faster")
    said = describe_arithmetic("varlen", "bf16", GPU)
    assert said.startswith("torch's varlen_attn (flash-attn 2: not installed; flash-attn 4")
    assert describe_arithmetic("flex", "bf16", GPU) == "FlexAttention, compiled"  # asked for


@pytest.mark.parametrize("arrangement", ["split", "dense"])
def test_names_that_do_not_go_together(arrangement) -> None:
    tree = {"model": {"attention": arrangement, "arithmetic": "flex"}}
    with pytest.raises(ValueError, match="works on packed sequences"):
        RunConfig.model_validate(tree)
