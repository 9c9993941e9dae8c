"""The exported folder: stock transformers loads it, bit for bit what was trained."""

from __future__ import annotations

import json
import logging
import os
import stat

import numpy as np
import pytest
import torch
import yaml
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from coma_ds.config import FAMILIES, ModelConfig
from coma_ds.data.collate import Collator
from coma_ds.data.processing import load_processing
from coma_ds.data.records import Dialogue, Turn
from coma_ds.inference import greedy_answers
from coma_ds.model.adapters import adapter_layers
from coma_ds.model.loading import load_finished
from tests.folders import WORDS, base_folder, disturb, export, load
from tests.tiny import Flat

TABLE = "model.language_model.embed_tokens.weight"


def reload(folder, cls=AutoModelForImageTextToText):
    """The stock model; asserts that its weights are exactly those of the folder."""
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def expected_weights(model) -> dict[str, torch.Tensor]:
    """Every weight under its stock name, float64, adapters merged by the formula."""
    lm = model.backbone.lm
    weights = {n: p.detach().double() for n, p in lm.named_parameters() if "lora_" not in n}
    weights = {n.replace(".base_layer.", "."): w for n, w in weights.items()}
    for prefix, layer in adapter_layers(lm).items():
        (a, b) = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        scale = layer.lora_alpha["default"] / layer.r["default"]
        merged = weights[f"{prefix}.weight"] + scale * b.double() @ a.double()
        if layer.use_dora["default"]:
            magnitude = layer.lora_magnitude_vector["default"].weight.double()
            merged = merged * (magnitude / merged.norm(dim=1))[:, None]
        weights[f"{prefix}.weight"] = merged.detach()
    return weights


@pytest.mark.parametrize("adapter", ["none", "lora", "dora"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_loads_what_was_trained(tmp_path, family, tied, adapter):
    # 4 of the 8 token ids lie beyond the table of 4036 rows
    base = base_folder(tmp_path / "base", family, tied=tied, vocab=WORDS + 4)
    model, processing = load(base, compression_tokens=8, adapter=adapter, train_vision=True)
    disturb(model)
    stock = reload(export(model, processing, tmp_path / "model"))

    assert type(stock) is type(model.backbone.lm)
    assert stock.config.text_config.vocab_size == 4096 == len(stock.get_input_embeddings().weight)
    assert (stock.lm_head.weight is stock.get_input_embeddings().weight) == tied
    adapted = {f"{name}.weight" for name in adapter_layers(model.backbone.lm)}
    assert bool(adapted) == (adapter != "none")
    want = expected_weights(model)
    got = dict(stock.named_parameters())
    assert set(got) == set(want)
    for name, weight in want.items():
        kept = got[name].double()
        if name in (TABLE, "lm_head.weight"):
            rows = torch.zeros_like(kept)
            rows[: len(weight)] = weight
            if name == TABLE:
                rows[WORDS : WORDS + 8] = model.tokens.weight.double()
            weight = rows
        if name in adapted:
            torch.testing.assert_close(kept, weight, atol=2e-6, rtol=1e-5)
        else:
            assert torch.equal(kept, weight), name


def test_the_base_model_class_loads_it_too(tmp_path):
    model, processing = load(base_folder(tmp_path / "base"))
    folder = export(model, processing, tmp_path / "model")
    stock = AutoModel.from_pretrained(folder)
    assert torch.equal(stock.get_input_embeddings().weight[WORDS : WORDS + 4], model.tokens.weight)


@pytest.mark.parametrize("weights", ["pretrained", "random"])
@pytest.mark.parametrize("precision", ["bf16", "fp32", "autocast"])
def test_precision_survives(tmp_path, precision, weights):
    base = base_folder(tmp_path / "base")
    model, processing = load(base, precision=precision, weights=weights)
    disturb(model)
    folder = export(model, processing, tmp_path / "model")
    stock = reload(folder)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {p.dtype for p in stock.parameters()} == {dtype}
    assert torch.equal(stock.get_input_embeddings().weight[WORDS:][:4], model.tokens.weight)
    config = json.loads((folder / "config.json").read_text())
    stated = {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]}
    assert stated == {str(dtype).removeprefix("torch.")}
    extras = json.loads((folder / "coma_ds.json").read_text())
    assert extras == {
        "compression_tokens": 4,
        "first_id": WORDS,
        "token_names": [f"<|compress_{k}|>" for k in range(4)],
        "pooling": "mean",
        "pooling_heads": 1,
        "precision": precision,
        "max_length": 512,
        "objective": "match",
        "recipe": "test",
        "step": 3,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_no_private_name_stands_in_the_config(tmp_path, family):
    model, processing = load(base_folder(tmp_path / "base", family))
    before = model.backbone.lm.config.text_config._attn_implementation
    folder = export(model, processing, tmp_path / "model")
    text = (folder / "config.json").read_text()
    assert "coma" not in text and "attn_implementation" not in text
    config = json.loads(text)
    assert config["architectures"] == [type(model.backbone.lm).__name__]
    stock = reload(folder)
    for part in (stock.config, stock.config.text_config, stock.config.vision_config):
        assert part._attn_implementation == "sdpa"
    # the model in training is not touched
    assert model.backbone.lm.config.text_config._attn_implementation == before


def test_tokenizer_holds_the_named_tokens(tmp_path):
    model, processing = load(base_folder(tmp_path / "base"), compression_tokens=8)
    tokenizer = AutoTokenizer.from_pretrained(export(model, processing, tmp_path / "model"))
    names = [f"<|compress_{k}|>" for k in range(8)]
    text = "a red car" + "".join(names)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[-8:] == list(range(WORDS, WORDS + 8))
    assert ids[:-8] == processing.encode("a red car")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red car"


def test_stage_two_reads_the_folder_as_stage_one_left_it(tmp_path):
    base = base_folder(tmp_path / "base")
    model, before = load(base, max_length=77)
    before.image_processor.size = {"shortest_edge": 1024, "longest_edge": 2048}
    folder = export(disturb(model), before, tmp_path / "model")
    again, after = load(folder)
    assert after.compression_ids == before.compression_ids
    assert torch.equal(again.tokens.weight, model.tokens.weight)
    picture = Flat("wide", size=(90, 40))
    for one, two in zip(before.pixels(picture), after.pixels(picture)):
        assert np.array_equal(one, two)
    assert (
        after.pixels(picture)[1] != load_processing(base, compression_tokens=4).pixels(picture)[1]
    )


def test_image_processor_reloads_from_either_file(tmp_path):
    model, processing = load(base_folder(tmp_path / "base"))
    folder = export(model, processing, tmp_path / "model")
    want = processing.image_processor.to_dict()
    assert Qwen2VLImageProcessorPil.from_pretrained(folder).to_dict() == want
    assert AutoImageProcessor.from_pretrained(folder).to_dict() == want
    nested = json.loads((folder / "processor_config.json").read_text())
    flat = json.loads((folder / "preprocessor_config.json").read_text())
    assert nested["processor_class"] == "Qwen2_5_VLProcessor"
    assert nested["image_processor"] == flat  # other runtimes and the video half read the flat one
    (folder / "processor_config.json").unlink()
    assert Qwen2VLImageProcessorPil.from_pretrained(folder).to_dict() == want


def test_generation_config_is_the_one_of_the_base(tmp_path):
    base = base_folder(tmp_path / "base")
    given = GenerationConfig(do_sample=True, temperature=0.1, eos_token_id=[4026, 4024])
    given.save_pretrained(base)
    model, processing = load(base)
    stock = reload(export(model, processing, tmp_path / "model"))
    assert stock.generation_config.eos_token_id == [4026, 4024]
    assert stock.generation_config.temperature == 0.1


def test_a_generation_config_that_contradicts_itself_does_not_stop_the_export(tmp_path, caplog):
    model, processing = load(base_folder(tmp_path / "base"))
    model.backbone.lm.generation_config.temperature = 0.1  # without sampling: refused when saved
    log = logging.getLogger("coma_ds")
    log.propagate = True
    with caplog.at_level(logging.WARNING, "coma_ds"):
        folder = export(model, processing, tmp_path / "model")
    assert "generation_config.json is left out" in caplog.text
    assert not (folder / "generation_config.json").exists()
    reload(folder)


def test_an_earlier_export_is_replaced_as_a_whole(tmp_path):
    model, processing = load(base_folder(tmp_path / "base"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_text("stale")
    export(model, processing, folder)
    export(disturb(model), processing, folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "model"]
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    assert torch.equal(
        reload(folder).get_input_embeddings().weight[WORDS:][:4], model.tokens.weight
    )


def test_a_failed_export_leaves_the_earlier_one(tmp_path, monkeypatch):
    model, processing = load(base_folder(tmp_path / "base"))
    folder = export(model, processing, tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr("coma_ds.model.export.save_processor", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(disturb(model), processing, folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_colleagues_can_read_the_weights(tmp_path):
    model, processing = load(base_folder(tmp_path / "base"), pooling="attention")
    before = os.umask(0o022)
    try:
        folder = export(model, processing, tmp_path / "model")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()}
    assert set(modes.values()) == {0o644}, modes


def test_other_ranks_write_nothing(tmp_path):
    model, processing = load(base_folder(tmp_path / "base"))
    export(model, processing, tmp_path / "model", main=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_a_model_without_tokens(tmp_path):
    model, processing = load(base_folder(tmp_path / "base"), compression_tokens=0)
    folder = export(model, processing, tmp_path / "model")
    stock = reload(folder)
    assert stock.config.text_config.vocab_size == 4096
    assert torch.equal(stock.lm_head.weight, model.backbone.lm.lm_head.weight)
    assert json.loads((folder / "coma_ds.json").read_text())["first_id"] is None
    assert "no compression tokens" in (folder / "README.md").read_text()


def test_an_exported_model_answers_as_in_training(tmp_path):
    """In a tied table the token rows are output rows as well: they must never be an answer."""
    model, processing = load(base_folder(tmp_path / "base"))
    disturb(model)
    model.tokens.weight.data *= 50
    folder = export(model, processing, tmp_path / "model", objective="compress")
    settings = ModelConfig(compression_tokens=4, max_length=512)
    finished, again = load_finished(
        str(folder), settings, precision="fp32", device=torch.device("cpu")
    )
    questions = [Dialogue((Flat("a", (9 * i, 0, 90)),), (Turn(f"{i}?", ""),)) for i in range(6)]
    for visibility in ("bottleneck", "causal"):
        want = greedy_answers(model.eval(), Collator(processing), questions, visibility)
        got = greedy_answers(finished, Collator(again), questions, visibility)
        assert got == want and not any("compress" in answer for answer in got)
    logits = finished.backbone.lm.lm_head.weight @ torch.randn(64, 200)
    assert ((logits.argmax(0) >= WORDS) & (logits.argmax(0) < WORDS + 4)).any()  # they would win


def test_card_has_the_head_that_the_hub_reads(tmp_path):
    model, processing = load(base_folder(tmp_path / "base"))
    text = (export(model, processing, tmp_path / "model") / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    assert "3 of 100 steps" in body and "`<|compress_0|>` to `<|compress_3|>`" in body
    assert text.isascii()
