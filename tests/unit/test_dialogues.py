"""Dialogues from JSONL, JSON and parquet; the mark of LLaVA; refusals with their text."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from coma_ds.data.dialogues import DialogueFile


def _png(color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(out, "PNG")
    return out.getvalue()


def _talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def _row(**cells: Any) -> dict[str, Any]:
    return {"image": "a.png", "conversations": _talk("<image>\nWhat?", "A fox.")} | cells


def _jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "talks.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_llava_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png())
    (tmp_path / "b.png").write_bytes(_png("blue"))
    (tmp_path / "b").mkdir()
    talk = _talk("<image>\n<image>\nWhat is it?", "A fox.", "Color?", "Red.")
    talk[2]["kind"] = "color"
    path = _jsonl(
        tmp_path,
        _row(id="x1"),
        _row(image=["a.png", "b.png"], conversations=talk, instruction="Look."),
        _row(conversations=_talk("What is it?\n<image>", "A fox.")),
        _row(conversations=_talk("<image> What is it?", "A fox.")),
    )
    data = DialogueFile(path, tmp_path)
    assert len(data) == 4
    first, second, third, fourth = data
    assert first.name == f"{path} line 1 (id x1)"
    assert [(t.question, t.answer, t.kind) for t in first.turns] == [("What?", "A fox.", "qa")]
    assert first.images[0].open().getpixel((0, 0)) == (255, 0, 0)
    assert [(t.question, t.answer, t.kind) for t in second.turns] == [
        ("What is it?", "A fox.", "qa"),
        ("Color?", "Red.", "color"),
    ]
    assert [p.open().getpixel((0, 0)) for p in second.images] == [(255, 0, 0), (0, 0, 255)]
    assert second.instruction == "Look." and first.instruction == ""
    talked = _jsonl(tmp_path / "b", _row(conversations=_talk("Use the <video> tag?", "<video>")))
    assert DialogueFile(talked, tmp_path)[0].turns[0].answer == "<video>"  # a text like any other
    assert third.turns[0].question == "What is it?" == fourth.turns[0].question
    assert len(DialogueFile(path, tmp_path, limit=2)) == 2
    with pytest.raises(IndexError):
        DialogueFile(path, tmp_path, limit=2)[2]


def test_unused_columns_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="coma_ds")
    rows = [_row(), _row(source="web"), _row(source="web", model="x")]
    lines = _jsonl(tmp_path, *rows)
    data = DialogueFile(lines, tmp_path)
    assert not caplog.messages
    data[1], data[1], data[2]
    pa.parquet.write_table(pa.Table.from_pylist(rows[1:]), tmp_path / "talks.parquet")
    DialogueFile(tmp_path / "talks.parquet", tmp_path)[0]
    assert caplog.messages == [
        f"{lines}: columns source are not used",
        f"{lines}: columns model are not used",
        f"{tmp_path}/talks.parquet: columns source are not used",
    ]


def test_json_list_and_blank_lines(tmp_path: Path) -> None:
    listed = tmp_path / "talks.json"
    listed.write_text(json.dumps([_row(), _row(id=7), _row(image="")], indent=2))
    data = DialogueFile(listed, tmp_path)
    assert len(data) == 3 and data[1].name == f"{listed} entry 1 (id 7)"
    with pytest.raises(ValueError, match=r"talks\.json entry 2: no image"):
        data[2]
    lines = tmp_path / "talks.jsonl"
    lines.write_text(json.dumps(_row()) + "\n\n  \n" + json.dumps(_row(image=None)))
    data = DialogueFile(lines, tmp_path)
    assert len(data) == 2
    with pytest.raises(ValueError, match=r"talks\.jsonl line 4: no image"):
        data[1]


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_with_bytes(tmp_path: Path, struct: bool) -> None:
    image: Any = {"bytes": _png(), "path": "a.png"} if struct else _png()
    other: Any = {"bytes": _png("blue"), "path": None} if struct else _png("blue")
    talk = _talk("What?", "A fox.")
    for turn in talk:
        turn["kind"] = "name"
    for number, value in enumerate((image, other)):
        pa.parquet.write_table(
            pa.table({"image": [value], "conversations": [talk], "other": [1]}),
            tmp_path / f"part-{number}.parquet",
        )
    data = DialogueFile(tmp_path)
    assert len(data) == 2
    assert data[1].name == f"{tmp_path}/part-1.parquet row 0"
    assert data[1].images[0].open().getpixel((0, 0)) == (0, 0, 255)
    assert data[0].images[0].digest() != data[1].images[0].digest()
    assert data[0].turns[0].kind == "name"


@pytest.mark.parametrize("mapped_from", [None, 0])
def test_parts_of_which_the_first_lacks_a_column(tmp_path, monkeypatch, mapped_from) -> None:
    """The same rows whatever the size of the files."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if mapped_from is not None:
        monkeypatch.setattr("coma_ds.data.tables.MAPPED_FROM_BYTES", mapped_from)
    rows = [{"image": {"bytes": _png()}, "conversations": _talk("What?", "A fox.")}] * 2
    for name, more in (("a", {}), ("b", {"instruction": "Look."}), ("c", {"id": "x"})):
        table = pa.Table.from_pylist([row | more for row in rows])
        pa.parquet.write_table(table, tmp_path / f"{name}.parquet")
    pa.parquet.write_table(table.slice(0, 0), tmp_path / "bb.parquet")
    data = DialogueFile(tmp_path)
    assert [d.instruction for d in data] == ["", "", "Look.", "Look.", "", ""]
    assert data[4].name.endswith("c.parquet row 0 (id x)")
    assert all(d.images[0].digest() == data[0].images[0].digest() for d in data)


@pytest.mark.parametrize("mapped_from", [1 << 40, 0])
def test_a_part_that_cannot_be_read(tmp_path, monkeypatch, mapped_from) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("coma_ds.data.tables.MAPPED_FROM_BYTES", mapped_from)
    file = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([_row()] * 900), file)
    content = bytearray(file.read_bytes())
    content[4:60] = b"\xff" * 56  # the first page; what the end of the file says is right
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{file}: not a readable parquet file \(.+\)$"):
        DialogueFile(tmp_path)
    pa.parquet.write_table(pa.table({"other": [1, 2]}), file)
    pa.parquet.write_table(pa.Table.from_pylist([_row()]), tmp_path / "b.parquet")
    data = DialogueFile(tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"a\.parquet row 0: no image"):
        data[0]
    assert data[2].turns[0].answer == "A fox."


def test_parquet_with_lists_and_a_file_larger_than_memory_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "talks.parquet"
    rows = [{"images": [_png(), _png("blue")], "conversations": _talk("What?", f"Fox {i}.")}
            for i in range(5)]  # fmt: skip
    pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    read = [(d.turns, [p.digest() for p in d.images], d.name) for d in DialogueFile(path)]
    monkeypatch.setattr("coma_ds.data.tables.MAPPED_FROM_BYTES", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    mapped = [(d.turns, [p.digest() for p in d.images], d.name) for d in DialogueFile(path)]
    assert list((tmp_path / "cache").rglob("*.arrow"))
    assert mapped == read and len(read) == 5 and len(read[0][1]) == 2


@pytest.mark.parametrize(
    ("cells", "text"),
    [
        ({"conversations": _talk("a")}, "1 turns, an odd number"),
        ({"conversations": []}, "'conversations' must be a list of turns"),
        ({"conversations": None}, "'conversations' must be a list of turns"),
        ({"conversations": _talk("a", "b")[::-1]}, "turn 0 is from 'gpt', expected 'human'"),
        (
            {"conversations": [{"from": "system", "value": "x"}, *_talk("a", "b"), {}]},
            "turn 0 is from 'system', expected 'human'",
        ),
        ({"conversations": _talk("a", " ")}, "turn 1 is an empty text"),
        ({"conversations": _talk("<image>\n", "b")}, "turn 0 is an empty text"),
        ({"images": ["b.png"]}, "both 'image' and 'images'; put all into one"),
        ({"conversations": _talk("a", "b", "<image> c", "d")}, "<image> in turn 2"),
        (
            {"conversations": _talk("What?\n<video>", "b")},
            "<video> in the first question; dialogues are about images",
        ),
        (
            {"conversations": _talk("<video>\na", "b")},
            "<video> in the first question; dialogues are about images",
        ),
        ({"conversations": _talk("a", "b <image>")}, "<image> in turn 1"),
        ({"conversations": _talk("<image><image> a", "b")}, r"2 <image> .* but 1 image\(s\)"),
        ({"conversations": ["a", "b"]}, r"turn 0 must be \{'from', 'value'\}, got 'a'"),
        (
            {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "b"}]},
            "the value of turn 0 must be a text, got int",
        ),
        ({"image": None}, "no image; a dialogue of this stage"),
        ({"image": []}, "no image; a dialogue of this stage"),
        ({"image": ["a.png", ""]}, "an entry of its image list is empty"),
        ({"image": "../a.png"}, r"image path '\.\./a\.png' leaves the image root"),
        ({"image": "https://h/a.png"}, "is a URL"),
    ],
)
def test_bad_rows(tmp_path: Path, cells: dict[str, Any], text: str) -> None:
    data = DialogueFile(_jsonl(tmp_path, _row(), _row(**cells)), tmp_path)
    data[0]
    with pytest.raises(ValueError, match=rf"talks\.jsonl line 2: .*{text}"):
        data[1]


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file; give a \.jsonl"):
        DialogueFile(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"a folder without \.parquet files"):
        DialogueFile(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a\.txt: cannot tell its format"):
        DialogueFile(tmp_path / "a.txt")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: the file holds no rows"):
        DialogueFile(tmp_path / "empty.jsonl")
    with pytest.raises(
        ValueError,
        match=r"talks\.jsonl: column 'conversations' is missing; it has image, messages",
    ):
        DialogueFile(_jsonl(tmp_path, {"image": "a.png", "messages": []}))
    with pytest.raises(ValueError, match="column 'image' is missing; it has conversations"):
        DialogueFile(_jsonl(tmp_path, {"conversations": []}))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"bad\.parquet: not a readable parquet file"):
        DialogueFile(tmp_path / "bad.parquet")


def test_bad_json(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps(_row()) + '\n{"image": \n[1]\n')
    data = DialogueFile(path, tmp_path)
    with pytest.raises(ValueError, match=r"talks\.jsonl line 2: not valid JSON"):
        data[1]
    with pytest.raises(ValueError, match=r"talks\.jsonl line 3: expected a JSON object .* list"):
        data[2]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(_row()) + "\n" + json.dumps(_row()))
    with pytest.raises(ValueError, match=r"talks\.json: not valid JSON .* is named \.jsonl"):
        DialogueFile(path, tmp_path)
    path.write_text(json.dumps(_row()))
    with pytest.raises(ValueError, match=r"expected a JSON list of objects, got dict"):
        DialogueFile(path, tmp_path)


def test_image_root_is_asked_for(tmp_path: Path) -> None:
    data = DialogueFile(_jsonl(tmp_path, _row()))
    with pytest.raises(ValueError, match=r"line 1: .* no image root is set"):
        data[0]
