"""All the data of a run, looked at before a GPU is taken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from coma_ds import preparation
from coma_ds.assemble import build_data
from coma_ds.commands.main import dispatch
from coma_ds.config import ModelConfig, RunConfig
from coma_ds.data.collate import Collator
from coma_ds.data.images import FilePicture
from coma_ds.data.pairs import PairFile
from coma_ds.data.processing import load_processing
from coma_ds.model.source import resolve_model
from tests.folders import mmeb_folder

ROWS = [
    {"query": "a red thing", "target_image": "red.png"},
    {"query": "the same once more, said with more words", "target_image": "red.png"},
    {"query": "<|image_1|> and this", "query_image": "more/wide.jpg", "target_image": "red.png"},
    {"query": "gone", "target_image": "gone.png"},
    {"query": "gone as well", "target_image": "gone.png"},
    {"query": "not an image", "target_image": "text.png"},
    {"query": "words alone", "target": "an answer", "negatives": ["another", "one more"]},
]


@pytest.fixture
def data(tmp_path) -> Path:
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for name, size in {"red.png": (64, 64), "more/wide.jpg": (1500, 700)}.items():
        pixels = noise.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / name)
    (images / "text.png").write_text("no picture")
    write(tmp_path, ROWS)
    return tmp_path


def write(folder: Path, rows: list[dict]) -> None:
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def run(folder: Path, *more: str) -> int:
    return dispatch([
        "prepare", "--recipe", "demo-control", "--output", str(folder / "out"), "--workers", "0",
        "data.format=pairs", f"data.path={folder}/pairs.jsonl", f"data.image_root={folder}/images",
        "data.sources=[]", "data.sub_batch=0", *more,
    ])  # fmt: skip


def processing(low: int | None = None, high: int | None = None):
    return load_processing(
        resolve_model("builtin:demo-base", "model.path"),
        compression_tokens=8,
        min_vision_tokens=low,
        max_vision_tokens=high,
        max_length=512,
    )


def test_what_is_bad_is_found_counted_and_listed(data, capsys) -> None:
    with pytest.raises(ValueError) as caught:
        run(data)
    assert str(caught.value).startswith("source pairs.jsonl: 3 of 7 rows cannot be used, the first")
    assert "gone.png" in str(caught.value) and str(data / "out/bad.jsonl") in str(caught.value)
    summary = json.loads((data / "out/summary.json").read_text())["pairs.jsonl"]
    counts = {"rows": 7, "images": 7, "unique_images": 4, "missing": 1, "broken": 1, "bad_rows": 3}
    assert {key: summary[key] for key in counts} == counts
    images = [json.loads(line) for line in (data / "out/bad.jsonl").open()]
    rows = images[2:]
    assert [(Path(b["image"]).name, b["kind"], b["count"], b["rows"]) for b in images[:2]] == [
        ("gone.png", "missing", 2, ["3", "4"]), ("text.png", "broken", 1, ["5"]),
    ]  # fmt: skip
    assert [row["row"] for row in rows] == [3, 4, 5] and "does not exist" in rows[0]["why"]
    shown = capsys.readouterr().out
    assert "missing" in shown and "pairs.jsonl" in shown


@pytest.mark.parametrize("share, passes", [(0.5, True), (0.3, False)])
def test_a_run_that_replaces_bad_rows_may_have_some(data, share, passes) -> None:
    if passes:
        assert run(data, f"data.bad_rows={share}") == 0
    else:
        with pytest.raises(ValueError, match="3 of 7 rows"):
            run(data, f"data.bad_rows={share}")


def test_lengths_are_those_of_training(data) -> None:
    """Of every sample that the collator makes, image tokens by themselves."""
    good = [row for row in ROWS if row.get("target_image") not in ("gone.png", "text.png")]
    write(data, good)
    assert run(data) == 0
    found = pq.read_table(data / "out/lengths.parquet").to_pylist()
    reader = PairFile(f"{data}/pairs.jsonl", f"{data}/images")
    wanted, collator = [], Collator(processing())
    for row in range(len(reader)):
        batch = collator([reader[row]])
        kinds = ["query", "target", *["negative"] * (len(batch) - 2)]
        for kind, size, images in zip(kinds, batch.sizes_B.tolist(), batch.feature_counts_B):
            wanted.append(("pairs.jsonl", row, kind, size, int(images), 0, 0))
    assert [tuple(r.values()) for r in found] == wanted
    assert {r["kind"] for r in found} == {"query", "target", "negative"}
    assert max(r["image_tokens"] for r in found) > 0


def test_each_image_is_decoded_once(data, monkeypatch) -> None:
    opened: list[str] = []
    plain = FilePicture.open
    monkeypatch.setattr(FilePicture, "open", lambda self: opened.append(self.path) or plain(self))
    with pytest.raises(ValueError, match="rows cannot be used"):
        run(data)
    assert sorted(opened) == ["more/wide.jpg", "red.png", "text.png"]


WIDE = ("model.min_vision_tokens=4", "model.max_vision_tokens=64")


def test_images_as_large_as_they_are_used(data) -> None:
    """The same tokens as before, and nothing is scaled again; small ones stay byte by byte."""
    write(data, ROWS[:3])
    assert run(data, "--resize", *WIDE) == 0
    first = pq.read_table(data / "out/lengths.parquet")
    small = data / "out/images"
    assert (small / "red.png").read_bytes() == (data / "images/red.png").read_bytes()
    own = processing(4, 64)
    for name in ("more/wide.jpg", "red.png"):
        grids = [own.pixels(FilePicture(root, name))[1] for root in (data / "images", small)]
        assert grids[0] == grids[1]
    with Image.open(small / "more/wide.jpg") as image:
        grid = own.pixels(FilePicture(small, "more/wide.jpg"))[1]
        patch = own.image_processor.patch_size
        assert image.size == (grid[2] * patch, grid[1] * patch) and image.width < 1500
    times = {path: path.stat().st_mtime_ns for path in small.rglob("*.*")}
    assert run(data, *WIDE, f"data.image_root={small}", f"--output={data}/again") == 0
    assert pq.read_table(data / "again/lengths.parquet").equals(first)
    assert run(data, "--resize", *WIDE) == 0
    assert times == {path: path.stat().st_mtime_ns for path in small.rglob("*.*")}


def test_images_that_were_made_for_less_are_refused(data) -> None:
    """In training, in another look at them, in the place of larger ones; for less they serve."""
    write(data, ROWS[:3])
    assert run(data, "--resize", *WIDE) == 0
    root = f"data.image_root={data}/out/images"
    said = "resized for at most 64 image tokens, model.max_vision_tokens allows 100 here"
    more = "model.max_vision_tokens=100"
    with pytest.raises(ValueError, match=said):
        run(data, root, more, f"--output={data}/again")
    assert run(data, root, "model.max_vision_tokens=50", f"--output={data}/again") == 0
    with pytest.raises(ValueError, match="are resized for at most 64 image tokens, these would be"):
        run(data, "--resize", more)
    config = RunConfig(
        objective="match",
        data={"format": "pairs", "path": f"{data}/pairs.jsonl", "image_root": f"{data}/out/images"},
        optim={"batch_size": 2},
    )
    with pytest.raises(ValueError, match=said):
        build_data(config, processing(4, 100))
    assert len(build_data(config, processing(4, 64)).sources) == 3


def test_an_image_that_would_be_scaled_another_way_stays_as_it_is(data) -> None:
    """The demo's processor makes 10 tokens of it, and would make 21 of what it made."""
    write(data, ROWS[2:3])
    assert run(data, "--resize") == 0
    name = "more/wide.jpg"
    assert (data / "out/images" / name).read_bytes() == (data / "images" / name).read_bytes()


def test_workers_find_the_same(data) -> None:
    found = []
    for workers in (0, 2):
        with pytest.raises(ValueError, match="rows cannot be used"):
            run(data, f"--workers={workers}", f"--output={data}/{workers}")
        found.append({p.name: p.read_bytes() for p in (data / str(workers)).iterdir()})
    assert found[0] == found[1] and len(found[0]) == 3


@pytest.mark.parametrize(
    "words, said",
    [
        (["data.format=builtin"], "nothing to prepare"),
        (["--workers=-1"], "--workers -1"),
        (["--output=/dev/null"], "this is a file"),
        (["data.path=/none.jsonl"], "/none.jsonl"),
    ],
)
def test_errors_are_sentences(data, words, said) -> None:
    with pytest.raises(ValueError, match=said):
        run(data, *words)


def test_a_table_has_a_line_for_each_source() -> None:
    sources = [preparation.Prepared("a", 3), preparation.Prepared("longer", 10)]
    lines = preparation.table(sources).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1


def test_evaluation_sets_are_looked_at_as_well(data) -> None:
    """A bad row there is never let pass: it would end the evaluation."""
    write(data, ROWS[:3])
    mmeb_folder(data / "sets")
    asked = (f"eval.root={data}/sets", "data.bad_rows=0.9")
    assert run(data, *asked) == 0
    found = json.loads((data / "out/summary.json").read_text())
    assert list(found) == ["pairs.jsonl", "eval/find", "eval/say"]
    assert found["eval/find"]["unique_images"] == 9 and found["eval/say"]["rows"] >= 5
    kinds = pq.read_table(data / "out/lengths.parquet", filters=[("source", "=", "eval/say")])
    assert set(kinds["kind"].to_pylist()) == {"side"}
    (data / "sets/images/3.png").unlink()
    with pytest.raises(
        ValueError, match=r"source eval/find: \d+ of \d+ rows cannot be used.*3\.png"
    ):
        run(data, *asked)


def test_dialogues(data) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    rows = [{"image": name, "conversations": turns} for name in ("red.png", "gone.png")]
    (data / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    words = ["--recipe", "demo-compress", "data.format=dialogues"]
    with pytest.raises(ValueError, match="1 of 2 rows"):
        run(data, *words)
    (row,) = pq.read_table(data / "out/lengths.parquet").to_pylist()
    assert row["kind"] == "dialogue" and 0 < row["image_tokens"] < row["tokens"]


MODEL = {"compression_tokens": 8, "max_length": 512}  # as the recipe has it


def training(data: Path, size: int = 2, **more) -> RunConfig:
    tree = {
        "objective": "match", "optim": {"batch_size": size}, "model": MODEL,
        "data": {"format": "pairs", "path": f"{data}/pairs.jsonl",
                 "image_root": f"{data}/images", "lengths": f"{data}/out", **more},
    }  # fmt: skip
    return RunConfig.model_validate(tree)


def test_ranks_share_a_batch_by_what_was_measured(data, monkeypatch) -> None:
    """The longest row to one rank, and to the other the two next ones, not as they come."""
    write(data, ROWS[:3] + ROWS[6:])
    assert run(data) == 0
    monkeypatch.setattr("coma_ds.comm.world_size", lambda: 2)
    found = build_data(training(data, size=4), processing())
    sizes = [int(found.collator([found.sources[0, row]]).sizes_B.sum()) for row in range(4)]
    shares = [[row for _, row in found.order.local_rows(0, rank, 2)] for rank in range(2)]
    totals = [sum(sizes[row] for row in share) for share in shares]
    heaviest = sorted(range(4), key=lambda row: -sizes[row])
    assert sorted(map(sorted, shares)) == sorted(
        map(sorted, ([heaviest[0], heaviest[3]], heaviest[1:3]))
    )
    assert max(totals) < sum(sorted(sizes)[2:])


def test_lengths_that_are_not_of_this_data(data) -> None:
    write(data, ROWS[:3])
    assert run(data) == 0
    write(data, ROWS[:2])
    with pytest.raises(ValueError, match=r"source 'pairs.jsonl': row 2 was measured, there are 2"):
        build_data(training(data), processing())
    with pytest.raises(ValueError, match=r"data.lengths '/none': no lengths.parquet there"):
        build_data(training(data, lengths="/none"), processing())
    longer = training(data).model_copy(update={"model": ModelConfig(**MODEL | {"max_length": 900})})
    with pytest.raises(ValueError, match=r"out': measured with model.max_length 512, here it is"):
        build_data(longer, processing())
    (data / "pairs.jsonl").rename(data / "other.jsonl")
    with pytest.raises(
        ValueError, match=r"source 'other.jsonl' was not measured, only pairs.jsonl"
    ):
        build_data(training(data, path=f"{data}/other.jsonl"), processing())
    (data / "out/lengths.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"lengths.parquet cannot be read"):
        build_data(training(data, path=f"{data}/other.jsonl"), processing())
