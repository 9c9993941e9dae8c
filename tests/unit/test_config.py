"""The run configuration: strict, typed, and clear about what is wrong."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from coma_ds.config import RunConfig, dump, load_config
from coma_ds.recipe_files import parse_overrides, read_recipe, recipe_names


def fails(*overrides: str, recipe: str | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(recipe, list(overrides))
    assert not isinstance(caught.value, ValidationError)
    return str(caught.value)


@pytest.mark.parametrize(
    "override, said",
    [
        ("chunk.keep=-1", "chunk.keep: Input should be greater than or equal to 0, or 'auto' (giv"),
        ("model.liger=maybe", "unable to interpret input, or 'auto' (given: 'maybe')"),
        ("data.turns=[3, x]", "data.turns.1: Input should be a valid integer, unable"),
    ],
)
def test_a_value_that_may_be_of_several_types_has_one_error(override, said) -> None:
    words = fails(override)
    assert said in words and words.count("given") == 1


def test_defaults_then_recipe_then_overrides(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 1e-3, steps: 7}\nmodel: {pooling: last}\n")
    config = load_config(str(file), ["optim.lr=2e-5", "model.lora.rank=8"])
    assert config.optim.lr == 2e-5 and config.optim.steps == 7
    assert config.model.pooling == "last" and config.model.lora.rank == 8
    assert config.model.lora.alpha == 64 and config.optim.warmup == 0.05
    assert config.recipe == str(file)
    assert load_config(None) == RunConfig()


def test_a_base_lies_below_its_recipe(tmp_path) -> None:
    lower, upper = tmp_path / "lower.yaml", tmp_path / "upper.yaml"
    lower.write_text("optim: {lr: 1e-3, steps: 7}\ninit_from: runs/a\n")
    upper.write_text(f"base: {lower}\noptim: {{steps: 9}}\ninit_from: null\n")
    config = load_config(str(upper))
    assert (config.optim.lr, config.optim.steps, config.init_from) == (1e-3, 9, None)


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("optim.lr=5e-5", "optim.lr", 5e-5),  # YAML 1.1 reads it as text
        ("optim.steps=1e3", "optim.steps", 1000),
        ("match.temperature=.05", "match.temperature", 0.05),
        ("logging.tensorboard=off", "logging.tensorboard", False),
        ("chunk.tokens=null", "chunk.tokens", None),
        ("data.sources=[a, b]", "data.sources", ("a", "b")),
        ("eval.sets=[name_t2i/seen]", "eval.sets", ("name_t2i/seen",)),
        ("optim.betas=[9e-1, 0.95]", "optim.betas", (0.9, 0.95)),
        ("output=runs/a=b", "output", "runs/a=b"),
        ("output=2024", "output", "2024"),
        ("output=1e3", "output", "1e3"),
        ("seed=3", "seed", 3),
        ("data.columns.query=title", "data.columns", {"query": "title"}),
    ],
)
def test_overrides_are_yaml(word, key, value) -> None:
    found = load_config(None, [word])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


def test_later_overrides_win_and_keep_their_neighbours() -> None:
    config = load_config(None, ["optim.lr=1e-3", "optim.steps=5", "optim.lr=2e-3"])
    assert (config.optim.lr, config.optim.steps) == (2e-3, 5)


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("optim.learning_rate=1", None),
        ("optim.lrr=1", "optim.lr"),
        ("lr=1", "optim.lr"),
        ("temperature=1", "match.temperature"),
        ("model.lora.rnk=1", "model.lora.rank"),
        ("modle.pooling=mean", "model.pooling"),
        ("optim.lr.x=1", None),
    ],
)
def test_an_unknown_key_names_the_nearest(word, nearest) -> None:
    message = fails(word)
    if word == "optim.lr.x=1":
        assert message.startswith("optim.lr: ")
        return
    key = word.partition("=")[0]
    assert message.startswith("override: unknown key '")
    assert any(part in message for part in (key, key.split(".")[0]))
    assert nearest is None or f"did you mean {nearest!r}?" in message or "'model'" in message


def test_an_unknown_key_of_a_file_names_the_file(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim:\n  lr: 1e-3\n  stepz: 3\n")
    wanted = f"recipe {str(file)!r}: unknown key 'optim.stepz'; did you mean 'optim.steps'?"
    assert fails(recipe=str(file)) == wanted


def test_a_section_is_not_a_value() -> None:
    assert fails("optim=3") == "override: 'optim' is a section, give its keys (optim.KEY=VALUE)"
    assert "'model.lora' is a section" in fails("model.lora=true")


@pytest.mark.parametrize("word", ["optim.lr", "=3", "verbose"])
def test_an_override_without_a_value_is_an_error(word) -> None:
    assert fails(word).startswith(f"override {word!r}: expected KEY=VALUE, for example")


def test_an_override_that_is_not_yaml_is_an_error() -> None:
    found = fails("data.sources=[a")
    assert found.startswith("override 'data.sources=[a': the value is not YAML (")
    assert "\n" not in found


@pytest.mark.parametrize(
    ("text", "line"),
    [("optim:\n  lr: 1e-3\n steps: 3\n", 3), ("a: [1, 2\nb: 3\n", 2), ("objective: 'x\n", 2)],
)
def test_broken_yaml_names_file_and_line(text, line, tmp_path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    message = fails(recipe=str(file))
    assert message.startswith(f"recipe {str(file)!r} is not YAML: an error in line {line} (")


def test_a_key_given_twice_is_an_error(tmp_path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("optim:\n  lr: 1e-3\n  steps: 5\n  lr: 2e-3\n")
    assert fails(recipe=str(file)).endswith("an error in line 4 ('lr' is given twice)")


def test_bases_in_a_circle_are_an_error(tmp_path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"base: {two}\n")
    two.write_text(f"base: {one}\n")
    assert fails(recipe=str(one)) == (
        f"recipe {str(one)!r}: its bases go in a circle, {one} -> {two}"
    )


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_yaml_that_is_no_mapping_is_an_error(text, tmp_path) -> None:
    file = tmp_path / "list.yaml"
    file.write_text(text)
    assert "expected a mapping of keys, found " in fails(recipe=str(file))


def test_a_recipe_that_is_not_there_names_the_nearest(tmp_path) -> None:
    message = fails(recipe="demo-compres")
    assert message.startswith("recipe 'demo-compres': did you mean 'demo-compress'? shipped are ")
    assert all(name in message for name in recipe_names())
    assert fails(recipe="zzzzz").startswith("recipe 'zzzzz': shipped are ")
    file = tmp_path / "none.yaml"
    assert fails(recipe=str(file)) == f"recipe file {str(file)!r} does not exist"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr=0"], "optim.lr: Input should be greater than 0 (given: 0)"),
        (["optim.lr=fast"], "optim.lr: "),
        (["optim.lr=.inf"], "optim.lr: "),
        (["optim.clip=.nan"], "optim.clip: "),
        (["optim.lr="], "optim.lr: "),
        (["optim.steps=1.5"], "optim.steps: "),
        (["optim.steps=-1"], "optim.steps: "),
        (["optim.batch_size=0"], "optim.batch_size: "),
        (["optim.warmup=1.5"], "optim.warmup: "),
        (["optim.betas=[0.9]"], "optim.betas"),
        (["model.pooling=max"], "model.pooling: Input should be 'mean', 'attention' or 'last'"),
        (["model.family=llava"], "model.family: Input should be 'qwen2_vl', 'qwen2_5_vl' or"),
        (["model.compression_tokens=-1"], "model.compression_tokens: "),
        (["model.lora.dropout=1"], "model.lora.dropout: "),
        (["match.temperature=-0.1"], "match.temperature: "),
        (["chunk.samples=0"], "chunk.samples: "),
        (["data.sources=name"], "data.sources: "),
        (["logging.progress=maybe"], "logging.progress: "),
        (["objective=both"], "objective: Input should be 'compress' or 'match' (given: 'both')"),
        (["output=[3]"], "output: Input should be a valid string (given: [3])"),
    ],
)
def test_a_wrong_value_names_its_key(words, message) -> None:
    assert fails(*words).startswith(message)


def test_every_wrong_value_is_named_at_once() -> None:
    message = fails("optim.lr=-1", "chunk.samples=0")
    assert ("optim.lr: " in message and "; chunk.samples: " in message) or (
        "chunk.samples: " in message and "; optim.lr: " in message
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.compression_tokens=0"], "model.compression_tokens is 0: this objective reads"),
        (
            ["objective=match", "compress.visible=true", "model.compression_tokens=0"],
            "model.compression_tokens is 0",
        ),
        (["objective=match", "data.format=dialogues"], "data.format 'dialogues' has no pairs"),
        (["objective=match", "optim.batch_size=1", "data.sub_batch=0"], "optim.batch_size is 1: a"),
        (["model.lora.targets=[]"], "model.lora.targets"),
        (["data.format=mmeb"], "data.format 'mmeb' has no dialogues"),
        (["data.format=pairs"], "data.format 'pairs' has no dialogues"),
        (
            ["objective=match", "optim.batch_size=100", "data.sub_batch=64"],
            "optim.batch_size 100 is not a multiple of data.sub_batch 64",
        ),
        (
            ["model.min_vision_tokens=9", "model.max_vision_tokens=8"],
            "model: min_vision_tokens 9 is above max_vision_tokens 8",
        ),
        (
            ["model.max_vision_tokens=480", "model.max_length=512"],
            "model: max_vision_tokens 480 and 32 compression tokens do not fit in max_length 512",
        ),
        (["optim.kind=muon", "optim.token_lr=1"], "optim: token_lr has no effect with kind 'muon'"),
        (["model.max_length=32"], "model: 32 compression tokens do not fit in max_length 32"),
    ],
)
def test_what_does_not_go_together_is_said(words, message) -> None:
    assert fails(*words).startswith(message)


def test_no_tokens_are_right_with_the_rule_off() -> None:
    config = load_config(None, ["compress.visible=true", "model.compression_tokens=0"])
    assert config.model.compression_tokens == 0


def test_the_tree_is_frozen() -> None:
    config = RunConfig()
    with pytest.raises(ValidationError):
        config.optim.lr = 1.0
    with pytest.raises(ValidationError):
        config.seed = 1


@pytest.mark.parametrize("name", [None, *recipe_names()])
def test_what_is_dumped_loads_as_the_same_config(name, tmp_path) -> None:
    config = load_config(name, ["seed=5", "optim.lr=1e-4", "data.columns.query=title"])
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    assert load_config(str(file)) == config
    assert load_config(str(file), ["seed=6"]) != config
    assert yaml.safe_load(dump(config)) == config.model_dump(mode="json")


@settings(max_examples=40)
@given(
    st.floats(1e-12, 1e3),
    st.integers(0, 2**40),
    st.lists(st.text(st.characters(codec="ascii"), max_size=6), max_size=3),
)
def test_any_values_survive_the_file(lr, seed, sources) -> None:
    tree = {"optim": {"lr": lr}, "seed": seed, "data": {"sources": sources}}
    config = RunConfig.model_validate(tree)
    assert RunConfig.model_validate(yaml.safe_load(dump(config))) == config


@pytest.mark.parametrize(
    "text, said",
    [
        (b"? [a]\n: 1\n", "is not YAML: an error in line 1 (a key that is a list or a mapping)"),
        (b"{a}: 1\n", "is not YAML: an error in line 1 (a key that is a list or a mapping)"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_a_recipe_that_is_no_plain_yaml(tmp_path, text, said) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(text)
    with pytest.raises(ValueError) as caught:
        load_config(str(file))
    assert str(file) in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize("override", ["output={{run}}", "optim={{a}: 1}"])
def test_an_override_that_is_no_plain_yaml(override) -> None:
    assert fails(override).startswith(f"override {override!r}: the value is not YAML (a key that")


def test_an_empty_recipe_name() -> None:
    with pytest.raises(ValueError, match="recipe ''"):
        load_config("")


def test_reading_a_recipe_keeps_no_state() -> None:
    first, second = read_recipe("qwen2_5_vl_3b-control"), read_recipe("qwen2_5_vl_3b-control")
    assert first == second and "base" not in first
    first["optim"]["lr"] = 7
    assert read_recipe("qwen2_5_vl_3b-match")["optim"]["lr"] != 7
    assert parse_overrides([]) == {}


@pytest.mark.parametrize("words", [["optim=3", "optim.steps=2"], ["optim.steps=2", "optim=3"]])
def test_a_section_given_a_value_and_keys(words) -> None:
    with pytest.raises(ValueError, match=r"'optim' is given a value and keys"):
        parse_overrides(words)


@pytest.mark.parametrize(
    "override, said",
    [
        ("optim.betas=[0.9, 1.5]", "optim.betas.1: "),
        ("output=''", "output: "),
        ("seed=-1", "seed: "),
        ("data.turns=[5, 3]", "data: turns [5, 3]: expected (least, most)"),
        ("compress={loss: kl, visible: true}", "the teacher sees the image too"),
        ("optim.steps=yes", "optim.steps: expected a number, got true"),
        ("optim.lr=no", "optim.lr: expected a number, got false"),
        ("data.limit=yes", "data.limit: expected a number, got true"),
        ("optim={kind: muon, token_lr: 1e-3}", "leave it out (optim.token_lr=null)"),
    ],
)
def test_values_out_of_range_name_their_key(override, said) -> None:
    assert said in fails(override)
