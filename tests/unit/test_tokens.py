"""Compression tokens: their rows, the hooks that put them in, and who gets a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coma_ds.config import FAMILIES
from coma_ds.model.tokens import CompressionTokens
from tests.tiny import FIRST_ID, VOCAB, K, make_batch, tiny_model


def table(rows: int = 20, width: int = 6, first_id: int = 30, count: int = 3):
    embedding = nn.Embedding(rows, width).double()
    tokens = CompressionTokens(count, width, first_id).double()
    tokens.initialise(embedding.weight)
    tokens.attach(embedding)
    return embedding, tokens


def test_rows_stand_where_their_ids_are() -> None:
    embedding, tokens = table()
    ids = torch.tensor([[1, 30, 31, 32, 4], [32, 30, 0, 31, 19]])
    out = embedding(ids)
    for place in ids.nonzero().tolist() + [[1, 2]]:
        number = int(ids[*place])
        wanted = tokens.weight[number - 30] if number >= 30 else embedding.weight[number]
        assert torch.equal(out[*place], wanted)


@pytest.mark.parametrize("first_id", [8, 17, 20, 1000])
def test_ids_may_lie_inside_the_table_or_beyond_it(first_id) -> None:
    embedding, tokens = table(first_id=first_id)
    ids = torch.arange(first_id, first_id + 3)
    assert torch.equal(embedding(ids), tokens.weight)
    before = torch.tensor([first_id - 1]) if first_id <= 20 else torch.tensor([19])
    assert torch.equal(embedding(before)[0], embedding.weight[before[0]])


def test_the_id_after_the_last_is_not_a_token() -> None:
    embedding, _ = table(first_id=10)
    assert torch.equal(embedding(torch.tensor([13])), embedding.weight[13:14])
    far, _ = table()
    with pytest.raises(IndexError):
        far(torch.tensor([33]))


def test_only_the_rows_get_a_gradient_at_their_places() -> None:
    embedding, tokens = table()
    ids = torch.tensor([30, 7, 31, 7])
    scale = torch.tensor([2.0, 3.0, 5.0, 7.0])[:, None]
    (embedding(ids) * scale).sum().backward()
    assert tokens.weight.grad[:, 0].tolist() == [2.0, 5.0, 0.0]
    wanted = torch.zeros(20)
    wanted[7] = 10.0
    assert torch.equal(embedding.weight.grad[:, 0].float(), wanted)  # row 0, looked up, has none


def test_replaced_by_writes_the_states_in_the_order_of_the_sequence() -> None:
    embedding, tokens = table()
    ids = torch.tensor([[1, 30, 31, 32], [30, 31, 32, 5]])
    states = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    with tokens.replaced_by(states):
        out = embedding(ids)
    assert torch.equal(torch.cat([out[0, 1:], out[1, :3]]), states)
    assert torch.equal(out[0, 0], embedding.weight[1])
    out.sum().backward()
    assert torch.equal(states.grad, torch.ones_like(states)) and tokens.weight.grad is None
    assert torch.equal(embedding(ids)[0, 1:], tokens.weight)  # over, also after an error:
    with pytest.raises(RuntimeError), tokens.replaced_by(states):
        raise RuntimeError
    assert torch.equal(embedding(ids)[0, 1:], tokens.weight)


def test_rows_have_the_dtype_of_the_embedding() -> None:
    embedding = nn.Embedding(20, 6).bfloat16()
    tokens = CompressionTokens(3, 6, 30)
    tokens.initialise(embedding.weight)
    tokens.attach(embedding)
    assert embedding(torch.tensor([30, 1])).dtype == torch.bfloat16


def test_rows_start_from_the_statistics_of_the_table() -> None:
    noise = torch.Generator().manual_seed(3)
    mean, deviation = torch.tensor([5.0, -2.0, 0.0, 1.0]), torch.tensor([0.1, 2.0, 1.0, 0.5])
    words = mean + deviation * torch.randn(5000, 4, generator=noise)
    tokens = CompressionTokens(3000, 4, 0)
    tokens.initialise(words, seed=1)
    rows = tokens.weight.detach()
    assert torch.allclose(rows.mean(0), mean, atol=0.1)
    assert torch.allclose(rows.std(0), 0.5 * deviation, rtol=0.1)
    again, other = CompressionTokens(3000, 4, 0), CompressionTokens(3000, 4, 0)
    again.initialise(words, seed=1)
    other.initialise(words, seed=2)
    assert torch.equal(again.weight, tokens.weight)
    assert not torch.equal(other.weight, tokens.weight)
    assert len(rows.unique(dim=0)) == 3000
    wide = CompressionTokens(8, 4, 0)
    wide.initialise(words, spread=0.0)
    assert torch.allclose(wide.weight, words.mean(0).expand(8, -1))


def test_initialising_leaves_the_global_random_state() -> None:
    state = torch.get_rng_state()
    CompressionTokens(2, 4, 0).initialise(torch.randn(9, 4, generator=torch.Generator()), seed=4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("count", [0, -1])
def test_no_token_is_an_error(count) -> None:
    with pytest.raises(ValueError, match=f"{count} compression tokens: at least 1 is needed"):
        CompressionTokens(count, 4, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_adapters_the_table_learns_nothing(family) -> None:
    """Only the K rows and the adapters have a gradient: not the table, not 32 rows of it."""
    model = tiny_model(family, matching=False, adapter="lora")
    samples = [{"images": [(2, 2)], "text": 2, "dialogue": 6, "answers": [(2, 5)]}] * 2
    batch = make_batch(samples, family)
    with torch.no_grad():
        features = model.embed_images(batch.images)
    model.answer_loss(batch, features, "bottleneck")[0].backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    assert "tokens.weight" in got
    assert {n for n in got if "lora_" not in n} == {"tokens.weight"}
    assert (model.tokens.weight.grad != 0).any(-1).all()
    assert len(model.backbone.lm.get_input_embeddings().weight) == VOCAB < FIRST_ID


def test_tokens_in_the_model_change_every_token_and_only_by_their_rows() -> None:
    model = tiny_model()
    batch = make_batch([{"text": 4}, {"text": 2}])
    rows = torch.arange(len(batch.input_ids_T))
    before = model.backbone.hidden_states(batch, None, rows)
    with torch.no_grad():
        model.tokens.weight[1] += 1.0
    after = model.backbone.hidden_states(batch, None, rows)
    changed = (before != after).any(-1)
    first = batch.token_rows.view(2, K)
    wanted = torch.zeros(len(rows), dtype=torch.bool)
    wanted[first[:, 1:].flatten()] = True  # the second row, and what stands after it
    assert torch.equal(changed, wanted)
