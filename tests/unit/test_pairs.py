"""A user's own pairs: every format reads the same, scores, negatives, refusals."""

from __future__ import annotations

import csv
import io
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from coma_ds.data.pairs import PairFile
from coma_ds.data.records import Pair


def _png(color: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for color in ("red", "green", "blue"):
        (tmp_path / f"{color}.png").write_bytes(_png(color))
    return tmp_path


ROWS: list[dict[str, Any]] = [
    {
        "query": "a fox",
        "query_image": None,
        "target": "",
        "target_image": "red.png",
        "negatives": ["a dog", "a cat"],
        "negative_images": [None, "blue.png"],
        "instruction": "Find:",
        "score": 0.9,
    },
    {
        "query": "",
        "query_image": ["red.png", "blue.png"],
        "target": "line one\nline, two",
        "target_image": None,
        "negatives": None,
        "negative_images": None,
        "instruction": None,
        "score": 0.1,
    },
    {
        "query": "in <|image_1|> and <|image_2|>?",
        "query_image": ["green.png", "red.png"],
        "target": "[1] no list",
        "target_image": None,
        "negatives": None,
        "negative_images": ["green.png"],
        "instruction": "Say what is",
        "score": 0.5,
    },
]


def _write(root: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = root / f"pairs.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        lists = ("query_image", "negatives", "negative_images")
        rows = [
            {k: [v] if k in lists and isinstance(v, str) else v for k, v in row.items()}
            for row in rows
        ]
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
                )
    return path


def _plain(pair: Pair) -> list[Any]:
    sides = (pair.query, pair.target, *pair.negatives)
    return [(side.text, [Path(picture.name).name for picture in side.images]) for side in sides]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_formats_read_the_same(root: Path, kind: str) -> None:
    data = PairFile(_write(root, kind, ROWS), root)
    assert [_plain(data[row]) for row in range(len(data))] == [
        [
            ("Find: a fox", []),
            ("<|image_1|>", ["red.png"]),
            ("a dog", []),
            ("<|image_1|> a cat", ["blue.png"]),
        ],
        [("<|image_1|> <|image_2|>", ["red.png", "blue.png"]), ("line one\nline, two", [])],
        [
            ("Say what is in <|image_1|> and <|image_2|>?", ["green.png", "red.png"]),
            ("[1] no list", []),
            ("<|image_1|>", ["green.png"]),
        ],
    ]
    names = {"jsonl": "line 2", "json": "entry 1", "csv": "record 1", "parquet": "row 1"}
    assert data[1].name == f"{root}/pairs.{kind} {names[kind]}"
    assert data[0].target.images[0].open().getpixel((0, 0)) == (255, 0, 0)
    assert _plain(pickle.loads(pickle.dumps(data))[2]) == _plain(data[2])


def test_texts_of_csv_stay_as_they_are(root: Path) -> None:
    rows = [{"query": text, "target": text} for text in ("null", "NA", '["a"]', " 1.0", "true")]
    data = PairFile(_write(root, "csv", rows))
    assert [pair.query.text for pair in data] == [row["query"] for row in rows]


def test_bytes_in_parquet(root: Path) -> None:
    table = pa.table(
        {
            "query": ["a", "b"],
            "target_image": [
                {"bytes": _png("red"), "path": "x.png"},
                {"bytes": None, "path": "blue.png"},
            ],
        }
    )
    pa.parquet.write_table(table, root / "struct.parquet")
    data = PairFile(root / "struct.parquet", root)
    assert data[0].target.images[0].open().getpixel((0, 0)) == (255, 0, 0)
    assert data[1].target.images[0].open().getpixel((0, 0)) == (0, 0, 255)
    assert data[0].target.images[0].name == f"{root}/struct.parquet row 0, target_image (x.png)"


def test_own_names_of_columns(root: Path) -> None:
    rows = [{"question": "a", "doc": "b", "neg": "c"}]
    for kind in ("jsonl", "csv", "parquet"):
        path = _write(root, kind, rows)
        names = {"query": "question", "target": "doc", "negatives": "neg"}
        data = PairFile(path, columns=names)
        assert _plain(data[0]) == [("a", []), ("b", []), ("c", [])]
        with pytest.raises(ValueError, match=r"column 'ask' \(given as query\) is missing"):
            PairFile(path, columns=names | {"query": "ask"})
    with pytest.raises(ValueError, match="columns: 'qry' is no column of pairs; known are query"):
        PairFile(path, columns={"qry": "a"})


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_scores(root: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = _write(root, kind, ROWS)
    with caplog.at_level(logging.INFO, logger="coma_ds"):
        data = PairFile(path, root, min_score=0.5)
    assert len(data) == 2 and data.left_out == 1
    assert "1 of 3 rows are left out, their score is below 0.5" in caplog.text
    assert [pair.query.text[:4] for pair in data] == ["Find", "Say "]
    assert len(PairFile(path, root, min_score=0.5, limit=1)) == 1
    assert len(PairFile(path, root)) == 3
    with pytest.raises(ValueError, match=r"no row reaches the score 2 \(highest: 0\.9\)"):
        PairFile(path, root, min_score=2)


def test_scores_must_be_numbers(root: Path) -> None:
    rows = [{"query": "a", "target": "b", "score": 1.0}, {"query": "a", "target": "b"}]
    with pytest.raises(ValueError, match=r"line 2: score must be a number .* got None"):
        PairFile(_write(root, "jsonl", rows), min_score=0.5)
    rows[1]["score"] = "high"
    with pytest.raises(ValueError, match=r"record 1: score must be a number .* got 'high'"):
        PairFile(_write(root, "csv", rows), min_score=0.5)
    with pytest.raises(ValueError, match=r"min_score is set but there is no column 'score'"):
        PairFile(_write(root, "parquet", [{"query": "a", "target": "b"}]), min_score=0.5)


def test_unused_columns_are_told(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"query": "a", "target": "b"}, {"query": "a", "target": "b", "negative": ["c"]}]
    with caplog.at_level(logging.WARNING, logger="coma_ds"):
        data = PairFile(_write(root, "jsonl", rows))
        assert "not used" not in caplog.text
        data[1], data[1]
    assert caplog.text.count("pairs.jsonl: columns negative are not used") == 1


@pytest.mark.parametrize(
    ("cells", "text"),
    [
        ({"query": " ", "target": "b"}, "empty query; give it a text or an image"),
        ({"query": "a", "target": None}, "empty target; give it a text or an image"),
        ({"query": 3, "target": "b"}, "query must be a text, got int 3"),
        ({"query": "a", "target": "b", "instruction": []}, "instruction must be a text, got list"),
        ({"query": "<|image_1|> a", "target": "b"}, r"query: .* <\|image_1\|> but 0 image\(s\)"),
        (
            {"query": "a <|image_2|>", "query_image": "red.png", "target": "b"},
            r"marks <\|image_2\|> but 1 image\(s\); expected <\|image_1\|>, in this order",
        ),
        (
            {
                "query": "<|image_2|> <|image_1|>",
                "query_image": ["red.png", "blue.png"],
                "target": "b",
            },
            r"expected <\|image_1\|> <\|image_2\|>, in this order",
        ),
        (
            {"query": "a", "target": "b", "negatives": ["c"], "negative_images": [None, None]},
            "1 negatives but 2 negative_images",
        ),
        ({"query": "a", "target": "b", "negatives": ["c", ""]}, "negative 1: empty"),
        ({"query": "a", "target": "b", "negatives": [4]}, "negative 0: expected a text, got int"),
        (
            {"query": "a", "target_image": "/red.png"},
            "target_image: image path '/red.png' is absolute",
        ),
        (
            {"query": "a", "target_image": ["red.png", None]},
            "target_image: entry 1 of its image list is empty",
        ),
    ],
)
def test_bad_rows(root: Path, cells: dict[str, Any], text: str) -> None:
    data = PairFile(_write(root, "jsonl", [{"query": "a", "target": "b"}, cells]), root)
    data[0]
    with pytest.raises(ValueError, match=rf"pairs\.jsonl line 2.*{text}"):
        data[1]


def test_bad_files(root: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"column 'target' \(or 'target_image'\) is missing; it has query, answer; expected",
    ):
        PairFile(_write(root, "csv", [{"query": "a", "answer": "b"}]))
    (root / "bad.csv").write_text("query,target\na,b\nc\n")
    with pytest.raises(ValueError, match=r"CSV \(record 1 has 1 cells, expected 2: 'c'\)"):
        PairFile(root / "bad.csv")
    (root / "bad.csv").write_bytes(b"query,target\na,\xff\n")
    with pytest.raises(
        ValueError, match=r"bad\.csv: not readable as CSV \(.*utf-8.*save it as UTF"
    ):
        PairFile(root / "bad.csv")
    (root / "bad.csv").write_text("query,query,target\na,b,c\n")
    with pytest.raises(
        ValueError, match=r"bad\.csv: two columns are named 'query': rename or drop"
    ):
        PairFile(root / "bad.csv")
    twins = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["query", "target", "target"])
    pa.parquet.write_table(twins, root / "twins.parquet")
    with pytest.raises(ValueError, match=r"twins\.parquet: two columns are named 'target'"):
        PairFile(root / "twins.parquet")
    (root / "bad.csv").write_text("query,target\n")
    with pytest.raises(ValueError, match=r"bad\.csv: the file holds no rows"):
        PairFile(root / "bad.csv")
    (root / "bad.csv").write_text("")
    with pytest.raises(ValueError, match=r"bad\.csv: not readable as CSV"):
        PairFile(root / "bad.csv")
