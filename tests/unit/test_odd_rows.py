"""Rows as strangers write them: a record, or one ``ValueError`` that names the row."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coma_ds.assemble import build_sources
from coma_ds.config import load_config
from coma_ds.data.collate import Collator
from coma_ds.data.dialogues import DialogueFile
from coma_ds.data.pairs import COLUMNS, PairFile
from coma_ds.data.replacements import Rows
from coma_ds.data.sampler import Sources
from tests.folders import png
from tests.tiny import demo_processing

IMAGE = st.sampled_from(["a.png", "../a.png", "http://host/a.png", "b.png", "\ud800.png"])
TEXT = st.one_of(
    st.text(max_size=5),
    st.sampled_from(["<|image_1|>", "<|image_2|> x", "<|image_pad|>", "half \ud800", "<image>"]),
)
CELL = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, IMAGE),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["bytes", "path", "from", "value", "kind"]), inner),
    ),
    max_leaves=6,
)
TURN = st.fixed_dictionaries(
    {"from": st.one_of(st.sampled_from(["human", "gpt"]), CELL), "value": CELL},
    optional={"kind": CELL},
)
LINE = st.sampled_from([b"nul", b"[1]", b"\xff\xfe", b'{"query": ' + b"[" * 100_000, b'{"a": 1'])


@cache
def collator() -> Collator:
    return Collator(demo_processing(max_length=64))


def check_line(folder: Path, reader: type, good: dict, line: bytes) -> None:
    """The second line of a file is made into samples, or refused by its number."""
    file = folder / "rows.jsonl"
    file.write_bytes(json.dumps(good).encode() + b"\n" + line)
    try:
        collator().prepare(reader(file, folder)[1])
    except ValueError as error:
        assert f"{file} line 2" in str(error)


RELAXED = settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


class TestAnyRow:
    @RELAXED
    @given(st.dictionaries(st.sampled_from(COLUMNS), CELL, max_size=4))
    def test_of_pairs(self, tmp_path, cells):
        (tmp_path / "a.png").write_bytes(png(0))
        good = {"query": "a", "target": "b"}
        check_line(tmp_path, PairFile, good, json.dumps(good | cells).encode())

    @RELAXED
    @given(
        st.dictionaries(st.sampled_from(["id", "image", "images", "instruction"]), CELL),
        st.one_of(st.lists(TURN, max_size=4), CELL),
    )
    def test_of_dialogues(self, tmp_path, cells, turns):
        (tmp_path / "a.png").write_bytes(png(0))
        talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
        good = {"image": "a.png", "conversations": talk}
        for odd in (good | {"conversations": turns}, good | cells):
            check_line(tmp_path, DialogueFile, good, json.dumps(odd).encode())

    @RELAXED
    @given(LINE)
    def test_of_text(self, tmp_path, line):
        check_line(tmp_path, PairFile, {"query": "a", "target": "b"}, line)


ROW = {"qry": "say", "qry_image_path": "a.png", "pos_text": "x", "pos_image_path": ""}


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"qry_image_path": "../a.png"}, "leaves the image root"),
        ({"qry_image_path": "http://host/a.png"}, "is a URL"),
        ({"pos_text": "<|image_1|>"}, "has 0 image.s. but 1 image mark"),
        ({"pos_text": ""}, "a side is empty"),
        ({"qry_image_path": "none.png"}, "does not exist"),
    ],
)
def test_mmeb(tmp_path, cells, said):
    """A set is checked as a whole at the start, unless its bad rows are to be replaced."""
    (tmp_path / "set").mkdir()
    (tmp_path / "a.png").write_bytes(png(0))
    rows = [ROW, ROW | cells, ROW | {"pos_text": "y"}]
    file = tmp_path / "set" / "original-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    keys = ["objective=match", "data.format=mmeb", "data.sources=[set]", f"data.root={tmp_path}"]
    keys += [f"data.image_root={tmp_path}"]
    if said != "does not exist":
        with pytest.raises(ValueError, match="row 1"):
            build_sources(load_config(None, keys))
    sources = Sources(build_sources(load_config(None, [*keys, "data.bad_rows=0.1"])))
    ready = Rows(sources, collator(), replaces=True)[0, 1]
    assert ready.replaced.by == f"{file} row 2"
    with pytest.raises(ValueError, match=rf"{file} row 1: .*{said}"):
        raise ValueError(ready.replaced.reason)
    with pytest.raises(ValueError, match="no image root is set"):
        build_sources(load_config(None, [*keys[:-1], "data.bad_rows=0.1"]))
