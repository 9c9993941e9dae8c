"""Reading models: what does not fit is said, shards equal the whole, stages follow each other."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from coma_ds.config import FAMILIES, MatchConfig, ModelConfig, load_config
from coma_ds.data.collate import Collator
from coma_ds.data.processing import load_processing
from coma_ds.data.records import Dialogue, Pair, Side, Turn
from coma_ds.model.adapters import adapter_layers
from coma_ds.model.loading import load_finished, load_language_model
from coma_ds.model.source import resolve_model
from coma_ds.objectives.match import Match
from coma_ds.step import Budget, grad_cache
from tests.distributed.harness import run_world
from tests.distributed.shards import build, digests, transformers_says
from tests.folders import SKELETON, WORDS, base_folder, disturb, export, load, whole
from tests.tiny import Flat, PlainEngine

TABLE = "model.language_model.embed_tokens.weight"


def edit_weights(folder, change) -> None:
    """Rewrite the weights of a folder after ``change(weights)``."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def read(folder, **options):
    settings = {"weights": "pretrained", "dtype": torch.float32, "sharding": None, "seed": 0}
    return load_language_model(str(folder), **settings | options)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_read_as_they_are(tmp_path, family, tied):
    folder = base_folder(tmp_path, family, tied=tied)
    lm = read(folder)
    stored = load_file(folder / "model.safetensors")
    # Qwen2-VL and 2.5-VL are stored under the names of the hub, which are older than the modules'
    values = sorted(w.double().sum().item() for w in stored.values())
    assert sorted(p.double().sum().item() for p in lm.parameters()) == values
    assert (lm.lm_head.weight is lm.get_input_embeddings().weight) == tied


def test_missing_weights_are_listed(tmp_path):
    folder = base_folder(tmp_path)

    def drop(weights):
        for name in [n for n in weights if "layers.1.self_attn" in n]:
            del weights[name]

    edit_weights(folder, drop)
    with pytest.raises(ValueError) as caught:
        read(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder}: the weights do not fit the model, missing: ")
    assert "model.language_model.layers.1.self_attn.k_proj.bias" in text
    assert text.count("self_attn") == 7 and "unexpected" not in text


def test_a_long_list_is_cut_short(tmp_path):
    folder = base_folder(tmp_path)
    edit_weights(folder, lambda w: [w.pop(n) for n in list(w) if ".layers." in n])
    with pytest.raises(ValueError, match=r"missing: (model\S+, ){7}model\S+ and 16 more$"):
        read(folder)


def test_unexpected_weights_are_listed(tmp_path):
    folder = base_folder(tmp_path)
    edit_weights(folder, lambda w: w.update({"model.stray.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"do not fit the model, unexpected: \S*stray.weight$"):
        read(folder)


def test_weights_of_another_shape_are_listed(tmp_path):
    folder = base_folder(tmp_path)
    name = next(n for n in load_file(folder / "model.safetensors") if "layers.0.mlp.up_proj" in n)
    edit_weights(folder, lambda w: w.update({name: torch.zeros(3, 5)}))
    with pytest.raises(ValueError, match=r"mismatched: .*layers.0.mlp.up_proj.weight"):
        read(folder)


def test_a_tied_model_without_its_table(tmp_path):
    folder = base_folder(tmp_path)
    edit_weights(folder, lambda w: [w.pop(n) for n in list(w) if "embed_tokens" in n])
    with pytest.raises(ValueError, match=r"missing: .*embed_tokens.weight"):
        read(folder)


@pytest.mark.parametrize("reader", [read, lambda f: load_processing(f, compression_tokens=4)])
def test_another_family_is_refused(tmp_path, reader):
    folder = base_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    with pytest.raises(ValueError) as caught:
        reader(folder)
    assert str(caught.value) == (
        f"{folder}: model family 'llava', expected one of qwen2_vl, qwen2_5_vl, qwen3_vl"
    )


def test_a_family_that_the_run_does_not_name(tmp_path):
    folder = base_folder(tmp_path, "qwen2_vl")
    load(folder, family="qwen2_vl")
    with pytest.raises(ValueError, match=r"model.family is 'qwen3_vl', but .* is 'qwen2_vl'"):
        load(folder, family="qwen3_vl")


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"model.path '.*': the folder has no config.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"model.path './nowhere': no such folder"):
        resolve_model("./nowhere")
    with pytest.raises(ValueError, match=r"model.path 'builtin:none': no such model"):
        resolve_model("builtin:none")
    assert resolve_model("Qwen/a-name-on-the-hub") == "Qwen/a-name-on-the-hub"
    with pytest.raises(ValueError, match=r"init_from 'runs_of/nobody': .* \(init_from=null\)"):
        resolve_model("runs_of/nobody", "init_from")  # and no question to the hub
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match=r"the run is not finished, it has no model/ \(coma-ds ex"):
        resolve_model(str(tmp_path), "init_from")
    for reader in (read, lambda f: load_processing(f, compression_tokens=4)):
        with pytest.raises(ValueError, match=r"no config.json there, so it is no model folder"):
            reader(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"its config.json cannot be read \(.*not a valid JSON"):
        read(tmp_path)


def test_a_hub_name_that_cannot_be_had():
    with pytest.raises(ValueError, match=r"^no/such: its config.json cannot be read \(") as caught:
        load_processing("no/such", compression_tokens=4)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights(tmp_path):
    folder = base_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be read .*; model.weights=random starts without"):
        read(folder)
    assert read(folder, weights="random").dtype == torch.float32


@pytest.mark.parametrize("left", [0, 5, 2000, -1])
def test_weights_that_were_not_copied_to_the_end(tmp_path, left):
    folder = base_folder(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ValueError) as caught:
        read(folder)
    assert str(caught.value).startswith(f"{folder}: its weights cannot be read (")
    assert str(caught.value).endswith("; model.weights=random starts without any")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["missing", "unexpected", "mismatched"])
def test_what_does_not_fit_is_said_once(tmp_path, case):
    """By the error, not by transformers' own report as well."""
    folder, said = base_folder(tmp_path), []
    edit_weights(folder, BROKEN[case])
    with transformers_says(said), pytest.raises(ValueError, match=case):
        read(folder)
    assert said == []


def test_a_folder_without_tokenizer(tmp_path):
    folder = base_folder(tmp_path)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"its tokenizer or image processor cannot be read"):
        load_processing(folder, compression_tokens=4)


def test_an_export_without_its_extras(tmp_path):
    model, processing = load(base_folder(tmp_path / "base"))
    folder = export(model, processing, tmp_path / "model")
    (folder / "coma_ds.json").unlink()
    with pytest.raises(ValueError, match=r"has compression tokens, but coma_ds.json is not there"):
        load(folder)


def test_another_number_of_tokens(tmp_path):
    model, processing = load(base_folder(tmp_path / "base"))
    folder = export(model, processing, tmp_path / "model")
    with pytest.raises(ValueError, match=r"compression_tokens is 8, but .* trained with 4"):
        load(folder, compression_tokens=8)


def test_the_shipped_base_fits_its_own_config():
    assert read(SKELETON, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_loading_leaves_no_bar_where_there_is_no_terminal(tmp_path, capfd):
    read(base_folder(tmp_path))
    assert "Loading weights" not in capfd.readouterr().err


def batch_of(processing):
    """Two pairs, one with an image, and a dialogue's batch."""
    pairs = [Pair(Side("a"), Side("<|image_1|>", (Flat("red"),))), Pair(Side("b"), Side("c d"))]
    collator = Collator(processing)
    return collator(pairs), collator([Dialogue((Flat("red"),), (Turn("What?", "a thing"),))])


@pytest.mark.parametrize("matching", [True, False])
@pytest.mark.parametrize("switched_on", [True, False])
def test_checkpointing_runs_each_layer_again_in_the_backward(tmp_path, switched_on, matching):
    base, asked = base_folder(tmp_path), {"gradient_checkpointing": switched_on}
    model, processing = load(base, matching=matching, **asked)
    runs = []
    for layer in model.backbone.text.layers:
        layer.mlp.register_forward_pre_hook(lambda m, _: runs.append(m))
    pairs, _ = batch_of(processing)
    emb_BE = model.train().embeddings(pairs, model.embed_images(pairs.images))
    assert len(runs) == 2
    emb_BE.square().sum().backward()
    assert len(runs) == (4 if switched_on and not matching else 2)


class TestOutputMatrix:
    """Stage 2 has no use for it."""

    def test_it_is_trained_where_a_loss_reaches_it(self, tmp_path):
        trained = {}
        for tied in (True, False):
            base = base_folder(tmp_path / f"{tied}", tied=tied)
            for matching in (True, False):
                model, _ = load(base, matching=matching)
                lm = model.backbone.lm
                trained[tied, matching] = lm.lm_head.weight.requires_grad
                assert lm.get_input_embeddings().weight.requires_grad
                assert model.answers.weight is lm.lm_head.weight
        assert trained == {
            (True, True): True, (True, False): True, (False, True): False, (False, False): True,
        }  # fmt: skip

    @pytest.mark.parametrize("tied", [True, False])
    def test_no_step_of_stage_2_multiplies_by_it(self, tmp_path, monkeypatch, tied):
        model, processing = load(base_folder(tmp_path, tied=tied))
        matrix, uses, linear = model.backbone.lm.lm_head.weight, [], torch.nn.functional.linear

        def spy(states, weight, *rest):
            uses.append(weight.data_ptr() == matrix.data_ptr())
            return linear(states, weight, *rest)

        monkeypatch.setattr(torch.nn.functional, "linear", spy)
        pairs, dialogue = batch_of(processing)
        engine = PlainEngine(model.train())
        report = grad_cache(engine, Match(MatchConfig()), pairs, Budget(samples=2), seed=0, step=0)
        assert report["loss"] > 0 and model.tokens.weight.grad.any()
        assert len(uses) > 20 and not any(uses)
        if not tied:
            assert matrix.grad is None
        with torch.no_grad():
            rows = model.embed_images(dialogue.images)
            model.answer_loss(dialogue, rows, "bottleneck")
        assert any(uses)  # stage 1 does, so the spy would have seen it


@pytest.mark.parametrize("name", ["qproj", "qkv"])
def test_a_target_that_no_layer_is_named_after(tmp_path, name):
    """``qkv`` is one of the vision tower."""
    folder = base_folder(tmp_path)
    with pytest.raises(ValueError) as caught:
        load(folder, adapter="lora", lora={"targets": ["q_proj", name]})
    assert str(caught.value) == (
        f"model.lora.targets: the language model has no layer {name!r}; it has down_proj, "
        "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )


class TestStages:
    def test_init_from_merges_the_adapters_and_keeps_the_rows(self, tmp_path):
        base = base_folder(tmp_path / "base", vocab=WORDS + 2)
        one, processing = load(base, adapter="lora")
        disturb(one)
        (tmp_path / "run").mkdir()
        export(one, processing, tmp_path / "run" / "model")

        source = resolve_model(str(tmp_path / "run"))
        assert source == str(tmp_path / "run" / "model")
        two, _ = load(source, adapter="lora")
        before = dict(read(base).named_parameters())
        layers = adapter_layers(one.backbone.lm)
        assert len(layers) == 8
        after = {
            n.replace(".base_layer.", "."): p
            for n, p in two.backbone.lm.named_parameters()
            if "lora_" not in n
        }
        for prefix, layer in layers.items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            delta = layer.lora_alpha["default"] / layer.r["default"] * b @ a
            assert delta.abs().max() > 0.1
            want = before[f"{prefix}.weight"] + delta
            torch.testing.assert_close(after[f"{prefix}.weight"], want, atol=1e-5, rtol=1e-5)
        adapted = {f"{prefix}.weight" for prefix in layers}
        for name, weight in before.items():
            if name not in adapted and name != TABLE:
                assert torch.equal(after[name], weight), name
        assert torch.equal(two.tokens.weight, one.tokens.weight)
        assert two.tokens.first_id == WORDS
        # a new adapter, which changes nothing yet
        for layer in adapter_layers(two.backbone.lm).values():
            assert not layer.lora_B["default"].weight.any()

    def test_a_pooling_query_goes_on(self, tmp_path):
        one, processing = load(base_folder(tmp_path / "base"), pooling="attention")
        assert not one.pooling.query.any()
        one.pooling.query.data.copy_(torch.randn(64))
        folder = export(one, processing, tmp_path / "model")
        two, _ = load(folder, pooling="attention")
        assert torch.equal(two.pooling.query, one.pooling.query)
        # a query that was trained is neither dropped nor cut in another way
        for other in ({"pooling": "mean"}, {"pooling": "attention", "pooling_heads": 2}):
            with pytest.raises(ValueError, match=r"was trained with attention of 1 head\(s\)"):
                load(folder, **other)
        extras = json.loads((folder / "coma_ds.json").read_text())
        (folder / "coma_ds.json").write_text(json.dumps(extras | {"objective": "compress"}))
        assert load(folder, pooling="mean")[0].pooling.query is None
        (folder / "coma_ds_pooling.safetensors").unlink()
        with pytest.raises(ValueError, match=r"pooled by attention, but coma_ds_pooling.safeten"):
            load(folder, pooling="attention")

    def test_from_mean_to_attention_starts_at_zero(self, tmp_path):
        one, processing = load(base_folder(tmp_path / "base"))
        folder = export(one, processing, tmp_path / "model")
        assert not load(folder, pooling="attention")[0].pooling.query.any()

    def test_random_weights_do_not_replace_the_stage_before(self):
        with pytest.raises(ValueError, match=r"^model.weights is 'random', but init_from 'runs/"):
            load_config("demo-match", ["model.weights=random"])
        assert load_config("demo-control", ["model.weights=random"]).init_from is None

    def test_a_finished_model_is_at_rest(self, tmp_path):
        one, processing = load(base_folder(tmp_path / "base"), adapter="lora")
        folder = export(disturb(one), processing, tmp_path / "model")
        config = ModelConfig(compression_tokens=4, adapter="lora", gradient_checkpointing=True)
        model, _ = load_finished(str(folder), config, precision="fp32", device=torch.device("cpu"))
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert not adapter_layers(model)


def gate(weights) -> str:
    return next(n for n in weights if "layers.0.mlp.gate_proj" in n)


BROKEN = {
    "missing": lambda w: w.pop(gate(w)),
    "unexpected": lambda w: w.update({"model.stray.weight": torch.zeros(2)}),
    "mismatched": lambda w: w.update({gate(w): torch.zeros(3, 5)}),
}
NAMES = {
    "missing": "missing: model.language_model.layers.0.mlp.gate_proj.weight",
    "unexpected": "unexpected: model.language_model.stray.weight",
    "mismatched": "torch.Size([3, 5]), torch.Size([128, 64]))",
}


def test_sharded_loading_equals_the_plain_one(tmp_path):
    exported, processing = load(base_folder(tmp_path / "base", tied=False), adapter="dora")
    folder = export(disturb(exported), processing, tmp_path / "model")
    cases = {
        "fp32 none": str(folder),
        "bf16 lora": str(folder),
        "fp32 dora": str(tmp_path / "base"),
    }
    broken = {}
    for case, change in BROKEN.items():
        broken[case] = str(shutil.copytree(tmp_path / "base", tmp_path / case))
        edit_weights(tmp_path / case, change)
    want = {}
    for case, source in cases.items():
        precision, adapter = case.split()
        want[case] = digests(build(source, precision, False, adapter=adapter), whole)
    sizes = [p.numel() for p in build(str(folder), "fp32", False).backbone.lm.parameters()]
    for world in (1, 2):
        reports = run_world(
            world, "tests.distributed.shards:load_sharded", folders=cases, broken=broken
        )
        for report in reports:
            assert report["world"] == world and report["plain"]
            for case in BROKEN:
                found = report["errors"][case]
                assert found.startswith(f"{broken[case]}: the weights do not fit the model, {case}")
                assert found.endswith(NAMES[case]) and found.count(": ") == 2
            assert report["said"] == []
            for case, found in report["models"].items():
                assert found["digests"] == want[case], case
            assert report["models"]["fp32 none"]["sharded"] == 1
            assert report["models"]["fp32 none"]["held"] < sum(sizes) / 2
