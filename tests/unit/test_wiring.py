"""Every key of the config reaches what it is for, by the functions that build a real run.

``test_wiring_run.py`` goes on with what happens while it runs.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from coma_ds import assemble, assessment
from coma_ds.config import load_config
from coma_ds.data.builtin import BuiltinDialogues, BuiltinPairs
from coma_ds.data.records import RankingTask, Side
from coma_ds.data.sampler import BatchOrder
from coma_ds.model.adapters import adapter_layers
from tests.folders import base_folder, mmeb_folder
from tests.tiny import Flat

CPU = torch.device("cpu")


def config_of(*overrides: str):
    return load_config(None, list(overrides))


def sources(*overrides: str):
    return assemble.build_sources(config_of(*overrides))


def targets(reader) -> list[str]:
    return [reader[row].target.text for row in range(len(reader))]


@cache
def model_folder(kept: Path) -> str:
    return str(base_folder(kept))


@pytest.fixture
def folder(tmp_path_factory) -> str:
    """A model, the same for all tests."""
    return model_folder(tmp_path_factory.getbasetemp() / "wiring")


class TestMMEB:
    @pytest.fixture
    def keys(self, tmp_path) -> list[str]:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            for split, texts in (("original", ["a", "", "c", "d"]), ("diverse", ["e", "f"])):
                columns = {
                    "qry": ["say"] * len(texts),
                    "qry_image_path": ["p.png"] * len(texts),
                    "pos_text": [name[0] + text if text else "" for text in texts],
                    "pos_image_path": [""] * len(texts),
                }
                table = pa.table(columns)
                pq.write_table(table, tmp_path / name / f"{split}-00000-of-00001.parquet")
        keys = [f"data.root={tmp_path}", "data.image_root=/pictures", "data.sources=[two]"]
        return ["objective=match", "data.format=mmeb", *keys]

    @pytest.mark.parametrize(
        ("more", "found"),
        [
            (["data.leave_out_empty=true"], ["ta", "tc", "td"]),
            (["data.leave_out_empty=true", "data.limit=3"], ["ta", "tc"]),
            (["data.limit=1"], ["ta"]),
            (["data.split=diverse"], ["te", "tf"]),
        ],
    )
    def test_rows(self, keys, more, found):
        (reader,) = sources(*keys, *more).values()
        assert targets(reader) == found
        assert reader[0].query.images[0].name == "/pictures/p.png"

    def test_sources(self, keys):
        found = sources(*keys, "data.limit=1", "data.sources=[two, one]")
        assert [(n, targets(r)) for n, r in found.items()] == [("two", ["ta"]), ("one", ["oa"])]
        with pytest.raises(ValueError, match="empty target"):
            sources(*keys)


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ([], ["a", "b", "c"]),
        (["data.min_score=0.5"], ["b", "c"]),
        (["data.limit=2"], ["a", "b"]),
        (["data.min_score=0.5", "data.limit=1"], ["b"]),
    ],
)
def test_pairs(tmp_path, more, found):
    rows = [
        {"question": f"q{text}", "query_image": "p.png", "target": text, "score": score}
        for text, score in (("a", 0.1), ("b", 0.6), ("c", 0.9))
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    keys = ["objective=match", "data.format=pairs", f"data.path={path}", "data.image_root=/where"]
    (reader,) = sources(*keys, "data.columns={query: question}", *more).values()
    assert targets(reader) == found
    assert reader[0].query.text.endswith(f"q{found[0]}")
    assert reader[0].query.images[0].name == "/where/p.png"


def write_dialogues(path: Path) -> None:
    turns = [{"from": who, "value": f"{who} {n}"} for n in range(9) for who in ("human", "gpt")]
    rows = [{"image": f"{row}.png", "conversations": turns} for row in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)))


def test_dialogues(tmp_path):
    path = tmp_path / "dialogues.jsonl"
    write_dialogues(path)
    keys = ["data.format=dialogues", f"data.path={path}", "data.image_root=/where"]

    def read(*more):
        (reader,) = sources(*keys, *more).values()
        return [reader[row] for row in range(len(reader))]

    assert [(d.images[0].name, len(d.turns)) for d in read("data.limit=2")] == [
        ("/where/0.png", 9),
        ("/where/1.png", 9),
    ]
    assert len(read()) == 6
    one, two = (read("compress.format=single_turn", f"seed={seed}") for seed in (1, 2))
    assert {len(d.turns) for d in one + two} == {1}
    assert [d.turns for d in one] != [d.turns for d in two]
    with pytest.raises(ValueError, match="'caption' is made by the built-in data only"):
        read("compress.format=caption")


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("compress.format=single_turn", {"format": "single_turn"}),
        ("compress.format=description", {"format": "description"}),
        ("compress.format=caption", {"format": "caption"}),
        ("data.turns=[2, 2]", {"turns": (2, 2)}),
        ("seed=3", {"seed": 3}),
    ],
)
def test_built_in_dialogues(override, same):
    found, plain = sources(override)["dialogues"], sources()["dialogues"]
    wanted = BuiltinDialogues(**same)
    assert [found[row].turns for row in range(9)] == [wanted[row].turns for row in range(9)]
    assert [found[row].turns for row in range(9)] != [plain[row].turns for row in range(9)]


def test_built_in_pairs():
    keys = ["objective=match", "data.sources=[i2t, name_t2i]", "data.length=50", "seed=3"]
    found = sources(*keys)
    assert {name: len(reader) for name, reader in found.items()} == {"i2t": 50, "name_t2i": 50}
    for seed in (0, 3):
        wanted = BuiltinPairs(seed=seed, length=50)["i2t"]
        same = [found["i2t"][row].query == wanted[row].query for row in range(9)]
        assert all(same) if seed == 3 else not all(same)
    assert list(sources("objective=match")) == list(BuiltinPairs().source_names)
    assert len(sources("data.length=50")["dialogues"]) == 50


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("optim.batch_size=4", {"batch_size": 4}),
        ("data.sub_batch=4", {"sub_batch_size": 4}),
        ("data.weighting=proportional", {"weighting": "proportional"}),
        ("seed=3", {"seed": 3}),
    ],
)
def test_order(monkeypatch, override, same):
    readers = {"few": range(40), "many": range(300)}
    monkeypatch.setattr(assemble, "build_sources", lambda _: readers)
    sizes = {"few": 40, "many": 300}
    config = config_of("optim.batch_size=8", override)
    order = assemble.build_data(config, None).order
    wanted = BatchOrder(sizes, **{"batch_size": 8} | same)
    assert order.global_batch(2) == wanted.global_batch(2) != BatchOrder(sizes, 8).global_batch(2)


@pytest.mark.parametrize("workers", [0, 3])
def test_workers(monkeypatch, workers):
    seen = []
    monkeypatch.setattr(assemble, "DataLoader", lambda *_, **how: seen.append(how) or [])
    data = assemble.build_data(config_of(f"data.workers={workers}"), None)
    assert list(data.batches(0, 1)) == [] and seen[0]["num_workers"] == workers
    assert seen[0]["prefetch_factor"] == (2 if workers else None)


def test_processing(folder):
    def image_tokens(processing, side: int) -> int:
        return processing.pixels(Flat("one", size=(side, side)))[1][1:]

    path, size = f"model.path={folder}", ["model.compression_tokens=3", "model.max_length=300"]
    source, plain = assemble.build_processing(config_of(path, *size))
    assert source == folder and image_tokens(plain, 256) == image_tokens(plain, 16) == (8, 8)
    assert len(plain.compression_ids) == 3 and plain.max_length == 300
    limits = ["model.min_vision_tokens=4", "model.max_vision_tokens=64"]
    _, limited = assemble.build_processing(config_of(path, *limits))
    assert image_tokens(limited, 256) == (16, 16) and image_tokens(limited, 16) == (4, 4)
    assert limited.max_vision_tokens == 64
    source, _ = assemble.build_processing(config_of("model.path=./none", f"init_from={folder}"))
    assert source == folder


@pytest.fixture
def built(monkeypatch, folder):
    """The model and optimizer that ``build_engine`` would wrap."""
    monkeypatch.setattr(assemble, "Engine", lambda *parts: SimpleNamespace(parts=parts))

    def build(*overrides: str):
        base = [f"model.path={folder}", "deepspeed=zero2", "precision=fp32"]
        config = config_of(*base, "model.compression_tokens=4", *overrides)
        source, processing = assemble.build_processing(config)
        model, optimizer, seen, device = assemble.build_engine(
            config, source, processing, CPU
        ).parts
        assert (seen, device) == (config, CPU)
        return model, optimizer

    return build


MODEL = {
    "model.compression_tokens=3": lambda m: len(m.tokens.weight) == 3,
    "model.bottleneck=last_hidden": lambda m: m.bottleneck == "last_hidden",
    "model.pooling=last": lambda m: m.pooling.kind == "last",
    "model.pooling=attention": lambda m: m.pooling.kind == "attention",
    "model.attention=dense": lambda m: m.backbone.carrier == "dense",
    "model.attention=packed": lambda m: m.backbone.carrier == "packed",
    "model.arithmetic=sdpa": lambda m: m.backbone.arithmetic == "sdpa",
    "model.train_vision=true": lambda m: m.vision_is_trained,
    "model.gradient_checkpointing=true": lambda m: m.backbone.lm.is_gradient_checkpointing,
    "precision=bf16": lambda m: {p.dtype for p in m.parameters()} == {torch.bfloat16},
    "precision=autocast": lambda m: m.autocast and m.tokens.weight.dtype == torch.float32,
}


def test_plain_model(built):
    """What the overrides of ``MODEL`` change is not there without them."""
    model, _ = built()
    told = [override for override, holds in MODEL.items() if holds(model)]
    assert told == [] and model.temperature is None
    assert (model.backbone.carrier, model.backbone.arithmetic) == ("split", "matmul")
    assert (model.bottleneck, model.pooling.kind) == ("kv", "mean")
    assert not adapter_layers(model) and not model.autocast


@pytest.mark.parametrize("override", MODEL)
def test_model(built, override):
    assert MODEL[override](built(override)[0])


def test_liger_cannot_be_used_here(built):
    with pytest.raises(ValueError, match=r"model\.liger is true, but Liger's kernels cannot be"):
        built("model.liger=true")
    assert built("model.liger=false")[0].kernels == ""


def test_adapter(built):
    lora = "model.lora={rank: 3, alpha: 5, dropout: 0.25, targets: [up_proj]}"
    for kind in ("lora", "dora"):
        model, _ = built(f"model.adapter={kind}", lora)
        layers = adapter_layers(model)
        assert len(layers) == 2 and all(name.endswith("up_proj") for name in layers)
        for layer in layers.values():
            assert (layer.r["default"], layer.lora_alpha["default"]) == (3, 5)
            assert layer.lora_dropout["default"].p == 0.25
            assert bool(layer.lora_magnitude_vector) == (kind == "dora")


def test_temperature(built):
    keys = ["objective=match", "match.temperature=0.07"]
    assert built(*keys)[0].temperature is None
    learned = built(*keys, "match.learn_temperature=true")[0].temperature
    assert learned().item() == pytest.approx(0.07) and learned.log_ratio.requires_grad
    assert built("match.learn_temperature=true")[0].temperature is None  # of stage 2 only


def test_stage(built):
    for objective in ("compress", "match"):
        model, _ = built("model.pooling=attention", f"objective={objective}")
        assert model.pooling.query.requires_grad == (objective == "match")


def test_start(built):
    """Where the weights and the token rows come from."""

    def start(*keys):
        model = built(*keys)[0]
        return model.tokens.weight, model.backbone.text.layers[0].mlp.up_proj.weight

    (rows, stored), (other_rows, same) = start(), start("seed=1")
    assert torch.equal(stored, same) and not torch.equal(rows, other_rows)
    drawn = [start("model.weights=random", f"seed={seed}")[1] for seed in (1, 2)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], stored)
    with pytest.raises(ValueError, match=r"model\.family is 'qwen2_vl', but"):
        built("model.family=qwen2_vl")


def test_optimizer(built):
    keys = ["optim.lr=0.01", "optim.token_lr=0.04", "optim.weight_decay=0.2"]
    model, optimizer = built(*keys, "optim.betas=[0.8, 0.9]")
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        token = any(p is model.tokens.weight for p in group["params"])
        assert group["lr"] == pytest.approx(0.04 if token else 0.01)
        assert group["betas"] == (0.8, 0.9)
    assert sorted({group["weight_decay"] for group in optimizer.param_groups}) == [0.0, 0.2]
    assert isinstance(built("optim.kind=sgd")[1], torch.optim.SGD)


def test_objective():
    for override, visibility in (("visible=true", "causal"), ("loss=kl", "bottleneck")):
        config = config_of(f"compress.{override}")
        objective = assemble.build_objective(config)
        assert (objective.config, objective.visibility) == (config.compress, visibility)
    config = config_of("objective=match", "match={temperature: 1, mask_false_negatives: false}")
    assert assemble.build_objective(config).config == config.match


class TestEvaluation:
    def test_sets(self, tmp_path):
        mmeb_folder(tmp_path)
        keys = ["objective=match", f"eval.root={tmp_path}", "eval.image_root=/where"]

        def names(*more, sets=()):
            tasks = assessment.load_tasks(config_of(*keys, *more), tmp_path / "no", sets)
            assert {p.name[:7] for t in tasks for s in t.pool for p in s.images} <= {"/where/"}
            return [task.name for task in tasks]

        assert names() == ["find", "say"] and names("eval.sets=[say]") == ["say"]
        assert names("eval.sets=[say]", sets=("find",)) == ["find"]

    def test_batches_of_sides(self, monkeypatch):
        seen = []

        def encode(run, collator, sides, **how):
            seen.append(how)
            return torch.eye(2)[: len(sides)].numpy()

        monkeypatch.setattr(assessment, "encode_sides", encode)
        task = RankingTask("a", "Ret", "IND", [Side("q")], [Side("t")], [torch.tensor([0]).numpy()])
        config = config_of("eval.batch_size=7", "data.workers=3", "objective=match")
        assessment.evaluate_ranking(None, None, [task], config, "cpu")
        assert seen and seen[0] == {"batch_size": 7, "device": "cpu", "workers": 3}

    def test_questions(self, tmp_path):
        path = tmp_path / "asked.jsonl"
        write_dialogues(path)
        keys = [f"eval.path={path}", "data.image_root=/data", "eval.bottleneck_questions=12"]
        for more, root in (([], "/data"), (["eval.image_root=/where"], "/where")):
            found = assessment.bottleneck_questions(config_of(*keys, *more))
            assert len(found) == 12 and found[0].images[0].name == f"{root}/0.png"
        kinds = [d.turns[0].kind for d in assessment.bottleneck_questions(
            config_of("eval.bottleneck_questions=3")
        )]  # fmt: skip
        assert {kinds.count(kind) for kind in kinds} == {3}
        assert not assessment.bottleneck_questions(config_of("eval.bottleneck_questions=0"))
