"""What is looked at before the first step: rows, images, evaluation sets."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from coma_ds import checks, train
from coma_ds.assemble import build_data
from coma_ds.checks import check_run
from coma_ds.config import ChunkConfig, RunConfig, validate
from tests.folders import mmeb_folder, png
from tests.tiny import demo_processing


@cache
def processing(**limits):
    return demo_processing(**limits)


def config_of(folder: Path, *, evaluation: dict | None = None, **data) -> RunConfig:
    """A run over the pairs, or the dialogues, of a file in ``folder``."""
    kind = data.pop("format", "pairs")
    data = {"format": kind, "path": str(folder / f"{kind}.jsonl"), "workers": 0} | data
    return validate({
        "objective": "match" if kind in ("pairs", "builtin") else "compress",
        "data": data | {"image_root": str(folder)},
        "eval": {"at_end": False} | (evaluation or {}),
        "optim": {"batch_size": 4, "steps": 3},
    })  # fmt: skip


def write_pairs(folder: Path, count: int, **rows: dict) -> None:
    """Rows of one good picture; ``row_7={...}`` changes the cells of row 7."""
    (folder / "good.png").write_bytes(png(0))
    lines = [
        {"query": f"find number {i}", "target_image": "good.png", "negatives": [f"not {i}"]}
        | rows.get(f"row_{i}", {})
        for i in range(count)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))


def write_dialogues(path: Path, *images: str) -> None:
    (path.parent / "good.png").write_bytes(png(0))
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "a thing"}]
    lines = [{"image": image, "conversations": turns} for image in images]
    path.write_text("\n".join(map(json.dumps, lines)))


def test_a_sample_above_the_budget_of_a_chunk_is_told(tmp_path, caplog):
    write_pairs(tmp_path, 8)
    config, budget = config_of(tmp_path), "a sample of 26 tokens is above chunk.tokens"
    for tokens in (None, 26, 25):
        look(config.model_copy(update={"chunk": ChunkConfig(tokens=tokens)}))
        assert (f"{budget} {tokens} and goes alone" in caplog.text) == (tokens == 25)


def look(config: RunConfig, *, thorough: bool = False, **limits) -> None:
    check_run(config, build_data(config, processing(**limits)), thorough=thorough)


def refusal(config: RunConfig, **options) -> str:
    with pytest.raises(ValueError) as caught:
        look(config, **options)
    return str(caught.value)


class TestRows:
    def test_good_rows_are_good(self, tmp_path):
        write_pairs(tmp_path, 40)
        look(config_of(tmp_path))

    @pytest.mark.parametrize("row", [0, 23, 39])
    @pytest.mark.parametrize(
        ("cells", "said"),
        [
            ({"query": ""}, "empty query; give it a text or an image"),
            ({"target": "no <|image_3|>"}, "target: the text has the image marks <|image_3|>"),
            ({"query": "say <|image_pad|>"}, "the text 'say <|image_pad|>' contains"),
            ({"negatives": ["<|compress_3|>"]}, "the text '<|compress_3|>' contains"),
            ({"target_image": "none.png"}, "image {folder}/none.png does not exist"),
            ({"target_image": "broken.png"}, "image {folder}/broken.png is truncated or broken"),
        ],
    )
    def test_a_bad_row_is_named_wherever_it_stands(self, tmp_path, row, cells, said):
        write_pairs(tmp_path, 40, **{f"row_{row}": cells})
        (tmp_path / "broken.png").write_bytes(png(0)[:-400])
        found = refusal(config_of(tmp_path))
        where = f"{tmp_path}/pairs.jsonl line {row + 1}"
        assert found.startswith(where) and found.count(where) == 1
        assert said.format(folder=tmp_path) in found

    @pytest.mark.parametrize(
        ("cells", "said"),
        [
            ({"query": 3}, "query must be a text, got int 3"),
            ({"query": "say <|image_pad|>"}, "the text 'say <|image_pad|>' contains"),
            ({"target_image": "none.png"}, "image {folder}/none.png does not exist"),
        ],
    )
    def test_texts_and_files_of_many_rows_are_looked_at(self, tmp_path, cells, said):
        """More than are made into batches."""
        write_pairs(tmp_path, 400, row_1=cells)
        found = refusal(config_of(tmp_path))
        assert found.startswith(f"{tmp_path}/pairs.jsonl line 2: {said.format(folder=tmp_path)}")

    def test_some_rows_are_made_into_samples(self, tmp_path):
        """Only then it shows that the images of a row have too many tokens."""
        write_pairs(tmp_path, 40, row_17={"target_image": ["good.png"] * 3})
        look(config_of(tmp_path))
        found = refusal(config_of(tmp_path), max_length=40)
        assert found.startswith(f"{tmp_path}/pairs.jsonl line 18: {tmp_path}/good.png, ")
        assert "the images alone take 54 tokens" in found

    def test_a_dialogue_that_spells_our_tokens(self, tmp_path):
        write_dialogues(tmp_path / "dialogues.jsonl", *["good.png"] * 300)
        lines = (tmp_path / "dialogues.jsonl").read_text().split("\n")
        lines[1] = lines[1].replace("a thing", "a <|image_pad|>")
        (tmp_path / "dialogues.jsonl").write_text("\n".join(lines))
        found = refusal(config_of(tmp_path, format="dialogues"))
        assert found.startswith(f"{tmp_path}/dialogues.jsonl line 2: the text 'a <|image_pad|>'")

    def test_a_dry_run_tells_what_it_saw(self, tmp_path, caplog):
        caplog.set_level(logging.INFO, logger="coma_ds")
        write_pairs(tmp_path, 40, row_2={"query": "word " * 20})
        look(config_of(tmp_path))
        assert not caplog.messages
        look(config_of(tmp_path), thorough=True)
        longest = len(processing().encode("word " * 20)) + 8
        assert caplog.messages[0].startswith("the config of this run:\nrecipe: ''\nobjective: mat")
        assert caplog.messages[1:] == [
            f"source pairs.jsonl: 40 of 40 rows looked at, up to {longest} tokens in a sample",
            "arithmetic 3 steps x 4 = 12 samples, 0.30 passes over 40 rows",
        ]


class TestBadRowsAllowed:
    """With ``data.bad_rows`` a few bad rows are a warning."""

    def test_they_are_counted_and_named(self, tmp_path, caplog):
        bad = {f"row_{row}": {"query": ""} for row in (2, 9, 30)}
        bad |= {f"row_{row}": {"target_image": "none.png"} for row in (4, 31)}
        bad["row_35"] = {"target_image": ["good.png"] * 4}
        write_pairs(tmp_path, 40, **bad)
        look(config_of(tmp_path, bad_rows=0.15), max_length=64)
        (message,) = caplog.messages
        head, *lines = message.split("\n")
        assert head == "6 of 40 rows looked at are bad; others will be read in their place:"
        found = [int(line.removeprefix(f"{tmp_path}/pairs.jsonl line ").split(":")[0]) - 1
                 for line in lines]  # fmt: skip
        assert found == [2, 9, 30, 4, 31]
        assert lines[0].endswith("empty query; give it a text or an image")
        found = refusal(config_of(tmp_path, bad_rows=0.149), max_length=64)
        assert found.startswith(
            "6 of 40 rows looked at are bad, more than data.bad_rows 0.149 allows: repair or drop "
            "them, or raise data.bad_rows; the first of them:\n"
        )
        assert found.split("\n")[1:] == lines
        assert "line 3: empty query" in refusal(config_of(tmp_path))

    def test_good_rows_are_no_warning(self, tmp_path, caplog):
        write_pairs(tmp_path, 40)
        look(config_of(tmp_path, bad_rows=0.1))
        assert not caplog.messages

    @pytest.mark.parametrize(("bad", "enough"), [(10, True), (11, False)])
    def test_a_share_of_the_images_counts_too(self, tmp_path, bad, enough, caplog, monkeypatch):
        """Of very many rows only some are searched for their images."""
        monkeypatch.setattr(checks, "EVERY_RUN", replace(checks.EVERY_RUN, found=500))
        seen = [(row * 4000) // 500 for row in range(500)]
        rows = {f"row_{row}": {"target_image": "none.png"} for row in seen[:bad]}
        write_pairs(tmp_path, 4000, **rows)
        config = config_of(tmp_path, bad_rows=0.01)
        if enough:
            look(config)
            assert f"{bad} of 4000 rows looked at are bad" in caplog.text
        else:
            assert refusal(config).startswith("11 of 500 rows looked at are bad, more than data.b")

    @pytest.mark.parametrize("cells", [{"target_image": "none.png"}, {"query": ""}])
    def test_no_row_of_a_common_file_is_left_unseen(self, tmp_path, cells):
        write_pairs(tmp_path, 3001, row_1777=cells)
        assert refusal(config_of(tmp_path)).startswith(f"{tmp_path}/pairs.jsonl line 1778: ")

    def test_a_run_says_how_much_of_a_large_file_it_saw(self, tmp_path, caplog, monkeypatch):
        caplog.set_level(logging.INFO, logger="coma_ds")
        monkeypatch.setattr(checks, "EVERY_RUN", replace(checks.EVERY_RUN, found=5))
        write_pairs(tmp_path, 40)
        look(config_of(tmp_path))
        assert caplog.messages == [
            "source pairs.jsonl: 5 of 40 rows were looked at (--dry-run looks at more)"
        ]

    def test_a_task_of_good_rows_is_known(self, tmp_path):
        write_pairs(tmp_path, 40, row_1={"query": "", "task": "lost"}, row_2={"task": "mine"})
        config = config_of(tmp_path, bad_rows=0.1)
        for name in ("mine", "lost"):
            match = config.match.model_copy(update={"task_temperature": {name: 0.1}})
            asked = config.model_copy(update={"match": match})
            if name == "mine":
                look(asked)
            else:
                assert "no task 'lost' in the rows" in refusal(asked)

    def test_an_evaluation_set_is_never_replaced(self, tmp_path):
        config = evaluated(tmp_path, sets=["find"])
        data = config.data.model_copy(update={"bad_rows": 0.9})
        (tmp_path / "mmeb" / "images" / "7.png").write_bytes(b"no image")
        found = refusal(config.model_copy(update={"data": data}))
        assert found.startswith("evaluation set find, candidate 7: image ")


def evaluated(folder: Path, **evaluation) -> RunConfig:
    """A run over good pairs that evaluates ``folder/mmeb``."""
    write_pairs(folder, 4)
    place = folder / "mmeb"
    if not place.exists():
        mmeb_folder(place)
    root = {"root": str(place), "image_root": str(place / "images")}
    return config_of(folder, evaluation=root | {"at_end": True} | evaluation)


@pytest.mark.parametrize("thorough", [False, True])
class TestRankingSets:
    def test_sets_that_are_there(self, tmp_path, thorough, caplog):
        caplog.set_level(logging.INFO, logger="coma_ds")
        look(evaluated(tmp_path, along=["say"]), thorough=thorough)
        told = [line for line in caplog.messages if line.startswith("evaluation set ")]
        all_sets = ["evaluation set find: 9 queries", "evaluation set say: 5 queries"]
        assert told == (all_sets if thorough else [])

    def test_images_below_the_root_need_no_image_root(self, tmp_path, thorough):
        look(evaluated(tmp_path, image_root=None), thorough=thorough)
        (tmp_path / "mmeb" / "images").rename(tmp_path / "elsewhere")
        found = refusal(evaluated(tmp_path, image_root=None), thorough=thorough)
        assert "no image root is set: name the folder" in found and "eval.image_root" in found
        look(evaluated(tmp_path, image_root=str(tmp_path / "elsewhere")), thorough=thorough)

    @pytest.mark.parametrize(
        ("name", "where"),
        [("7.png", "evaluation set find, candidate 7"), ("2.png", "evaluation set say, query 2")],
    )
    def test_a_missing_image(self, tmp_path, thorough, name, where):
        config = evaluated(tmp_path, sets=[where.split()[2].rstrip(",")])
        (tmp_path / "mmeb" / "images" / name).unlink()
        found = refusal(config, thorough=thorough)
        assert found.startswith(f"{where}: image {tmp_path}/mmeb/images/{name} does not exist")

    @pytest.mark.parametrize("key", ["sets", "along"])
    def test_an_unknown_name(self, tmp_path, thorough, key):
        found = refusal(evaluated(tmp_path, **{key: ["say", "finds"]}), thorough=thorough)
        assert found == (
            f"eval.{key}: 'finds' is not in {tmp_path}/mmeb (eval.{key}=[] takes all): it has "
            "find, say"
        )

    def test_a_folder_that_is_not_there(self, tmp_path, thorough):
        config = evaluated(tmp_path, root=str(tmp_path / "none"))
        assert refusal(config, thorough=thorough).startswith(f"{tmp_path}/none: no such folder")

    def test_a_set_that_cannot_be_read(self, tmp_path, thorough):
        config = evaluated(tmp_path)
        (file,) = (tmp_path / "mmeb" / "say").iterdir()
        file.write_bytes(b"no parquet")
        assert str(file) in refusal(config, thorough=thorough)

    def test_nothing_is_evaluated_so_nothing_is_looked_at(self, tmp_path, thorough):
        none = {"root": str(tmp_path / "none"), "sets": ["finds"], "every": 0}
        look(evaluated(tmp_path, **none, at_end=False), thorough=thorough)
        for when in ({"at_end": True}, {"at_end": False, "every": 2}):
            assert "no such folder" in refusal(
                evaluated(tmp_path, **none | when), thorough=thorough
            )


def test_a_foreign_folder_in_the_place_of_the_built_in_sets(tmp_path):
    """Said before the training that it would cost."""
    config = validate({
        "objective": "match", "output": str(tmp_path / "run"),
        "data": {"format": "builtin", "workers": 0}, "optim": {"batch_size": 4, "steps": 3},
    })  # fmt: skip
    look(config)
    (tmp_path / "evaluation_sets").mkdir()
    (tmp_path / "evaluation_sets" / "mine.txt").touch()
    assert "evaluation_sets exists but holds no sets.json and made_from.txt" in refusal(config)
    look(config.model_copy(update={"eval": config.eval.model_copy(update={"at_end": False})}))


def test_an_unknown_set_of_the_built_in_data(tmp_path):
    config = config_of(
        tmp_path, format="builtin", evaluation={"at_end": True, "sets": ["i2i/seen", "i2i"]}
    )
    found = refusal(config)
    assert found.startswith("eval.sets: 'i2i' is not in the built-in data: it has ")
    assert "i2i/seen" in found


class TestQuestions:
    def asked(self, folder: Path, *images: str, **evaluation) -> RunConfig:
        write_dialogues(folder / "dialogues.jsonl", *["good.png"] * 4)
        (folder / "more").mkdir()
        if images:
            write_dialogues(folder / "more" / "asked.jsonl", *images)
        given = {"path": str(folder / "more" / "asked.jsonl"), "image_root": str(folder / "more")}
        return config_of(
            folder, format="dialogues", evaluation=given | {"at_end": True} | evaluation
        )

    def test_questions_that_are_there(self, tmp_path):
        config = self.asked(tmp_path, "good.png", "other.png")
        (tmp_path / "more" / "other.png").write_bytes(png(1))
        look(config)

    def test_the_blind_control_needs_another_picture(self, tmp_path):
        found = refusal(self.asked(tmp_path, "good.png", "good.png"))
        assert found.startswith("all dialogues have the same images")

    def test_a_missing_file(self, tmp_path):
        assert f"{tmp_path}/more/asked.jsonl" in refusal(self.asked(tmp_path))

    @pytest.mark.parametrize("thorough", [False, True])
    def test_a_missing_image(self, tmp_path, thorough):
        found = refusal(self.asked(tmp_path, "good.png", "none.png"), thorough=thorough)
        where = f"{tmp_path}/more/asked.jsonl line 2"
        assert found.startswith(f"{where}: image {tmp_path}/more/none.png does not exist")

    def test_a_bad_row(self, tmp_path):
        found = refusal(self.asked(tmp_path, "good.png", "/abs.png"))
        assert found.startswith(f"{tmp_path}/more/asked.jsonl line 2: image path '/abs.png' is abs")

    def test_nothing_is_evaluated_so_nothing_is_looked_at(self, tmp_path):
        config = self.asked(tmp_path, at_end=False, every=0)
        look(config)
        every = config.eval.model_copy(update={"every": 1})
        assert "asked.jsonl" in refusal(config.model_copy(update={"eval": every}))


class Built(Exception):
    """The engine would be built now."""


class TestTrain:
    @pytest.fixture(autouse=True)
    def alone(self, monkeypatch):
        """No process group, no engine, the log stays with pytest."""

        def build(*_):
            raise Built

        monkeypatch.setattr(train.engine, "start", lambda: torch.device("cpu"))
        monkeypatch.setattr(train.hardware, "share_threads", lambda: None)
        monkeypatch.setattr(train, "build_engine", build)
        monkeypatch.setattr("coma_ds.run.log_to_stderr", lambda main: None)

    def argv(self, folder: Path) -> list[str]:
        return [
            "--recipe", "demo-match", "init_from=null", f"output={folder}/run", "data.workers=0",
            "data.format=pairs", f"data.path={folder}/pairs.jsonl", f"data.image_root={folder}",
            "data.sources=[]", "data.sub_batch=0", "optim.batch_size=4", "eval.every=0",
            "eval.at_end=false",
        ]  # fmt: skip

    @pytest.mark.parametrize("dry", [[], ["--dry-run"]])
    def test_a_bad_row_ends_the_run_before_anything_is_built(self, tmp_path, dry):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("before")
        write_pairs(tmp_path, 300)
        with pytest.raises(Built):
            train.main([*self.argv(tmp_path), *dry])
        write_pairs(tmp_path, 300, row_1={"query": "say <|image_pad|>"})
        with pytest.raises(ValueError, match=r"pairs\.jsonl line 2: the text 'say <\|image_pad"):
            train.main([*self.argv(tmp_path), *dry])
        kept = [
            p.name for p in (tmp_path / "run").iterdir() if p.name not in (".lock", ".owner.json")
        ]
        assert kept == ["config.yaml"]
        assert (tmp_path / "run" / "config.yaml").read_text() == "before"

    @pytest.mark.parametrize("dry", [[], ["--dry-run"]])
    def test_a_dry_run_looks_thoroughly(self, tmp_path, dry, caplog):
        caplog.set_level(logging.INFO, logger="coma_ds")
        write_pairs(tmp_path, 4)
        with pytest.raises(Built):
            train.main([*self.argv(tmp_path), *dry])
        assert ("source pairs.jsonl: 4 of 4 rows" in caplog.text) == bool(dry)
