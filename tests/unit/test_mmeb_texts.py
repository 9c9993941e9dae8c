"""MMEB sets without a column of image paths are texts alone: said, as unused columns are."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pytest

from coma_ds.data.mmeb import MMEBTrain, mmeb_eval
from coma_ds.data.tables import ArrowTable
from tests.unit.test_mmeb import _put


def test_own_sets_of_texts_alone_are_said_to_be_so(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO, logger="coma_ds")
    for name, column in (("WebQA", {"tgt_img_path": ["", ""]}), ("GQA", {"qry_img_path": ""})):
        _put(tmp_path, name, [{"qry_text": "a", "tgt_text": ["x", "y"]} | column])
        mmeb_eval(str(tmp_path), None, name)
    assert caplog.messages == [
        f"{tmp_path}/WebQA has no column qry_img_path: every query is text",
        f"{tmp_path}/GQA has no column tgt_img_path: every candidate is text",
    ]


@pytest.mark.parametrize("cut", [lambda table: table.head(1), lambda table: table.select(["a"])])
def test_a_part_of_a_table_knows_what_was_not_read(cut) -> None:
    table = ArrowTable(pa.table({"a": [1, 2], "b": [3, 4]}), [("f", 2)], "row", ["c"])
    assert table.left_out == ("c",)
    found = cut(table)
    assert set(found.columns) | set(found.left_out) == {"a", "b", "c"}


def test_training_sets_of_texts_alone_are_said_to_be_so(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO, logger="coma_ds")
    rows = [{"qry": "a", "qry_img_path": "a.png", "pos_text": "b", "pos_image_path": ""}]
    _put(tmp_path, "Own", rows, "original")
    MMEBTrain(str(tmp_path), None, "Own")
    assert caplog.messages == [
        f"{tmp_path}/Own has no column qry_image_path: every query is text",
        f"{tmp_path}/Own: columns qry_img_path are not used",
    ]
