"""An override that would change nothing is refused."""

from __future__ import annotations

import pytest

from coma_ds.config import load_config
from coma_ds.effects import check_effect
from coma_ds.recipe_files import recipe_names


@pytest.mark.parametrize(
    "recipe, override, cause",
    [
        ("demo-compress", "match.learn_temperature=true", "objective 'compress'"),
        ("demo-compress", "eval.root=/sets", "objective 'compress'"),
        ("demo-compress", "eval.sets=[a]", "objective 'compress'"),
        ("demo-compress", "model.lora.rank=8", "model.adapter 'none'"),
        ("demo-compress", "data.limit=5", "data.format 'builtin'"),
        ("demo-compress", "data.bad_rows=0.1", "data.format 'builtin'"),
        ("demo-control", "data.bad_rows=0.1", "data.format 'builtin'"),
        ("demo-control", "compress.loss=kl", "objective 'match'"),
        ("demo-control", "compress.visible=true", "objective 'match'"),
        ("demo-control", "eval.path=questions.jsonl", "objective 'match'"),
        ("demo-match", "model.path=x", "init_from, which names the model"),
        ("demo-match", "model.path=builtin:demo-base", "init_from, which names the model"),
        ("demo-control", "data.turns=[3,5]", "objective 'match'"),
        ("demo-control", "model.bottleneck=last_hidden", "objective 'match'"),
        ("demo-control", "eval.image_root=/images", "eval.root left out"),
        ("demo-compress", "eval.along=[a]", "objective 'compress'"),
        ("demo-compress", "eval.image_root=/images", "eval.path left out"),
        ("demo-compress", "data.sources=[dialogues]", "one source"),
        ("demo-compress", "data.weighting=uniform", "a single source"),
        ("demo-compress", "data.sub_batch=8", "a single source"),
        ("demo-compress", "chunk.keep=2", "objective 'compress'"),
        ("demo-match", "model.gradient_checkpointing=true", "objective 'match', where chunks"),
    ],
)
def test_an_override_without_effect_is_refused(recipe, override, cause) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ValueError) as caught:
        check_effect(load_config(recipe, [override]), [override])
    assert cause in str(caught.value) and key.rpartition(".")[0] in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.format=pairs", "data.path=x", "data.sources=[zz]"],
        ["data.format=mmeb", "data.root=x", "data.min_score=3"],
        ["data.format=pairs", "data.path=x", "data.turns=[1, 2]"],
    ],
)
def test_a_key_of_another_format_is_refused(overrides) -> None:
    with pytest.raises(ValueError, match=r"override data\.\w+ has no effect with data.format"):
        check_effect(load_config("demo-control", overrides), overrides)


@pytest.mark.parametrize(
    "recipe, overrides, key",
    [
        ("demo-compress", ["compress.format=caption", "data.turns=[1,2]"], "data.turns"),
        ("demo-compress", ["compress.visible=true", "model.bottleneck=kv"], "model.bottleneck"),
        ("demo-compress", ["optim.kind=sgd", "optim.betas=[0.8,0.9]"], "optim.betas"),
        ("demo-control", ["eval.every=0", "eval.along=[i2i/seen]"], "eval.along"),
        ("demo-control", ["eval.every=0", "checkpoint.best=group/All"], "checkpoint.best"),
        ("demo-control", ["checkpoint.every=0", "checkpoint.best=group/All"], "checkpoint.best"),
        ("demo-control", ["eval.every=0", "eval.at_end=no", "eval.batch_size=7"], "eval.batch_"),
        ("demo-control", ["data.format=pairs", "data.path=x", "eval.sets=[a]"], "eval.sets"),
        ("demo-control", ["data.format=pairs", "data.path=x", "data.sub_batch=4"], "data.sub_"),
    ],
)
def test_an_override_that_another_one_makes_idle(recipe, overrides, key) -> None:
    check_effect(load_config(recipe, overrides[:-1]), overrides[:-1])
    with pytest.raises(ValueError, match=f"override {key}.* has no effect with "):
        check_effect(load_config(recipe, overrides), overrides)


def test_an_override_that_says_none_is_taken() -> None:
    overrides = ["data.format=pairs", "data.path=x", "data.sources=[]", "data.min_score=2"]
    overrides += ["eval.path=null", "eval.every=5"]
    overrides += ["data.bad_rows=0.1"]
    check_effect(load_config("demo-control", overrides), overrides)
    along = ["eval.every=5", "eval.along=[i2i/seen]", "data.weighting=proportional"]
    check_effect(load_config("demo-control", along), along)
    asked = ["eval.path=x", "eval.image_root=y", "model.bottleneck=last_hidden", "data.turns=[1,2]"]
    check_effect(load_config("demo-compress", asked), asked)
    for recipe in recipe_names():  # what a recipe holds beside its own
        check_effect(load_config(recipe), [])
