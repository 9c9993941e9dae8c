"""The written evaluation sets: format, gold, candidates, determinism, atomic writing."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import coma_ds.data.builtin.evaluation_sets as evaluation_sets
from coma_ds.data.builtin import (
    TEST_STYLE,
    BuiltinPairs,
    BuiltinPicture,
    PictureSet,
    pixel_baseline,
    write_mmeb_eval,
)
from coma_ds.data.builtin.concepts import load_concepts
from coma_ds.data.builtin.evaluation_rows import TASKS, EvaluationRows
from coma_ds.data.mmeb import mmeb_eval
from coma_ds.data.records import IMAGE_MARK, Side

COLUMNS = ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache") / "builtin"
    write_mmeb_eval(root)
    return root


def read(root: Path, name: str) -> list[dict]:
    table = pq.read_table(root / name / "test-00000-of-00001.parquet")
    assert table.column_names == COLUMNS
    return table.to_pylist()


def test_index_lists_every_task_for_seen_and_unseen(root):
    index = json.loads((root / "sets.json").read_text())
    names = [entry["name"] for entry in index]
    assert names == write_mmeb_eval(root)
    assert set(names) == {f"{task}/{half}" for task in TASKS for half in ("seen", "unseen")}
    assert len(TASKS) >= 10 and set(TASKS.values()) == {"Cls", "VQA", "Ret", "VG"}
    for entry in index:
        task, half = entry["name"].split("/")
        assert entry["group"] == TASKS[task]
        assert entry["domain"] == {"seen": "IND", "unseen": "OOD"}[half]


def test_marks_paths_and_lists_agree_in_every_row(root):
    files: set[str] = set()
    for name in write_mmeb_eval(root):
        rows = read(root, name)
        assert len(rows) >= 80, name
        for row in rows:
            texts, paths = row["tgt_text"], row["tgt_img_path"]
            assert len(texts) == len(paths) >= 2
            assert bool(IMAGE_MARK.search(row["qry_text"])) == bool(row["qry_img_path"])
            assert len(set(zip(texts, paths, strict=True))) == len(texts), name
        marked = [(bool(IMAGE_MARK.search(t)), bool(p)) for t, p in zip(texts, paths, strict=True)]
        assert set(marked) <= {(True, True), (False, False)}
        files |= {path for row in rows for path in (row["qry_img_path"], *row["tgt_img_path"])}
    files.discard("")
    assert all((root / "images" / path).is_file() for path in files)
    on_disk = {str(p.relative_to(root / "images")) for p in (root / "images").rglob("*.png")}
    assert on_disk == files


def test_name_to_picture_has_a_thousand_candidates_and_true_gold(root):
    concepts = load_concepts()
    rows = read(root, "name_t2i/seen")
    codes = [c for c in PictureSet.load().codes(TEST_STYLE) if not concepts[c].held_out]
    assert len(rows) == len(codes) >= 1000
    assert min(len(row["tgt_img_path"]) for row in rows) >= 1000
    assert not any(row["qry_img_path"] for row in rows)
    for code, row in list(zip(codes, rows, strict=True))[::50]:
        assert row["qry_text"] == f"Find a picture of: {concepts[code].label}"
        gold = Image.open(root / "images" / row["tgt_img_path"][0])
        shown = BuiltinPicture(TEST_STYLE, code).open()
        assert gold.mode == "RGB" and np.array_equal(np.asarray(gold), np.asarray(shown))
    assert not {row["qry_text"] for row in rows} & {
        row["qry_text"] for row in read(root, "name_t2i/unseen")
    }


@pytest.mark.parametrize("source", ["name_t2i", "i2t", "i2i", "group_cls", "grounding"])
def test_queries_are_worded_as_in_training(root, source):
    def shape(text: str) -> str:
        return re.sub(r": .*", ":", text)

    trained = {shape(BuiltinPairs()[source][index].query.text) for index in range(5)}
    assert {shape(row["qry_text"]) for row in read(root, f"{source}/seen")} == trained


@pytest.mark.parametrize("held_out", [False, True])
def test_halves_hold_their_own_concepts_and_answers_are_true(held_out):
    concepts = load_concepts()
    by_label = {concept.label: concept for concept in concepts.values()}
    rows = EvaluationRows(held_out)
    for query, gold, _ in rows.rows("i2t"):
        (picture,) = query.images
        assert picture.style == TEST_STYLE
        assert gold.text == concepts[picture.code].label
        assert concepts[picture.code].held_out == held_out
    for query, gold, candidates in rows.rows("i2i_style"):
        (asked,), (found,) = query.images, gold.images
        assert found.code == asked.code and f"in {found.style} style" in query.text
        assert sum(side.images[0].code == found.code for side in candidates) > 1
    for query, gold, candidates in rows.rows("vqa_position"):
        labels = [concepts[code].label for _, code in query.images[0].cells]
        assert by_label[gold.text].held_out == held_out
        assert gold.text in labels and {*labels} <= {side.text for side in candidates}
    for query, gold, candidates in rows.rows("vqa_reverse"):
        options = query.text.removeprefix("<|image_1|>\nIs this ").removesuffix("?").split(" or ")
        assert gold.text in options and set(options) <= {side.text for side in candidates}
    with pytest.raises(ValueError, match="no evaluation task 'x'; tasks are group_cls"):
        rows.rows("x")


def test_a_copy_of_the_gold_picture_is_no_candidate():
    twins = [
        Side("<|image_1|>", (BuiltinPicture("twemoji", code),))
        for code in ("1F1EB-1F1F7", "1F1E8-1F1F5", "1F600")
    ]
    pool, flat, offsets = evaluation_sets._candidate_lists(
        [(Side("France"), twins[0], twins), (Side("grin"), twins[2], twins)]
    )
    lists = [flat[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert pool == [twins[0], twins[2]]
    assert lists == [[0, 1], [1, 0]]


def test_the_reader_of_mmeb_reads_the_sets(root):
    for name in ("name_t2i/seen", "vqa_reverse/unseen", "grounding/seen"):
        task = mmeb_eval(str(root), root / "images", name)
        rows = read(root, name)
        assert (task.name, task.group) == (name, TASKS[name.split("/")[0]])
        assert len(task.queries) == len(rows)
        assert len(task.candidates[3]) == len(rows[3]["tgt_text"])
        gold = task.pool[int(task.candidates[3][0])]
        assert gold.text == rows[3]["tgt_text"][0]
        assert task.queries[3].text == rows[3]["qry_text"]


def test_raw_pixels_find_some_pictures_across_styles(root):
    rows = read(root, "i2i/seen")[:100]
    files = sorted({path for row in rows for path in row["tgt_img_path"]})
    pool = {path: pixel_baseline(Image.open(root / "images" / path)) for path in files}
    hits = 0
    for row in rows:
        emb_E = pixel_baseline(Image.open(root / "images" / row["qry_img_path"]))
        scores = np.stack([pool[path] for path in row["tgt_img_path"]]) @ emb_E
        hits += scores[0] > scores[1:].max()
    assert 0.1 < hits / len(rows) < 0.5


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {"group_cls": "Cls", "i2t": "Ret"}
    monkeypatch.setattr(evaluation_sets, "TASKS", tasks)
    monkeypatch.setattr("coma_ds.data.builtin.evaluation_rows.QUERIES", 5)


def test_the_same_files_every_time(tmp_path, short):
    for place in ("one", "two"):
        assert len(write_mmeb_eval(tmp_path / place)) == 4
    files = [sorted((tmp_path / place).rglob("*.p*")) for place in ("one", "two")]
    assert len(files[0]) == len(files[1]) > 10
    for one, two in zip(*files, strict=True):
        assert one.relative_to(tmp_path / "one") == two.relative_to(tmp_path / "two")
        assert one.read_bytes() == two.read_bytes()


def test_sets_of_another_version_are_written_again(tmp_path, short, caplog):
    root = tmp_path / "root"
    write_mmeb_eval(root)
    (root / "group_cls/seen/test-00000-of-00001.parquet").unlink()
    write_mmeb_eval(root)  # ours: left as it is
    assert not (root / "group_cls/seen/test-00000-of-00001.parquet").exists()
    (root / "made_from.txt").write_text("something else\n")
    with caplog.at_level("INFO", "coma_ds"):
        write_mmeb_eval(root)
    assert (root / "group_cls/seen/test-00000-of-00001.parquet").is_file()
    assert caplog.messages == [f"{root} is of another version: written again"]
    (root / "made_from.txt").unlink()
    with pytest.raises(ValueError, match=r"exists but holds no sets.json and made_from.txt"):
        write_mmeb_eval(root)


def test_a_failed_write_leaves_nothing(tmp_path, short, monkeypatch):
    def broken(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(evaluation_sets.pq, "write_table", broken)
    with pytest.raises(OSError, match="no space left"):
        write_mmeb_eval(tmp_path / "root")
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_comes_second_keeps_the_first_one_s_files(tmp_path, short, monkeypatch):
    write = evaluation_sets._write

    def overtaken(folder: Path) -> None:
        write(folder)
        monkeypatch.setattr(evaluation_sets, "_write", write)
        evaluation_sets._write(tmp_path / "root")
        (tmp_path / "root/first").touch()

    monkeypatch.setattr(evaluation_sets, "_write", overtaken)
    assert len(write_mmeb_eval(tmp_path / "root")) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    assert (tmp_path / "root/first").exists()


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"exists but holds no sets\.json"):
        write_mmeb_eval(tmp_path)
