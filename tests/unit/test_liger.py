"""Liger's kernels in the stock modules: the same model, through stand-ins for the kernels."""

from __future__ import annotations

import importlib

import pytest
import torch

from coma_ds.config import FAMILIES, RunConfig
from coma_ds.model import liger
from coma_ds.model.liger import apply_liger, missing_liger
from tests.distributed.cases import LORA, UNTIED
from tests.standins import install, liger_package
from tests.tiny import make_batch, tiny_model
from tests.unit.test_visibility import BATCHES, assert_equal, results

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def package(monkeypatch):
    modules = liger_package()
    install(monkeypatch, modules)
    return modules["liger_kernel.transformers"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{"train_vision": True}, LORA, UNTIED], ids=str)
def test_the_model_is_the_same(family, settings, package) -> None:
    """Loss, right answers, states, embeddings and every gradient, in fp64; every kernel ran."""
    batch, found = make_batch(BATCHES["ragged"], family), []
    for fused in (False, True):
        model = tiny_model(family, matching=False, **settings).double().eval()
        applied = apply_liger(model) if fused else None
        found.append(results(model, batch, "bottleneck"))
    assert_equal(found[1], found[0])
    layers = len(model.backbone.text.layers)
    qwen3 = family == "qwen3_vl"
    norms = layers * (4 if qwen3 else 2) + 1
    assert applied.counts["RoPE"] == layers and applied.counts["cross-entropy"] == 1
    blocks = len(model.backbone.visual.blocks) if family == "qwen2_5_vl" else 0
    extra = 2 * blocks + 1 if blocks else 0  # its tower has norms and gated layers of that form
    assert applied.counts["RMSNorm"] == norms + extra
    assert applied.counts["SwiGLU"] == layers + blocks
    assert not applied.lacks
    calls = package.calls
    assert calls["loss"] == 1 and calls["rope"] == 3 * layers  # three passes
    assert calls["norm"] == 3 * norms + extra and calls["mlp"] == 3 * layers + blocks


def test_classes_and_modules_of_transformers_stay_as_they_are(package) -> None:
    name = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
    modeling = importlib.import_module(name)
    before = dict(vars(modeling))
    forward = modeling.Qwen2_5_VLAttention.forward
    apply_liger(tiny_model(matching=False))
    assert before == dict(vars(modeling)) and modeling.Qwen2_5_VLAttention.forward is forward
    batch = make_batch(BATCHES["ragged"])
    tiny_model(matching=False).embeddings(batch, torch.zeros(1, 60, 64))
    assert package.calls["rope"] == 0  # another model


def test_what_does_not_apply_is_said(package, monkeypatch) -> None:
    monkeypatch.setattr(liger, "ROTATION", "apply_some_other_rotation")
    model = tiny_model(matching=False)
    for layer in model.backbone.text.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    for block in model.backbone.visual.blocks:
        block.mlp.act_fn = torch.nn.GELU()
    said = str(apply_liger(model))
    assert "RoPE: this transformers release does not call apply_some_other_rotation" in said
    assert "SwiGLU: no module of that form" in said and "RMSNorm" in said.split("(")[0]


def test_where_they_can_be_used(monkeypatch) -> None:
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    assert missing_liger(GPU, "bf16") == "liger-kernel is not installed"
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: object())
    assert missing_liger(GPU, "bf16") == missing_liger(GPU, "fp32") == ""
    assert missing_liger(CPU, "bf16") == "they need a GPU"
    assert missing_liger(GPU, "autocast").startswith("autocast")


def test_the_key() -> None:
    with pytest.raises(ValueError, match="liger"):
        RunConfig.model_validate({"model": {"liger": "perhaps"}})
    assert RunConfig().model.liger == "auto"
