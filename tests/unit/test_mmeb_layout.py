"""Which sets a folder of MMEB holds, and what is a folder and what a hub name."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coma_ds.data.mmeb import MMEBTrain, mmeb_eval
from coma_ds.data.mmeb_layout import OFFICIAL_SETS, check_hub_name, mmeb_eval_sets


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        table = pa.table({"qry_text": ["a"], "tgt_text": [["x", "y"]]})
        pq.write_table(table, root / name / "test-00000-of-00001.parquet")


def images(root: Path) -> None:
    """A folder that is no set."""
    (root / "images").mkdir()
    (root / "images" / "a.png").write_bytes(b"")


class TestUnknownSets:
    def test_they_are_left_out_and_named(self, tmp_path, caplog):
        put(tmp_path, "GQA", "mine", "WebQA", "yours")
        images(tmp_path)
        assert mmeb_eval_sets(str(tmp_path)) == ["GQA", "WebQA"]
        assert caplog.messages == [
            f"{tmp_path}: left out, none of the 36 sets of MMEB and not in sets.json: mine, yours"
        ]

    def test_nothing_is_said_of_known_ones(self, tmp_path, caplog):
        put(tmp_path, "GQA")
        images(tmp_path)
        assert mmeb_eval_sets(str(tmp_path)) == ["GQA"]
        assert not caplog.messages

    def test_an_index_says_which_are_meant(self, tmp_path, caplog):
        put(tmp_path, "GQA", "mine", "yours")
        index = [{"name": "mine", "group": "Ret", "domain": "OOD"}]
        (tmp_path / "sets.json").write_text(json.dumps(index))
        assert mmeb_eval_sets(str(tmp_path)) == ["mine"]
        assert not caplog.messages


NOT_THERE = [
    "nope/x",
    "/none",
    "/none/x",
    "./x",
    "../x",
    "~/x",
    ".x/y",
    "x",
    "a/b/c",
    "owner/name/",
]


class TestMissingFolders:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path, monkeypatch):
        """A working folder with ``nope`` in it, and a hub that nobody may ask."""
        import datasets

        def asked(*arguments, **_):
            raise AssertionError(f"the hub was asked for {arguments}")

        monkeypatch.setattr(datasets, "load_dataset", asked)
        (tmp_path / "nope").mkdir()
        monkeypatch.chdir(tmp_path)

    @pytest.mark.parametrize("name", NOT_THERE)
    @pytest.mark.parametrize(
        "look",
        [
            check_hub_name,
            mmeb_eval_sets,
            lambda name: mmeb_eval(name, None, "GQA"),
            lambda name: MMEBTrain(name, None, "GQA"),
        ],
        ids=["name", "sets", "eval", "train"],
    )
    def test_they_are_no_hub_names(self, name, look):
        with pytest.raises(ValueError) as caught:
            look(name)
        assert str(caught.value) == (
            f"{name}: no such folder, nor the name of a hub repository (owner/name)"
        )

    def test_a_hub_name_has_all_sets(self):
        assert mmeb_eval_sets("owner/name") == list(OFFICIAL_SETS)
        with pytest.raises(ValueError, match=r"hub as set 'GQA'.*the hub was asked for"):
            mmeb_eval("owner/name", None, "GQA")

    def test_a_folder_of_that_name_comes_first(self, tmp_path):
        put(tmp_path / "nope" / "x", "WebQA")
        assert mmeb_eval_sets("nope/x") == ["WebQA"]
        with pytest.raises(ValueError, match=r"^nope/x: no set 'GQA' here; there are WebQA"):
            mmeb_eval("nope/x", None, "GQA")
