"""Every shipped recipe resolves, and those of the paper say what the paper says."""

from __future__ import annotations

import json
import math
from importlib import resources

import pytest

from coma_ds.config import RunConfig, load_config
from coma_ds.data.builtin import BuiltinPairs
from coma_ds.data.mmeb_layout import OFFICIAL_SETS
from coma_ds.mechanics import OWNED_BY_RUN, deepspeed_config, read_mechanics
from coma_ds.recipe_files import recipe_names

WANTED = {
    "demo-base",
    "demo-compress",
    "demo-match",
    "demo-control",
    *(
        f"qwen2_5_vl_{size}-{arm}"
        for size in ("3b", "7b")
        for arm in ("compress", "match", "control")
    ),
    "qwen3_vl_2b-match",
}
MECHANICS = {
    "zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_whole": 3, "zero3_hpz": 3,
    "zero3_offload": 3,
}  # fmt: skip
PAPER = [n for n in sorted(WANTED) if n.startswith("qwen2_5_vl")]


def test_the_recipes_are_those_that_are_promised() -> None:
    assert WANTED <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves(name) -> None:
    """Config, DeepSpeed file, chunks within the batch, and a stage that fits its name."""
    config = load_config(name)
    assert config.recipe == name
    arm = name.rsplit("-", 1)[1]
    assert config.objective == ("match" if arm in ("match", "control") else "compress")
    tree = deepspeed_config(config)
    assert tree["gradient_clipping"] == config.optim.clip
    assert config.chunk.samples <= config.optim.batch_size
    if config.data.format == "builtin" and config.objective == "match":
        assert set(config.data.sources) <= set(BuiltinPairs().source_names)


@pytest.mark.parametrize("name", recipe_names())
def test_a_control_starts_from_the_original_weights(name) -> None:
    """It differs from its arm in nothing else than where it starts and where it writes."""
    if not name.endswith("-control"):
        return
    arm = load_config(name.replace("-control", "-match"))
    control = load_config(name)
    assert control.init_from is None and arm.init_from is not None
    same = {"recipe": "", "output": "", "init_from": None}
    assert control.model_copy(update=same) == arm.model_copy(update=same)
    assert control.output != arm.output


@pytest.mark.parametrize("name", PAPER)
def test_what_both_stages_of_the_paper_share(name) -> None:
    config = load_config(name)
    size = {"3b": "3B", "7b": "7B"}[name[11:13]]
    assert config.model.path == f"Qwen/Qwen2.5-VL-{size}-Instruct"
    assert config.model.family == "qwen2_5_vl" and config.model.weights == "pretrained"
    assert config.model.compression_tokens == 32
    assert (config.model.min_vision_tokens, config.model.max_vision_tokens) == (256, 1024)
    assert config.model.max_length == 8192
    assert config.model.pooling == "mean" and config.model.bottleneck == "kv"
    assert config.model.adapter == "lora" and not config.model.train_vision
    lora = config.model.lora
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 64, 0.1)
    assert set(lora.targets) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    optim = config.optim
    assert (optim.lr, optim.schedule, optim.warmup) == (5e-5, "cosine", 0.05)
    assert optim.weight_decay == 0 and optim.kind == "adamw" and optim.token_lr is None
    assert config.precision == "bf16"


def test_the_demo_computes_in_what_is_fast() -> None:
    for name in ("demo-compress", "demo-match", "demo-control"):
        assert load_config(name).precision == "auto"
    assert RunConfig().precision == "bf16"


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_stage_one_of_the_paper(size) -> None:
    config = load_config(f"qwen2_5_vl_{size}-compress")
    assert config.optim.batch_size == 256
    assert config.optim.steps == math.floor(222_516 / 256) == 869  # one epoch
    assert config.compress.loss == "ce" and config.compress.format == "multi_turn"
    assert not config.compress.visible and config.init_from is None


@pytest.mark.parametrize("arm", ["match", "control"])
@pytest.mark.parametrize("size", ["3b", "7b"])
def test_stage_two_of_the_paper(size, arm) -> None:
    config = load_config(f"qwen2_5_vl_{size}-{arm}")
    assert config.optim.batch_size == 1024 and config.optim.steps == 1500
    assert config.data.sub_batch == 64 and config.data.weighting == "uniform"
    assert config.optim.batch_size // config.data.sub_batch == 16
    assert config.match.temperature == 0.03 and not config.match.learn_temperature
    assert not config.match.mask_false_negatives  # ours, off where the paper is reproduced
    trained = {name for name, (_, domain) in OFFICIAL_SETS.items() if domain == "IND"}
    assert len(config.data.sources) == 20 == len(set(config.data.sources))
    # the training half of MMEB spells one of its sets in its own way
    assert {name.replace("ImageNet_1K", "ImageNet-1K") for name in config.data.sources} == trained
    stage_one = load_config(f"qwen2_5_vl_{size}-compress").output
    assert config.init_from == (stage_one if arm == "match" else None)


def test_the_stages_of_the_demo_fit_each_other() -> None:
    base, compress, match = (load_config(f"demo-{n}") for n in ("base", "compress", "match"))
    assert match.init_from == compress.output
    assert match.model.compression_tokens == compress.model.compression_tokens
    assert compress.deepspeed == match.deepspeed == "zero3"
    assert base.compress.visible and base.model.weights == "random"
    assert not compress.compress.visible and not compress.model.train_vision
    assert match.chunk.samples < match.optim.batch_size  # GradCache is at work


def test_the_recipe_that_runs_by_itself() -> None:
    from coma_ds.train import parse

    args, config = parse([])
    assert config == load_config("demo-compress") and not args.dry_run
    args, config = parse(["--local_rank=1", "optim.steps=3", "--recipe", "demo-match", "seed=2"])
    assert (config.recipe, config.optim.steps, config.seed) == ("demo-match", 3, 2)


def test_deepspeed_files_hold_mechanics_only() -> None:
    folder = resources.files("coma_ds.ds_configs")
    names = {p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json")}
    assert names == set(MECHANICS)
    for name, stage in MECHANICS.items():
        tree = read_mechanics(name)
        assert set(tree) == {"zero_optimization"}
        assert tree["zero_optimization"]["stage"] == stage
        assert "auto" not in json.dumps(tree)
    offload = read_mechanics("zero3_offload")["zero_optimization"]
    assert offload["offload_optimizer"]["device"] == offload["offload_param"]["device"] == "cpu"


@pytest.mark.parametrize("clip", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", MECHANICS)
def test_the_run_says_what_is_its_own(name, clip) -> None:
    config = RunConfig.model_validate({"deepspeed": name, "optim": {"clip": clip}})
    tree = deepspeed_config(config)
    assert tree["gradient_clipping"] == clip and "optimizer" not in tree
    assert tree["bf16"] == {"enabled": True}
    assert tree["zero_optimization"] == read_mechanics(name)["zero_optimization"]
    plain = deepspeed_config(config.model_copy(update={"precision": "fp32"}))
    assert "bf16" not in plain


@pytest.mark.parametrize("key", OWNED_BY_RUN)
def test_a_conflict_with_the_run_is_an_error(key, tmp_path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, key: 1}))
    with pytest.raises(ValueError, match=f"sets '{key}', which the run config owns"):
        read_mechanics(str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[1]", r"expected an object, found \[1\]"), (None, "does not exist")],
)
def test_a_broken_deepspeed_file_is_named(text, message, tmp_path) -> None:
    file = tmp_path / "mine.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=f"mine.json' {message}|mine.json': {message}"):
        read_mechanics(str(file))


def test_an_unknown_mechanics_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'zero4': expected a JSON file or one of .*zero3"):
        read_mechanics("zero4")


@pytest.mark.parametrize(
    ("zero", "says"),
    [
        ({"stage": 7}, "zero_optimization.stage must be 0, 1, 2 or 3, found {'stage': 7}"),
        (3, "zero_optimization.stage must be 0, 1, 2 or 3, found 3"),
        ({"stage": 2, "overlap_com": True}, "DeepSpeed accepts: overlap_com: Extra inputs are not"),
        ({"stage": 2, "reduce_bucket_size": "auto"}, "holds 'auto', which transformers' Trainer"),
    ],
)
def test_mechanics_that_deepspeed_refuses_name_the_file(zero, says, tmp_path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(ValueError) as caught:
        deepspeed_config(load_config(None, [f"deepspeed={json.dumps(str(file))}"]))
    assert f"deepspeed file {str(file)!r}" in str(caught.value) and says in str(caught.value)


def test_a_group_of_nodes_that_does_not_divide_the_ranks(monkeypatch) -> None:
    for world, fits in ((1, True), (4, True), (16, True), (12, False)):
        monkeypatch.setattr("coma_ds.comm.world_size", lambda world=world: world)
        if fits:
            deepspeed_config(load_config(None, ["deepspeed=zero3_hpz"]))
        else:
            with pytest.raises(ValueError, match="partition_size 8 does not divide the 12 ranks"):
                deepspeed_config(load_config(None, ["deepspeed=zero3_hpz"]))
