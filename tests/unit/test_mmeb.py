"""MMEB-train and MMEB-eval: columns, text quirks, pools, groups, refusals, speed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from coma_ds.data.mmeb import (
    MMEBTrain,
    instructed_candidate,
    instructed_query,
    mark_image,
    mmeb_eval,
)
from coma_ds.data.mmeb_layout import OFFICIAL_SETS, mmeb_eval_sets
from coma_ds.data.records import RankingTask, Side

MARK = "<|image_1|>"


def _put(
    root: Path, name: str, rows: Any, split: str = "test", part: str = "00000-of-00001"
) -> None:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    pa.parquet.write_table(table, folder / f"{split}-{part}.parquet")


def _side(side: Side) -> tuple[str, str]:
    assert len(side.images) <= 1
    return side.text, side.images[0].path if side.images else ""  # type: ignore[attr-defined]


def _ranked(task: RankingTask) -> list[list[tuple[str, str]]]:
    return [[_side(task.pool[int(at)]) for at in part] for part in task.candidates]


TRAIN_ROW = {
    "qry": f"{MARK} Represent the given image.\n",
    "qry_image_path": "images/a.jpg",
    "pos_text": "fox",
    "pos_image_path": "",
}


def test_train_columns(tmp_path: Path) -> None:
    _put(
        tmp_path,
        "SUN397",
        [
            TRAIN_ROW | {"neg_text": "dog", "neg_image_path": None},
            {
                "qry": "Find: a fox.",
                "qry_image_path": None,
                "pos_text": f"{MARK} Represent it.",
                "pos_image_path": "b.jpg",
                "neg_text": None,
                "neg_image_path": "",
            },
            TRAIN_ROW | {"neg_text": "", "neg_image_path": "c.jpg"},
        ],
        "original",
    )
    data = MMEBTrain(str(tmp_path), "/images", "SUN397")
    assert len(data) == 3
    first, second, third = data
    assert _side(first.query) == (f"{MARK} Represent the given image.\n", "images/a.jpg")
    assert first.query.images[0].name == "/images/images/a.jpg"
    assert _side(first.target) == ("fox", "")
    assert [_side(side) for side in first.negatives] == [("dog", "")]
    assert _side(second.query) == ("Find: a fox.", "")
    assert _side(second.target) == (f"{MARK} Represent it.", "b.jpg")
    assert second.negatives == ()
    assert [_side(side) for side in third.negatives] == [(MARK, "c.jpg")]
    assert second.name == f"{tmp_path}/SUN397/original-00000-of-00001.parquet row 1"


def test_train_without_optional_columns_and_in_parts(tmp_path: Path) -> None:
    _put(tmp_path, "a/b", [{"qry": "x", "pos_text": "y"}] * 3, "original", "00000-of-00002")
    _put(tmp_path, "a/b", [{"qry": "x", "pos_text": "z"}] * 3, "original", "00001-of-00002")
    _put(tmp_path, "a/b", [{"qry": "other", "pos_text": "y"}], "diverse_instruction")
    data = MMEBTrain(str(tmp_path), None, "a/b")
    assert [pair.target.text for pair in data] == ["y"] * 3 + ["z"] * 3
    assert data[4].name.endswith("original-00001-of-00002.parquet row 1")
    assert len(MMEBTrain(str(tmp_path), None, "a/b", limit=4)) == 4
    assert MMEBTrain(str(tmp_path), None, "a/b", limit=4)[3].name == data[3].name
    assert [p.query.text for p in MMEBTrain(str(tmp_path), None, "a/b", "diverse_instruction")] == [
        "other"
    ]


def test_image_mark_is_added_where_a_text_lacks_it() -> None:
    assert mark_image("text", "") == "text"
    assert mark_image("text", "a.jpg") == f"{MARK} text"
    assert mark_image("", "a.jpg") == MARK
    assert mark_image(f"see {MARK}", "a.jpg") == f"see {MARK}"


def test_query_quirks_of_the_reference() -> None:
    """Worked by hand from the rules of paper.md."""
    inst = f"{MARK} Represent the image for: \n"
    assert instructed_query(inst, "x", True, False, False) == (
        f"{MARK}  Represent the image for:\n x\n"
    )
    assert instructed_query(f"{MARK} Answer:", "why?", True, True, False) == (
        f"{MARK}\nAnswer: why?\n"
    )
    assert instructed_query(f"{MARK} Name it", "", True, False, False) == f"{MARK}  Name it\n"
    assert instructed_query("Find:", "a fox", False, False, False) == "Find: a fox\n"
    assert instructed_query("Find:", "a fox", False, True, True) == "Find: a fox\n\n"


def test_candidate_quirks_of_the_reference() -> None:
    assert instructed_candidate(f"{MARK} Represent.", "", False) == f"{MARK}  Represent.\n"
    assert instructed_candidate(f"{MARK} Represent.", "", True) == f"{MARK}  Represent."
    assert instructed_candidate("Show:", "cap", True) == f"{MARK} Show: cap\n"
    assert instructed_candidate("Show: \n", "cap", False) == f"{MARK} Show:\n cap\n"


def test_eval_of_the_first_version(tmp_path: Path) -> None:
    rows = [
        {
            "qry_text": f"{MARK} What?\n",
            "qry_img_path": "q0.jpg",
            "tgt_text": ["fox", "dog", "cat"],
            "tgt_img_path": ["", "", ""],
        },
        {
            "qry_text": f"{MARK} What?\n",
            "qry_img_path": "q1.jpg",
            "tgt_text": ["cat", "fox", "cat", "owl"],
            "tgt_img_path": ["", "", "", ""],
        },
    ]
    _put(tmp_path, "ImageNet-1K", rows)
    task = mmeb_eval(str(tmp_path), "/images", "ImageNet-1K")
    assert (task.name, task.group, task.domain) == ("ImageNet-1K", "Cls", "IND")
    assert [_side(query) for query in task.queries] == [
        (f"{MARK} What?\n", "q0.jpg"),
        (f"{MARK} What?\n", "q1.jpg"),
    ]
    assert [side.text for side in task.pool] == ["fox", "dog", "cat", "owl"]
    assert [part.tolist() for part in task.candidates] == [[0, 1, 2], [2, 0, 3]]
    assert task.candidates[0].dtype == np.int64
    assert len(mmeb_eval(str(tmp_path), "/images", "ImageNet-1K", limit=1).pool) == 3


def test_candidates_differ_by_text_or_by_path(tmp_path: Path) -> None:
    row = {
        "qry_text": "Find it",
        "qry_img_path": None,
        "tgt_text": [f"{MARK} a", f"{MARK} b", f"{MARK} a", f"{MARK} a", ""],
        "tgt_img_path": ["1.jpg", "1.jpg", "2.jpg", "1.jpg", "3.jpg"],
    }
    _put(tmp_path, "RefCOCO-Matching", [row])
    task = mmeb_eval(str(tmp_path), "/images", "RefCOCO-Matching")
    assert (task.group, task.domain) == ("VG", "OOD")
    assert _ranked(task) == [
        [(f"{MARK} a", "1.jpg"), (f"{MARK} b", "1.jpg"), (f"{MARK} a", "2.jpg"), (MARK, "3.jpg")]
    ]
    assert task.candidates[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "query_image", "texts", "paths", "query", "candidates"),
    [
        ("SUN397", "q.jpg", ["fox"], [""], f"{MARK}  Do: x\n", [("fox", "")]),
        ("OK-VQA", "q.jpg", ["fox"], [""], f"{MARK}\nDo: x\n", [("fox", "")]),
        ("MSCOCO_i2t", "q.jpg", ["fox"], None, f"{MARK}  Do: x\n", [("fox", "")]),
        ("MSCOCO_t2i", "", [""], ["t.jpg"], "Do: x\n", [(f"{MARK}  See.\n", "t.jpg")]),
        ("WebQA", "", ["cap"], ["t.jpg"], "Do: x\n", [(f"{MARK}  See. cap\n", "t.jpg")]),
        ("VisDial", "", [""], ["t.jpg"], "Do: x\n\n", [(f"{MARK}  See.\n", "t.jpg")]),
        ("NIGHTS", "q.jpg", [""], ["t.jpg"], f"{MARK}\nDo: x\n", [(f"{MARK}  See.", "t.jpg")]),
        ("MSCOCO", "q.jpg", [""], ["t.jpg"], f"{MARK}\nDo: x\n", [(f"{MARK}  See.", "t.jpg")]),
        (
            "RefCOCO-Matching", "q.jpg", ["cap"], ["t.jpg"], f"{MARK}\nDo: x\n",
            [(f"{MARK}  See. cap\n", "t.jpg")],
        ),
    ],
)  # fmt: skip
def test_eval_of_the_second_version(
    tmp_path: Path,
    name: str,
    query_image: str,
    texts: list[str],
    paths: list[str] | None,
    query: str,
    candidates: list[tuple[str, str]],
) -> None:
    row = {
        "qry_inst": f"{MARK} Do:" if query_image else "Do:",
        "qry_text": "x",
        "qry_img_path": query_image,
        "tgt_inst": f"{MARK} See.",
        "tgt_text": texts,
        "tgt_img_path": paths,
    }
    _put(tmp_path, name, [row])
    task = mmeb_eval(str(tmp_path), "/images", name)
    assert _side(task.queries[0]) == (query, query_image)
    assert _ranked(task) == [candidates]


def test_null_lists_and_texts(tmp_path: Path) -> None:
    rows = [
        {"qry_text": "a", "tgt_text": None, "tgt_img_path": ["1.jpg", "2.jpg"]},
        {"qry_text": "b", "tgt_text": ["x", None], "tgt_img_path": ["1.jpg", "2.jpg"]},
        {"qry_text": "c", "tgt_text": ["x", "y"], "tgt_img_path": None},
    ]
    _put(tmp_path, "OVEN", rows)
    task = mmeb_eval(str(tmp_path), "/images", "OVEN")
    assert _ranked(task) == [
        [(MARK, "1.jpg"), (MARK, "2.jpg")],
        [(f"{MARK} x", "1.jpg"), (MARK, "2.jpg")],
        [("x", ""), ("y", "")],
    ]


def test_official_names() -> None:
    assert len(OFFICIAL_SETS) == 36
    counts = {
        g: sum(1 for v in OFFICIAL_SETS.values() if v[0] == g) for g in "Cls VQA Ret VG".split()
    }
    assert counts == {"Cls": 10, "VQA": 10, "Ret": 12, "VG": 4}
    assert sum(1 for value in OFFICIAL_SETS.values() if value[1] == "IND") == 20
    assert OFFICIAL_SETS["Wiki-SS-NQ"] == ("Ret", "OOD")
    assert OFFICIAL_SETS["Visual7W-Pointing"] == ("VG", "OOD")


def test_own_sets_by_index(tmp_path: Path) -> None:
    row = {"qry_text": "a", "tgt_text": ["x", "y"]}
    _put(tmp_path, "name_t2i/seen", [row])
    with pytest.raises(
        ValueError, match=r"the group of set 'name_t2i/seen' is unknown.*sets\.json"
    ):
        mmeb_eval(str(tmp_path), None, "name_t2i/seen")
    with pytest.raises(ValueError, match="no MMEB set here"):
        mmeb_eval_sets(str(tmp_path))
    _put(tmp_path, "WebQA", [row])
    _put(tmp_path, "GQA", [row])
    assert mmeb_eval_sets(str(tmp_path)) == ["GQA", "WebQA"]
    index = [{"name": "name_t2i/seen", "group": "Ret", "domain": "OOD"}]
    (tmp_path / "sets.json").write_text(json.dumps(index))
    task = mmeb_eval(str(tmp_path), None, "name_t2i/seen")
    assert len(mmeb_eval_sets("TIGER-Lab/MMEB-eval")) == 36
    assert (task.group, task.domain) == ("Ret", "OOD")
    assert mmeb_eval_sets(str(tmp_path)) == ["name_t2i/seen"]
    for text, error in [
        ("{", "not valid JSON"),
        ('[{"name": "a", "group": "Clf", "domain": "IND"}]', "entry 0 is .*expected a list of"),
        ("3", "entry 0 is 3; expected a list of"),
    ]:
        (tmp_path / "sets.json").write_text(text)
        with pytest.raises(ValueError, match=rf"sets\.json: {error}"):
            mmeb_eval(str(tmp_path), None, "name_t2i/seen")


@pytest.mark.parametrize(
    ("cells", "text"),
    [
        ({"qry": " ", "qry_image_path": None}, "row 1: empty query, neither text nor image"),
        ({"pos_text": None}, "row 1: empty target, neither text nor image"),
        ({"qry_image_path": ""}, "row 1: the query has 1 image mark.* but no image path"),
        ({"neg_text": f"{MARK} x"}, "row 1: the negative has 1 image mark.* but no image path"),
        ({"qry": f"{MARK} {MARK}"}, "row 1: the query has 2 image mark.* but one image path"),
        ({"pos_image_path": "../a.jpg"}, r"row 1, target: image path '\.\./a\.jpg' leaves"),
        ({"pos_image_path": "/a.jpg"}, "row 1, target: image path '/a.jpg' is absolute"),
        ({"qry_image_path": "http://h/a.jpg"}, "row 1, query: image path .* is a URL"),
    ],
)
def test_bad_train_rows(tmp_path: Path, cells: dict[str, Any], text: str) -> None:
    _put(tmp_path, "CIRR", [TRAIN_ROW | {"neg_text": ""}, TRAIN_ROW | cells], "original")
    with pytest.raises(ValueError, match=rf"original-00000-of-00001\.parquet {text}"):
        MMEBTrain(str(tmp_path), "/images", "CIRR")


def test_empty_rows_can_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = [{"qry": "", "qry_image_path": ""}, {"pos_text": None}]
    rows = [TRAIN_ROW, TRAIN_ROW | bad[0], TRAIN_ROW | {"pos_text": "owl"}, TRAIN_ROW | bad[1]]
    _put(tmp_path, "CIRR", rows, "original")
    with pytest.raises(ValueError, match=r"row 1: empty query, .* \(1 such rows\)"):
        MMEBTrain(str(tmp_path), "/images", "CIRR")
    data = MMEBTrain(str(tmp_path), "/images", "CIRR", leave_out_empty=True)
    assert [pair.target.text for pair in data] == ["fox", "owl"]
    assert data[1].name.endswith("parquet row 2")
    assert "CIRR: 2 of 4 rows are empty and left out" in caplog.text
    _put(tmp_path, "CIRR", rows[3:], "original")
    with pytest.raises(ValueError, match="every row has an empty query or target"):
        MMEBTrain(str(tmp_path), "/images", "CIRR", leave_out_empty=True)


def test_bad_train_sets(tmp_path: Path) -> None:
    _put(tmp_path, "CIRR", [TRAIN_ROW], "original")
    root = str(tmp_path)
    with pytest.raises(ValueError, match=r"no set 'CIR' here; there are CIRR"):
        MMEBTrain(root, None, "CIR")
    with pytest.raises(ValueError, match=r"no file train-\*\.parquet; there are original-00000"):
        MMEBTrain(root, None, "CIRR", "train")
    with pytest.raises(ValueError, match=r"no such folder, nor the name of a hub repository"):
        MMEBTrain(root + "/none", None, "CIRR")
    with pytest.raises(ValueError, match=r"row 0: the query has the image .* no image root"):
        MMEBTrain(root, None, "CIRR")
    _put(tmp_path, "CIRR", [{"query": "x", "pos_text": "y"}], "original")
    with pytest.raises(ValueError, match=r"CIRR: column 'qry' is missing; it has pos_text"):
        MMEBTrain(root, None, "CIRR")
    _put(tmp_path, "CIRR", [{"qry": 3, "pos_text": "y"}], "original")
    with pytest.raises(ValueError, match=r"column 'qry' must hold texts, it holds int64"):
        MMEBTrain(root, None, "CIRR")


EVAL_ROW = {"qry_text": "a", "tgt_text": ["", ""], "tgt_img_path": ["1.jpg", "2.jpg"]}


@pytest.mark.parametrize(
    ("cells", "text"),
    [
        ({"qry_text": ""}, "row 1: empty query"),
        ({"qry_text": MARK}, "row 1: the query has 1 image mark.* but no image path"),
        ({"tgt_text": [], "tgt_img_path": []}, r"row 1: no candidates; .* \(0 and 0\)"),
        ({"tgt_text": ["x"]}, r"row 1: .* different numbers of candidates \(1 and 2\)"),
        ({"tgt_img_path": ["1.jpg", ""]}, "row 1, candidate 1: empty candidate"),
        ({"tgt_img_path": ["1.jpg", ".."]}, "row 1, candidate 1, candidate: image path '..'"),
        (
            {"tgt_text": ["a", MARK], "tgt_img_path": None},
            "row 1, candidate 1: the candidate has 1 image mark.* but no image path",
        ),
    ],
)
def test_bad_eval_rows(tmp_path: Path, cells: dict[str, Any], text: str) -> None:
    _put(tmp_path, "EDIS", [EVAL_ROW, EVAL_ROW | cells])
    with pytest.raises(ValueError, match=rf"test-00000-of-00001\.parquet {text}"):
        mmeb_eval(str(tmp_path), "/images", "EDIS")


def test_bad_eval_columns(tmp_path: Path) -> None:
    _put(tmp_path, "EDIS", [{"qry_text": "a", "target": ["x"]}])
    with pytest.raises(ValueError, match=r"EDIS: column 'tgt_text' is missing; it has qry_text"):
        mmeb_eval(str(tmp_path), None, "EDIS")
    _put(tmp_path, "EDIS", [{"qry_text": "a", "tgt_text": "x"}])
    with pytest.raises(ValueError, match=r"'tgt_text' must hold a list of texts, it holds string"):
        mmeb_eval(str(tmp_path), None, "EDIS")


def test_hub_name_goes_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(name: str, subset: str, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        if subset == "none":
            raise FileNotFoundError("no such\nset")
        return datasets.Dataset.from_list([{"qry": "x", "pos_text": "y", "extra": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = MMEBTrain("TIGER-Lab/MMEB-train", None, "CIRR")
    assert asked == [("TIGER-Lab/MMEB-train", "CIRR", "original")]
    assert data[0].query.text == "x" and data[0].name == "TIGER-Lab/MMEB-train/CIRR/original row 0"
    with pytest.raises(
        ValueError, match=r"could not be loaded from the hub as set 'none'.*no such"
    ):
        MMEBTrain("TIGER-Lab/MMEB-train", None, "none")


def test_real_sizes_are_quick(tmp_path: Path) -> None:
    paths = np.array([f"images/{i:07d}.jpg" for i in range(1400)], dtype=object)
    rng = np.random.default_rng(0)
    rows = {
        "qry_text": [f"find {i}" for i in range(1400)],
        "tgt_text": [[""] * 1400] * 1400,
        "tgt_img_path": [paths[rng.permutation(1400)].tolist() for _ in range(1400)],
    }
    _put(tmp_path, "MSCOCO_t2i", pa.table(rows))
    start = time.perf_counter()
    task = mmeb_eval(str(tmp_path), "/images", "MSCOCO_t2i")
    took = time.perf_counter() - start
    assert len(task.pool) == 1400 and len(task.candidates) == 1400
    at = 1234
    assert [_side(task.pool[int(i)])[1] for i in task.candidates[at]] == rows["tgt_img_path"][at]
    assert took < 4

    count = 50_000
    table = pa.table({
        "qry": [f"{MARK} query {i}" for i in range(count)],
        "qry_image_path": [f"a/{i}.jpg" for i in range(count)],
        "pos_text": ["target"] * count,
        "pos_image_path": [""] * count,
    })  # fmt: skip
    _put(tmp_path, "large", table, "original")
    start = time.perf_counter()
    data = MMEBTrain(str(tmp_path), "/images", "large")
    assert len(data) == count and time.perf_counter() - start < 2
