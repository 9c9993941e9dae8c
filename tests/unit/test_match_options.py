"""What a recipe adds to InfoNCE: its way from the config and the rows of data to the loss.

That the loss is right under DeepSpeed at W = 1, 2, 4: tests/distributed/test_exact.py.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from coma_ds.config import MatchConfig, load_config, validate
from coma_ds.data.builtin import BuiltinPairs
from coma_ds.data.collate import Collator
from coma_ds.data.pairs import PairFile
from coma_ds.data.records import Pair, Side
from coma_ds.model.embedder import Temperature
from coma_ds.model.pooling import Pooling
from coma_ds.objectives.match import Match, all_widths
from coma_ds.report import describe_loss
from tests.definition import whole_loss
from tests.folders import base_folder, load
from tests.tiny import demo_processing, make_batch
from tests.unit.test_checks import config_of, look, refusal, write_pairs


def refused(section: str, **keys) -> str:
    with pytest.raises(ValueError) as caught:
        validate({"objective": "match", section: keys})
    return str(caught.value)


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"symmetric": True, "query_negatives": True}, "symmetric does not go with query_negat"),
        ({"symmetric": True, "target_negatives": True}, "symmetric does not go with target_nega"),
        ({"symmetric": True, "hard_negatives": "own"}, "not go with hard_negatives 'own'"),
        ({"matryoshka": [64, 32]}, "matryoshka [64, 32]: expected increasing widths"),
        ({"matryoshka": [32, 32]}, "matryoshka [32, 32]: expected increasing widths"),
        ({"matryoshka": [0, 32]}, "match.matryoshka.0: "),
        ({"matryoshka": [32], "matryoshka_weights": [1, 2]}, "expected one for each of the 1 wid"),
        ({"matryoshka": [32], "matryoshka_weights": [0]}, "match.matryoshka_weights.0: "),
        ({"task_temperature": {"vqa": 0}}, "match.task_temperature.vqa: "),
        ({"hardness": -1}, "match.hardness: "),
        ({"false_negative_margin": "nan"}, "match.false_negative_margin: "),
        ({"hard_negatives": "mine"}, "match.hard_negatives: "),
        ({"loss_dtype": "fp16"}, "match.loss_dtype: "),
    ],
)
def test_what_does_not_fit_is_refused(keys, said):
    assert said in refused("match", **keys)


def test_heads_belong_to_attention_pooling():
    assert "pooling_heads 4 has no effect with pooling 'mean'" in refused("model", pooling_heads=4)
    with pytest.raises(ValueError, match=r"model.pooling_heads 3 does not divide the width 64"):
        Pooling("attention", 64, 3)


def test_a_width_that_the_model_does_not_have(tmp_path):
    match = MatchConfig(matryoshka=(32, 65))
    with pytest.raises(ValueError, match=r"match.matryoshka \[32, 65\]: the embeddings have 64 nu"):
        load(base_folder(tmp_path), match=match)


class TestTasks:
    def test_each_reader_names_them(self, tmp_path):
        write_pairs(tmp_path, 3, row_1={"task": "colours"})
        reader = PairFile(tmp_path / "pairs.jsonl", tmp_path)
        assert [reader[i].task for i in range(3)] == ["pairs.jsonl", "colours", "pairs.jsonl"]
        assert BuiltinPairs(length=2)["i2t"][0].task == "i2t"

    def test_they_travel_in_the_batch(self):
        side = Side("words")
        pairs = [
            Pair(side, side, (side,) * count, task=task)
            for count, task in ((2, "a"), (0, "b"), (1, "a"))
        ]
        batch = Collator(demo_processing())(pairs)
        assert batch.pairs == 3 and len(batch) == 9
        assert batch.negative_counts_N.tolist() == [2, 0, 1]
        first, second, third = batch.task_ids_N.tolist()
        assert first == third != second

    def test_one_that_no_row_has(self, tmp_path):
        write_pairs(tmp_path, 8, row_1={"task": "colours"})
        config = config_of(tmp_path)

        def with_temperature_of(name):
            match = MatchConfig(task_temperature={name: 0.1})
            return config.model_copy(update={"match": match})

        look(with_temperature_of("colours"))
        said = refusal(with_temperature_of("colors"))
        assert said == (
            "match.task_temperature: no task 'colors' in the rows looked at, which have colours, "
            "pairs.jsonl"
        )

    def test_their_temperatures_are_learned_apart(self):
        temperature = Temperature(0.03, 0.1)
        assert temperature().tolist() == pytest.approx([0.03, 0.1])
        temperature.log_ratio.data.copy_(torch.tensor([0.0, 1.0]))
        assert temperature().tolist() == pytest.approx([0.03, 0.1 * 2.718281828])

    def test_a_run_learns_one_for_each(self, tmp_path):
        match = MatchConfig(learn_temperature=True, task_temperature={"a": 0.1, "b": 0.2})
        model, _ = load(base_folder(tmp_path), match=match)
        assert model.temperature().tolist() == pytest.approx([0.03, 0.1, 0.2])
        assert model.temperature.log_ratio.requires_grad

    def test_the_report_has_each(self):
        batch = make_batch([{"text": 2}] * 4, pairs=2, tasks=["a", "b"])
        emb = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
        _, report = Match(MatchConfig(task_temperature={"b": 0.5})).loss(emb, None, batch)
        assert report["temperature"] == pytest.approx(0.03)
        assert report["temperature/b"] == 0.5


OPTIONS = {
    "tasks": {"task_temperature": {"b": 0.1}},
    "margin": {"false_negative_margin": 0.05},
    "hardness": {"hardness": 2.0},
    "own": {"hard_negatives": "own"},
    "queries": {"query_negatives": True},
    "targets": {"target_negatives": True},
    "symmetric": {"symmetric": True},
    "widths": {"matryoshka": [4, 8]},
    "narrow widths": {"matryoshka": [2, 4]},  # and the full one, which is not listed
    "weighted narrow width": {"matryoshka": [4], "matryoshka_weights": [0.25]},
    "weighted widths": {"matryoshka": [4, 8], "matryoshka_weights": [0.25, 3.0]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_is_its_definition_and_changes_the_loss(name):
    batch = make_batch(
        [{"text": 2}] * 15, pairs=5, negative_counts=[2, 0, 1, 0, 2], tasks=list("ababa")
    )
    noise = torch.Generator().manual_seed(0)
    emb = torch.nn.functional.normalize(torch.randn(15, 8, generator=noise), dim=1)
    config = MatchConfig(temperature=0.3, **OPTIONS[name])
    found, report = Match(config).loss(emb, None, batch)
    assert float(found) == pytest.approx(float(whole_loss([emb], [batch], config, None)), rel=1e-5)
    assert report["loss"] == pytest.approx(float(found), rel=1e-6)
    plain, _ = Match(MatchConfig(temperature=0.3)).loss(emb, None, batch)
    assert abs(float(found) - float(plain)) > 1e-3


@pytest.mark.parametrize("same", [(10, 0), (12, 1), (13, 7), (14, 11)])
def test_what_equals_a_hard_negative_does_not_compete(same):
    """A negative (from 10 on) with the content of a query, of a target, of another negative."""
    batch = make_batch([{"text": 2}] * 15, pairs=5, negative_counts=[1] * 5, tasks=list("aaaaa"))
    ids_B = batch.content_ids_B.clone()
    ids_B[same[0]] = ids_B[same[1]]
    alike = replace(batch, content_ids_B=ids_B)
    noise = torch.Generator().manual_seed(1)
    emb = torch.nn.functional.normalize(torch.randn(15, 8, generator=noise), dim=1)
    config = MatchConfig(temperature=0.3)
    found, _ = Match(config).loss(emb, None, alike)
    assert float(found) == pytest.approx(float(whole_loss([emb], [alike], config, None)), rel=1e-6)
    plain, _ = Match(config).loss(emb, None, batch)
    changes = same[1] < 10  # two equal negatives are both negatives
    assert (abs(float(found) - float(plain)) > 1e-4) == changes


@pytest.mark.parametrize(
    ("given", "widths", "weights"),
    [
        ({"matryoshka": [4, 8]}, [4, 8], [1.0, 1.0]),
        ({"matryoshka": [4]}, [4, 8], [1.0, 1.0]),
        ({"matryoshka": [2, 4], "matryoshka_weights": [3, 0.5]}, [2, 4, 8], [3.0, 0.5, 1.0]),
        ({"matryoshka": [4, 8], "matryoshka_weights": [3, 0.5]}, [4, 8], [3.0, 0.5]),
    ],
)
def test_the_full_width_is_always_trained(given, widths, weights):
    assert all_widths(MatchConfig(**given), 8) == (widths, weights)


def test_rounded_embeddings_give_nearly_the_same_loss():
    batch = make_batch([{"text": 2}] * 40, pairs=20)
    emb = torch.nn.functional.normalize(torch.randn(40, 64), dim=1)
    exact, _ = Match(MatchConfig()).loss(emb, None, batch)
    rounded, _ = Match(MatchConfig(loss_dtype="bf16")).loss(emb, None, batch)
    assert 0 < abs(float(rounded - exact)) < 0.05 * float(exact)


def test_the_start_up_report_says_which_loss_and_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    match = MatchConfig(
        temperature=0.05,
        task_temperature={"vqa": 0.1},
        learn_temperature=True,
        hardness=9,
        false_negative_margin=-0.1,
        matryoshka=(64, 128),
        hard_negatives="own",
        query_negatives=True,
        loss_dtype="bf16",
    )
    assert describe_loss(match, torch.device("cpu")) == (
        "InfoNCE (torch: the tensors are on the CPU); temperature 0.05, vqa 0.1 (learned), "
        "queries as negatives, hard negatives of their own row alone, margin -0.1, hardness 9.0, "
        "widths [64, 128], rounded to bf16"
    )


def test_overrides_reach_the_options():
    config = load_config("demo-match", ["match.task_temperature={name_t2i: 0.05}"])
    assert config.match.task_temperature == {"name_t2i": 0.05}
    config = load_config("demo-match", ["match.matryoshka=[64, 128]", "match.symmetric=true"])
    assert config.match.matryoshka == (64, 128) and config.match.symmetric
    assert json.loads(config.model_dump_json())["match"]["matryoshka"] == [64, 128]
