"""The answer loss: chunks against the dense form, and never a logit too many."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coma_ds.config import CompressConfig
from coma_ds.model import answers
from coma_ds.model.answers import AnswerHead
from coma_ds.objectives.compress import Compress
from tests.memory import largest_tensor
from tests.tiny import VOCAB, make_batch, tiny_model

R, D, V = 11, 6, 37
# Rows of a chunk: all, one that divides nothing, one.
CHUNKS = [100, 4, 1]


def inputs(dtype=torch.float64):
    noise = torch.Generator().manual_seed(0)
    hidden = torch.randn(R, D, generator=noise, dtype=dtype)
    weight = torch.randn(V, D, generator=noise, dtype=dtype)
    labels = torch.randint(0, V, (R,), generator=noise)
    teacher = torch.randn(R, D, generator=noise, dtype=dtype)
    return hidden, weight, labels, teacher


def head(weight: torch.Tensor) -> AnswerHead:
    return AnswerHead(nn.Parameter(weight.clone()))


@pytest.fixture(params=CHUNKS)
def rows(request, monkeypatch) -> int:
    monkeypatch.setattr(answers, "MAX_LOGITS", request.param * V + V - 1)
    return request.param


def test_cross_entropy_equals_the_dense_form(rows) -> None:
    hidden, weight, labels, _ = inputs()
    states, wanted_states = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    chunked, table = head(weight), weight.clone().requires_grad_()
    total, right = chunked(states, labels)
    logits = wanted_states @ table.T
    wanted = F.cross_entropy(logits, labels, reduction="sum")
    assert total.dtype == torch.float64 and torch.allclose(total, wanted, atol=1e-12)
    assert right.item() == (logits.argmax(-1) == labels).sum().item()
    (total * 3).backward()
    (wanted * 3).backward()
    assert torch.allclose(states.grad, wanted_states.grad, atol=1e-12)
    assert torch.allclose(chunked.weight.grad, table.grad, atol=1e-12)


def test_kl_equals_the_dense_form(rows) -> None:
    """KL(teacher || student), with a gradient for the student alone."""
    hidden, weight, labels, teacher = inputs()
    states, wanted_states = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    teacher.requires_grad_()
    chunked, table = head(weight), weight.clone().requires_grad_()
    total, right = chunked(states, labels, teacher)
    student = (wanted_states @ table.T).log_softmax(-1)
    target = (teacher @ weight.T).softmax(-1).detach()
    wanted = F.kl_div(student, target, reduction="sum")
    assert torch.allclose(total, wanted, atol=1e-11) and total > 0
    assert right.item() == ((hidden @ weight.T).argmax(-1) == labels).sum().item()
    total.backward()
    wanted.backward()
    assert torch.allclose(states.grad, wanted_states.grad, atol=1e-11)
    assert torch.allclose(chunked.weight.grad, table.grad, atol=1e-11)
    assert teacher.grad is None


def test_kl_of_a_model_to_itself_is_zero(rows) -> None:
    hidden, weight, labels, _ = inputs()
    states = hidden.clone().requires_grad_()
    total, _ = head(weight)(states, labels, hidden)
    total.backward()
    assert abs(total.item()) < 1e-12 and states.grad.abs().max() < 1e-12


@pytest.mark.parametrize("kl", [False, True])
def test_no_rows_reach_every_parameter(kl) -> None:
    hidden, weight, labels, teacher = inputs()
    states = hidden[:0].clone().requires_grad_()
    chunked = head(weight)
    total, right = chunked(states, labels[:0], teacher[:0] if kl else None)
    total.backward()
    assert total.item() == 0 and right.item() == 0
    assert total.shape == right.shape == () and right.dtype == torch.float32
    assert chunked.weight.grad is not None and not chunked.weight.grad.any()
    assert states.grad is not None


@pytest.mark.parametrize("kl", [False, True])
def test_low_precision_logits_are_reduced_in_float32(kl) -> None:
    hidden, weight, labels, teacher = (
        x.bfloat16() if x.is_floating_point() else x for x in inputs()
    )
    total, right = head(weight)(hidden, labels, teacher if kl else None)
    logits = F.linear(hidden, weight).float()
    if kl:
        target = F.linear(teacher, weight).float().softmax(-1)
        wanted = F.kl_div(logits.log_softmax(-1), target, reduction="sum")
    else:
        wanted = F.cross_entropy(logits, labels, reduction="sum")
    assert total.dtype == right.dtype == torch.float32
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("limit", [2, 5])
def test_no_more_logits_than_a_chunk(kl, limit, monkeypatch) -> None:
    """Every tensor of forward and backward is watched."""
    wide, count, width = 4096, 64, 4
    monkeypatch.setattr(answers, "MAX_LOGITS", limit * wide)
    weight = torch.randn(wide, width)
    hidden, labels = torch.randn(count, width, requires_grad=True), torch.zeros(count).long()
    teacher = torch.randn(count, width) if kl else None
    chunked = head(weight)
    seen = largest_tensor(lambda: chunked(hidden, labels, teacher)[0].backward())
    assert wide * width <= seen <= max(limit, width) * wide
    # and none of the chunks' logits are kept for the backward
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        chunked(hidden, labels, teacher)
    assert max(kept) <= max(wide * width, count * width)


def test_the_real_limit_is_a_quarter_gigabyte() -> None:
    assert 2**20 <= answers.MAX_LOGITS * 4 <= 2**28


def test_predict_is_the_most_likely_token() -> None:
    hidden, weight, _, _ = inputs()
    found = head(weight).predict(hidden)
    assert torch.equal(found, (hidden @ weight.T).argmax(-1))
    assert found.dtype == torch.int64 and not found.requires_grad
    few = head(weight).predict(hidden, 9)
    assert torch.equal(few, (hidden @ weight[:9].T).argmax(-1)) and (found >= 9).any()


SAMPLES = [
    {"images": [(2, 2)], "text": 2, "dialogue": 9, "answers": [(2, 4), (6, 9)]},
    {"images": [(2, 3)], "dialogue": 7, "answers": [(3, 4)]},
    {"images": [(2, 2)], "dialogue": 5},
]


@pytest.mark.parametrize("visible", [False, True])
def test_the_row_before_predicts_the_answer(visible) -> None:
    """The whole stage-1 loss from all logits of the sequence: nothing shifted, nothing missed."""
    model = tiny_model(matching=False)
    batch = make_batch(SAMPLES)
    objective = Compress(CompressConfig(visible=visible))
    features = model.embed_images(batch.images)
    total, report = objective.loss(model, batch, features)
    rows = torch.arange(len(batch.input_ids_T))
    rule = "causal" if visible else "bottleneck"
    states = model.backbone.hidden_states(batch, features, rows, rule)
    logits = model.backbone.lm.lm_head(states).split(batch.sizes_B.tolist())
    labels = batch.labels_T.split(batch.sizes_B.tolist())
    shifted, targets = [
        torch.cat([x[a:b] for x in xs])
        for xs, a, b in (
            (logits, None, -1),
            (labels, 1, None),
        )
    ]
    wanted = F.cross_entropy(shifted, targets, ignore_index=-100, reduction="sum")
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert report["loss"].item() == total.item() and not report["loss"].requires_grad
    hits = (shifted.argmax(-1) == targets).sum()
    assert report["answer_accuracy"].item() == hits.item()
    assert objective.weight(batch) == 6 == (targets != -100).sum().item()


def test_a_part_without_answers_still_runs() -> None:
    model = tiny_model(matching=False)
    batch = make_batch(SAMPLES).split([torch.tensor([2])], with_images=True)[0]
    total, report = Compress(CompressConfig()).loss(model, batch, model.embed_images(batch.images))
    total.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert total.item() == 0 and report["answer_accuracy"].item() == 0
    touched = {n for n, p in trained.items() if p.grad is not None}
    assert touched == set(trained) and not any(p.grad.any() for p in trained.values())


def test_kl_learns_from_the_base_that_sees_the_image() -> None:
    """The teacher is the model without adapters, without dropout, with the image in sight."""
    model = tiny_model(matching=False, adapter="lora").train()
    batch = make_batch(SAMPLES)
    features = model.embed_images(batch.images)
    with torch.no_grad():
        teacher = model.teacher_states(batch, features)
        again = model.teacher_states(batch, features)
    assert model.training and torch.equal(teacher, again)  # dropout is off, and back on after it
    bare = tiny_model(matching=False)
    bare.tokens.weight.data.copy_(model.tokens.weight)
    rows = batch.answer_rows - 1
    wanted = bare.backbone.hidden_states(batch, features, rows, "causal")
    assert torch.allclose(teacher, wanted, atol=1e-6)
    model.eval()
    total, report = Compress(CompressConfig(loss="kl")).loss(model, batch, features)
    student = model.backbone.hidden_states(batch, features, rows, "bottleneck")
    head_of = model.backbone.lm.lm_head
    kl = F.kl_div(head_of(student).log_softmax(-1), head_of(wanted).softmax(-1), reduction="sum")
    assert total.item() == pytest.approx(kl.item(), rel=1e-4)
    assert total.item() > 0 and report["loss"].item() == total.item()
    total.backward()
    assert (model.tokens.weight.grad != 0).any()


def test_the_head_shares_the_matrix_of_the_model() -> None:
    model = tiny_model(matching=False)
    assert model.answers.weight is model.backbone.lm.lm_head.weight
    assert model.answers.weight is model.backbone.lm.get_input_embeddings().weight
    names = [n for n, p in model.named_parameters() if len(p) == VOCAB]
    assert len(names) == 1
