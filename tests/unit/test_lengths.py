"""What was measured of samples, in a plan: weighted as drawn, under the settings of the run."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coma_ds.commands.main import dispatch
from coma_ds.config import load_config
from coma_ds.data.lengths import Settings


def write_lengths(folder, image_tokens: int) -> None:
    """As measured for the recipe of 3B."""
    folder.mkdir()
    patches = SimpleNamespace(patch_size=14, merge_size=2)
    settings = Settings.of(load_config("qwen2_5_vl_3b-match").model, patches)
    columns = {
        "source": ["a", "a", "a", "b", "b", "eval/x"],
        "row": [0, 0, 1, 0, 0, 0],
        "kind": ["query", "target", "query", "query", "target", "side"],
        "tokens": [600, 40, 600, 50, 50, 9999],
        "image_tokens": [image_tokens, 0, image_tokens, 0, 0, 9999],
        "dialogue": [0] * 6,
        "answers": [0] * 6,
    }
    table = pa.table(columns, metadata=settings.metadata())
    pq.write_table(table, folder / "lengths.parquet")


def run(capsys, *words: str) -> tuple[int, str]:
    code = dispatch(["plan", "--gpus", "8", "--gpu", "h200", *words])
    return code, capsys.readouterr().out


def test_measured_lengths_are_weighted_as_the_run_draws_them(tmp_path, capsys) -> None:
    """Source a has 2 rows, b one: alike under uniform, by their rows under proportional."""
    write_lengths(tmp_path / "prepared", 500)
    words = ["--recipe", "qwen2_5_vl_3b-match", "--lengths", str(tmp_path / "prepared")]
    with pytest.raises(
        ValueError, match=r"prepared': source '\w+' was not measured, only a, b: run"
    ):
        run(capsys, *words)  # lengths of other data
    words.append("data.sources=[a, b]")
    means = []
    for weighting in ("uniform", "proportional"):
        code, text = run(capsys, *words, f"data.weighting={weighting}")
        assert code == 0 and "measured: 3 rows of 2 source(s)" in text
        found = re.search(r"a sample has (\d+) tokens on average \((\d+) of images\)", text)
        means.append([int(x) for x in found.groups()])
    uniform = np.array([(1240 / 2 + 100) / 2, 1000 / 2 / 2]) / (1.5 / 2 + 1)
    proportional = np.array([(1240 + 100) / 3, 1000 / 3]) / (5 / 3)
    assert means == [[round(x) for x in uniform], [round(x) for x in proportional]]
    more = ("data.weighting=proportional", "model.compression_tokens=40")  # 8 in each sample
    assert f"a sample has {means[1][0] + 8} tokens on average" in run(capsys, *words, *more)[1]
    for other, said in (
        (["model.max_vision_tokens=999"], "measured with model.max_vision_tokens 1024, here it is "
         "model.max_vision_tokens 999: run coma-ds prepare again"),
        (["model.path=Qwen/Qwen3-VL-2B-Instruct", "model.family=null"], "28 x 28 pixels, here it"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            run(capsys, *words, *other)
