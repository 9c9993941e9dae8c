"""``coma-ds encode``: a file in, the Embedder's vectors out, errors with their row."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coma_ds import Embedder
from coma_ds.commands.main import run
from tests.folders import base_folder, disturb, export, load, png


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("model")
    model, processing = load(base_folder(place / "base"))
    return export(disturb(model), processing, place / "model")


class TestEncode:
    ROWS = 70  # more than one part at a batch size of 2

    def table(self, folder: Path) -> dict[str, list]:
        """Texts and images of every kind: both, one of them, a list."""
        (folder / "images").mkdir(exist_ok=True)
        for i in range(3):
            (folder / "images" / f"{i}.png").write_bytes(png(i))
        images = [None, "0.png", "1.png", ["2.png", "0.png"]]
        texts = ["a car", "", "two words", "more"]
        count = range(self.ROWS)
        return {
            "id": [f"row {i}" for i in count],
            "text": [f"{texts[i % 4]} {i}" if texts[i % 4] else "" for i in count],
            "image": [images[i % 4] for i in count],
        }

    def expected(self, model_folder, folder, table):
        images = [
            [folder / "images" / p for p in (i if isinstance(i, list) else [i])] if i else None
            for i in table["image"]
        ]
        return Embedder(model_folder).encode(table["text"], images)

    @pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
    def test_the_vectors_of_the_embedder(self, model_folder, tmp_path, kind, capsys):
        table = self.table(tmp_path)
        file, output = tmp_path / f"rows.{kind}", tmp_path / "out.parquet"
        if kind == "jsonl":
            rows = [dict(zip(table, values)) for values in zip(*table.values())]
            file.write_text("\n".join(map(json.dumps, rows)))
        elif kind == "csv":
            with file.open("w", newline="") as stream:
                writer = csv.writer(stream)
                writer.writerow(table)
                for a, b, c in zip(*table.values()):
                    writer.writerow([a, b, json.dumps(c) if isinstance(c, list) else c])
        else:
            lists = [[i] if isinstance(i, str) else i for i in table["image"]]
            pq.write_table(pa.table(table | {"image": lists}), file)
        argv = ["encode", str(model_folder), "--input", str(file), "--output", str(output)]
        argv += ["--image-root", str(tmp_path / "images"), "--batch-size", "2", "--workers", "0"]
        assert run(argv) == 0
        assert capsys.readouterr().out == f"{self.ROWS} vectors of 64 -> {output}\n"
        found = pq.read_table(output)
        assert found.column_names == ["row", "id", "embedding"]
        assert found["row"].to_pylist() == list(range(self.ROWS))
        assert found["id"].to_pylist() == table["id"]
        assert found.schema.field("embedding").type == pa.list_(pa.float32(), 64)
        got = np.stack(found["embedding"].to_numpy())
        assert np.abs(got - self.expected(model_folder, tmp_path, table)).max() < 1e-6
        assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "out.parquet", file.name]

    def test_npy_in_several_parts(self, model_folder, tmp_path):
        file, output = tmp_path / "rows.jsonl", tmp_path / "out.npy"
        texts = [f"text {i}" for i in range(self.ROWS)]
        file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        argv = ["encode", str(model_folder), "--input", str(file), "--output", str(output)]
        assert run([*argv, "--batch-size", "2", "--workers", "0"]) == 0
        want = Embedder(model_folder).encode(texts)
        assert np.abs(np.load(output) - want).max() < 1e-6

    def test_a_column_that_comes_later(self, model_folder, tmp_path):
        """JSON lines need not have the same keys: no image and no text is lost."""
        file, output = tmp_path / "rows.jsonl", tmp_path / "out.npy"
        (tmp_path / "1.png").write_bytes(png(1))
        rows = [{"text": "a"}, {"text": "b", "image": "1.png"}, {"image": "1.png"}]
        file.write_text("\n".join(map(json.dumps, rows)))
        argv = ["encode", str(model_folder), "--input", str(file), "--output", str(output)]
        assert run([*argv, "--image-root", str(tmp_path), "--workers", "0"]) == 0
        want = Embedder(model_folder).encode(["a", "b", None], [None, png(1), png(1)])
        assert np.abs(np.load(output) - want).max() < 1e-6

    @pytest.mark.parametrize("ids", [[None, 7, None], [None, None, "x"], ["", "x", None]])
    @pytest.mark.parametrize("written", [True, False])
    def test_rows_without_an_id(self, model_folder, tmp_path, ids, written):
        """Left out or null: the vector has no id."""
        file, output = tmp_path / "rows.jsonl", tmp_path / "out.parquet"
        rows = [{"text": "a", "id": i} for i in ids]
        rows = rows if written else [{k: v for k, v in r.items() if v is not None} for r in rows]
        file.write_text("\n".join(map(json.dumps, rows)))
        argv = ["encode", str(model_folder), "--input", str(file), "--output", str(output)]
        assert run([*argv, "--workers", "0"]) == 0
        assert pq.read_table(output)["id"].to_pylist() == ids

    def test_a_column_of_ids_without_any(self, model_folder, tmp_path):
        file, output = tmp_path / "rows.parquet", tmp_path / "out.parquet"
        pq.write_table(pa.table({"text": ["a", "b"], "id": pa.nulls(2)}), file)
        argv = ["encode", str(model_folder), "--input", str(file), "--output", str(output)]
        assert run([*argv, "--workers", "0"]) == 0
        assert pq.read_table(output).column_names == ["row", "embedding"]

    def test_npy_and_other_column_names(self, model_folder, tmp_path):
        file, output = tmp_path / "rows.parquet", tmp_path / "out.npy"
        pq.write_table(
            pa.table({"body": ["a", "b c"], "n": [7, 8], "shot": [png(1), png(2)]}), file
        )
        argv = ["encode", str(model_folder), "--input", str(file), "--output", str(output)]
        argv += ["--text-column", "body", "--image-column", "shot", "--id-column", "n"]
        assert run(argv) == 0
        got = np.load(output)
        want = Embedder(model_folder).encode(["a", "b c"], [png(1), png(2)])
        assert got.dtype == np.float32 and np.abs(got - want).max() < 1e-6
        argv[argv.index(str(output))] = str(tmp_path / "out.parquet")
        assert run(argv) == 0
        assert pq.read_table(tmp_path / "out.parquet")["id"].to_pylist() == [7, 8]

    @pytest.mark.parametrize(
        ("rows", "extra", "said"),
        [
            (['{"text": "a"}', '{"text": " "}'], [], "rows.jsonl line 2 is empty: it has neither"),
            (['{"text": "a"}', '{"text": 3}'], [], "line 2: text must be a text, got int"),
            (['{"text": "a"}', "{"], [], "rows.jsonl line 2: not valid JSON"),
            (['{"text": "a"}', '{"image": "x.png"}'], ["--image-column", "img"], "no column 'img'"),
            (['{"text": "a"}', '{"image": "x.png"}'], [], "line 2: the image is given as a path"),
            (['{"image": "x.png"}'], [], "rows.jsonl line 1: the image is given as a path"),
            (['{"image": "x.png"}'], ["--image-root", "."], "line 1: image ./x.png does not"),
            (['{"image": "../x.png"}'], ["--image-root", "."], "rows.jsonl line 1: image path"),
            (['{"body": "a"}'], [], "there is no column 'text' or 'image'; it has body: name one"),
            (['{"body": "a"}'], ["--text-column", "b"], "no column 'b' (--text-column); it has"),
            (['{"text": "a", "id": 1}', '{"text": "b", "id": "x"}'], [],
             "rows.jsonl line 2: id is 'x', expected a whole number as above it"),
            (['{"text": "a"}', '{"text": "b", "id": "x"}', '{"text": "c", "id": true}'], [],
             "rows.jsonl line 3: id is True, expected a text as above it"),
            (['{"text": "a"}', '{"text": "b <|im_end|>"}'], [],
             "rows.jsonl line 2: the text 'b <|im_end|>' contains '<|im_end|>'"),
            (['{"text": "<|image_1|>"}'], [], "rows.jsonl line 1: the text has the image marks"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("workers", ["0", "1"])
    def test_errors_name_the_row(self, model_folder, tmp_path, capsys, rows, extra, said, workers):
        file, output = tmp_path / "rows.jsonl", tmp_path / "out.npy"
        file.write_text("\n".join(rows))
        argv = ["encode", str(model_folder), "--input", str(file), "--output", str(output)]
        assert run([*argv, "--workers", workers, *extra]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and said in err, err
        assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]

    @pytest.mark.parametrize("device", ["cuda:77", "foo"])
    def test_a_device_that_is_not_there(self, model_folder, tmp_path, capsys, device):
        (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
        argv = ["encode", str(model_folder), "--input", str(tmp_path / "rows.jsonl")]
        assert run([*argv, "--output", str(tmp_path / "out.npy"), "--device", device]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: device '{device}' cannot be used here: ")
        assert err.count("\n") == 1

    def test_wrong_places(self, model_folder, tmp_path, capsys):
        argv = ["encode", str(model_folder), "--input", "none.jsonl", "--output"]
        assert run([*argv, "out.txt"]) == 2
        assert run([*argv, str(tmp_path / "no" / "out.npy")]) == 2
        assert run([*argv, str(tmp_path / "out.npy")]) == 2
        assert run([*argv, str(tmp_path / "out.npy"), "--batch-size", "0"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "error: --output out.txt: expected a name that ends in .parquet or .npy"
        assert lines[1].endswith(f"out.npy: there is no folder {tmp_path}/no")
        assert lines[2].startswith("error: none.jsonl: no such file")
        assert lines[3] == "error: --batch-size must be 1 or more, --workers 0 or more"
