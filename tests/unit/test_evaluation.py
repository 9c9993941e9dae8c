"""The evaluator against a hand-worked MMEB file and an independent numpy implementation."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from coma_ds.data.images import BytesPicture
from coma_ds.data.mmeb import mmeb_eval
from coma_ds.data.records import RankingTask, Side
from coma_ds.evaluation import (
    evaluate,
    format_table,
    group_means,
    neighbours,
    precision_at_1,
    rank_gold,
    split_blocks,
    summed_up,
    write_results,
)

quick = settings(max_examples=80, deadline=None)

# Worked by hand.  Vectors by text; the score is the dot product.
VECTORS = {
    "q east": (1.0, 0.0),
    "q north": (0.0, 1.0),
    "q both": (0.6, 0.8),
    "q west": (-1.0, 0.0),
    "east": (1.0, 0.0),
    "east too": (1.0, 0.0),
    "north": (0.0, 1.0),
    "near": (0.8, 0.6),
    "west": (-1.0, 0.0),
}
ROWS = [
    # gold 1.0 against 0.0 and 0.8: a hit; the second "north" is one candidate, not two
    ("q east", ["east", "north", "near", "north"]),
    # gold 1.0 against 1.0: only the tie decides, no hit
    ("q east", ["east", "east too", "north"]),
    # gold "north" 0.8 against "near" 0.96: a miss without a tie
    ("q both", ["north", "near", "west"]),
    # gold 0.0 against 0.0 and 1.0: a miss, and the tie decides nothing
    ("q north", ["east", "west", "north"]),
    # the gold one listed again is no rival: a hit
    ("q west", ["west", "east", "west"]),
]


def _hand_set(root: Path, name: str, rows: list[tuple[str, list[str]]]) -> RankingTask:
    (root / name).mkdir(parents=True)
    table = {
        "qry_text": [query for query, _ in rows],
        "qry_img_path": [""] * len(rows),
        "tgt_text": [targets for _, targets in rows],
        "tgt_img_path": [[""] * len(targets) for _, targets in rows],
    }
    pa.parquet.write_table(pa.table(table), root / name / "test-00000-of-00001.parquet")
    return mmeb_eval(str(root), None, name)


class Lookup:
    """A model that knows every text by heart, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.calls = 0

    def __call__(self, sides: Sequence[Side]) -> Tensor:
        self.calls += 1
        self.asked.update(side.text for side in sides)
        return torch.tensor([VECTORS[side.text] for side in sides])


def test_hand_worked_file(tmp_path: Path) -> None:
    task = _hand_set(tmp_path, "ImageNet-1K", ROWS)
    model = Lookup()
    results = evaluate([task], model)
    assert results == {
        "sets": {
            "ImageNet-1K": {
                "p@1": 2 / 5,
                "recall@5": 1.0,
                "recall@10": 1.0,
                "queries": 5,
                "candidates": (3 + 3 + 3 + 3 + 2) / 5,
                "chance": pytest.approx((4 / 3 + 1 / 2) / 5),
                "ties": 1,
                "group": "Cls",
                "domain": "IND",
            }
        },
        "groups": {"Cls": 2 / 5, "IND": 2 / 5, "All": 2 / 5},
    }
    assert evaluate([task], lambda sides: Lookup()(sides).numpy()) == results
    assert max(model.asked.values()) == 1
    query_emb = model(list(task.queries))
    pool_emb = model(list(task.pool))
    hits, ties = precision_at_1(query_emb, pool_emb, task.candidates)
    assert hits.tolist() == [True, False, False, False, True] and ties == 1
    rank, tied = rank_gold(query_emb, pool_emb, task.candidates)
    assert rank.tolist() == [0, 1, 1, 2, 0]
    assert tied.tolist() == [False, True, False, False, False]
    best = neighbours(query_emb, pool_emb, task.candidates, 2)
    assert [[task.pool[int(i)].text for i in row] for row in best] == [
        ["east", "near"],
        ["east too", "east"],
        ["near", "north"],
        ["north", "west"],
        ["west", "east"],
    ]


def test_a_collapsed_model_scores_nothing(tmp_path: Path) -> None:
    task = _hand_set(tmp_path, "ImageNet-1K", ROWS)
    values = evaluate([task], lambda sides: torch.full((len(sides), 7), 0.37))
    assert values["sets"]["ImageNet-1K"]["p@1"] == 0.0
    assert values["sets"]["ImageNet-1K"]["ties"] == 5


def test_groups_are_means_over_sets(tmp_path: Path) -> None:
    hit, miss = ("q east", ["east", "north"]), ("q east", ["north", "east"])
    tasks = [
        _hand_set(tmp_path, "ImageNet-1K", [hit] * 4),
        _hand_set(tmp_path, "SUN397", [hit, miss]),
        _hand_set(tmp_path, "ObjectNet", [miss]),
        _hand_set(tmp_path, "MSCOCO", [hit, miss, miss, miss]),
    ]
    results = evaluate(tasks, Lookup())
    assert {name: values["p@1"] for name, values in results["sets"].items()} == {
        "ImageNet-1K": 1.0, "SUN397": 0.5, "ObjectNet": 0.0, "MSCOCO": 0.25,
    }  # fmt: skip
    assert results["groups"] == {
        "Cls": 0.5,
        "VG": 0.25,
        "IND": pytest.approx((1 + 0.5 + 0.25) / 3),
        "OOD": 0.0,
        "All": pytest.approx(1.75 / 4),
    }
    assert list(results["groups"]) == ["Cls", "VG", "IND", "OOD", "All"]


def test_each_side_is_encoded_once_over_all_sets(tmp_path: Path) -> None:
    tasks = [_hand_set(tmp_path, name, ROWS) for name in ("ImageNet-1K", "SUN397", "GQA")]
    tasks.insert(1, _hand_set(tmp_path, "MSCOCO", [("q both", ["west", "near"])]))
    alone = {task.name: evaluate([task], Lookup())["sets"][task.name] for task in tasks}
    model = Lookup()
    assert evaluate(tasks, model)["sets"] == alone
    assert set(model.asked.values()) == {1} and model.calls == 1


def test_pictures_are_told_apart_by_content() -> None:
    def picture(color: str, name: str) -> BytesPicture:
        out = io.BytesIO()
        Image.new("RGB", (2, 2), color).save(out, "PNG")
        return BytesPicture(out.getvalue(), name)

    sides = [
        Side("<|image_1|>", (picture(color, f"row {row}"),))
        for row, color in enumerate(("red", "blue", "red", "lime"))
    ]
    task = RankingTask("x", "Ret", "IND", sides[:1], sides[1:], [np.array([1, 0, 2])])
    asked: list[str] = []

    def encode(chosen: Sequence[Side]) -> Tensor:
        asked.extend(side.images[0].name for side in chosen)
        return torch.tensor([side.images[0].open().getpixel((0, 0)) for side in chosen]) / 255

    assert evaluate([task], encode)["sets"]["x"]["p@1"] == 1.0
    assert asked == ["row 0", "row 1", "row 3"]


def _numpy_ranks(
    queries: np.ndarray, pool: np.ndarray, candidates: list[np.ndarray]
) -> tuple[list[int], list[bool]]:
    """Independent: sort the distinct candidates by score, gold after its equals."""
    ranks, tied = [], []
    for query, places in zip(queries, candidates, strict=True):
        gold = places[0]
        scored = sorted(
            ((float(np.dot(query, pool[i])), i != gold) for i in set(places.tolist())),
            reverse=True,
        )
        ranks.append([not rival for _, rival in scored].index(True))
        gold_score = float(np.dot(query, pool[gold]))
        rivals = [score for score, rival in scored if rival]
        tied.append(bool(rivals) and max(rivals) == gold_score)
    return ranks, tied


@st.composite
def rankings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Small whole numbers: dot products are exact and ties are common."""
    size, queries, pool = (draw(st.integers(1, high)) for high in (3, 6, 40))
    numbers = st.integers(-2, 2)
    embs = [
        np.array(draw(st.lists(numbers, min_size=n * size, max_size=n * size)), dtype=np.float32)
        for n in (queries, pool)
    ]
    places = st.lists(st.integers(0, pool - 1), min_size=1, max_size=12)
    candidates = [np.array(draw(places), dtype=np.int64) for _ in range(queries)]
    return embs[0].reshape(queries, size), embs[1].reshape(pool, size), candidates


@quick
@given(rankings())
def test_against_numpy(drawn: tuple[np.ndarray, np.ndarray, list[np.ndarray]]) -> None:
    queries, pool, candidates = drawn
    rank, tied = rank_gold(torch.from_numpy(queries), torch.from_numpy(pool), candidates)
    assert (rank.tolist(), tied.tolist()) == _numpy_ranks(queries, pool, candidates)
    hits, ties = precision_at_1(torch.from_numpy(queries), torch.from_numpy(pool), candidates)
    assert hits.tolist() == [r == 0 for r in rank] and ties == sum(tied.tolist())
    best = neighbours(torch.from_numpy(queries), torch.from_numpy(pool), candidates, 3)
    for query, places, found in zip(queries, candidates, best, strict=True):
        ranked = sorted(
            set(places.tolist()), key=lambda i: (-np.dot(query, pool[i]), i == places[0])
        )
        gold = [i == places[0] for i in ranked[:3]]
        assert [i == places[0] for i in found] == gold and len(set(found.tolist())) == len(found)
        assert [np.dot(query, pool[i]) for i in found] == [
            np.dot(query, pool[i]) for i in ranked[:3]
        ]


@pytest.mark.parametrize("pool_size", [400, 20_000])
def test_equal_embeddings_tie_wherever_they_stand(pool_size: int) -> None:
    """More queries than a block, odd sizes, small and large pools (the two ways to score)."""
    rng = np.random.default_rng(0)
    pool = rng.normal(size=(pool_size, 96)).astype(np.float32)
    pool /= np.linalg.norm(pool, axis=1, keepdims=True)
    pool[pool_size // 2 :] = pool[: pool_size - pool_size // 2]
    queries = rng.normal(size=(301, 96)).astype(np.float32)
    half = pool_size // 2
    candidates = []
    for _ in range(301):
        gold = rng.integers(half)
        rest = rng.choice(half, 40, replace=False)
        candidates.append(np.array([gold, gold + half, *rest[rest != gold]]))
    rank, tied = rank_gold(torch.from_numpy(queries), torch.from_numpy(pool), candidates)
    exact = np.array([
        (pool[places].astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
        for query, places in zip(queries, candidates)
        if len(places) == 42
    ])  # fmt: skip
    full = [at for at, places in enumerate(candidates) if len(places) == 42]
    assert rank[full].tolist() == (exact[:, 1:] >= exact[:, :1]).sum(axis=1).tolist()
    assert (rank >= 1).all()
    assert tied[rank == 1].all() and not tied[rank > 1].any()


def test_scores_are_summed_in_double_precision() -> None:
    query = torch.ones(1, 3)
    pool = torch.tensor([[1e8, 1.0, -1e8], [0.0, 0.5, 0.0]])
    assert precision_at_1(query, pool, [np.array([0, 1])])[0].tolist() == [True]


def test_recall_counts_ranks() -> None:
    pool = torch.eye(12)
    query = torch.arange(12, 0, -1.0)[None]
    sides = [Side(f"c{i}") for i in range(12)]

    def recalls(gold: int) -> list[float]:
        places = np.array([gold, *(i for i in range(12) if i != gold)])
        task = RankingTask("x", "Ret", "IND", [Side("q")], sides, [places])
        values = evaluate([task], lambda asked: torch.cat((query, pool)))["sets"]["x"]
        return [values["p@1"], values["recall@5"], values["recall@10"]]

    assert recalls(0) == [1.0, 1.0, 1.0]
    assert recalls(4) == [0.0, 1.0, 1.0]
    assert recalls(9) == [0.0, 0.0, 1.0]
    assert recalls(10) == [0.0, 0.0, 0.0]


def test_refusals(tmp_path: Path) -> None:
    task = _hand_set(tmp_path, "ImageNet-1K", ROWS)
    with pytest.raises(ValueError, match="two evaluation sets have the same name: ImageNet-1K"):
        evaluate([task, task], Lookup())
    with pytest.raises(ValueError, match=r"ImageNet-1K: encode returned shape \[3, 2\] for \d+"):
        evaluate([task], lambda sides: torch.zeros(3, 2))
    with pytest.raises(
        ValueError, match=r"ImageNet-1K: 1 of 5 query embeddings are not finite, .* number 3"
    ):
        evaluate(
            [task],
            lambda sides: torch.tensor(
                [(float("nan"), 0.0) if s.text == "q north" else VECTORS[s.text] for s in sides]
            ),
        )
    with pytest.raises(ValueError, match="2 query embeddings for 1 queries"):
        precision_at_1(torch.zeros(2, 2), torch.zeros(2, 2), [np.array([0])])
    with pytest.raises(ValueError, match="query 0 has no candidates"):
        precision_at_1(torch.zeros(1, 2), torch.zeros(2, 2), [np.array([], dtype=np.int64)])


def test_watch_sees_every_task(tmp_path: Path) -> None:
    tasks = [_hand_set(tmp_path, name, ROWS) for name in ("ImageNet-1K", "SUN397")]
    seen: list[Any] = []
    evaluate(tasks, Lookup(), lambda task, q, p: seen.append((task.name, q.tolist(), len(p))))
    expected = torch.tensor([VECTORS[query] for query, _ in ROWS]).tolist()
    assert seen == [("ImageNet-1K", expected, 5), ("SUN397", expected, 5)]


def test_table(tmp_path: Path) -> None:
    tasks = [_hand_set(tmp_path, name, ROWS) for name in ("ImageNet-1K", "RefCOCO-Matching")]
    assert format_table(evaluate(tasks, Lookup())) == (
        "P@1 in %   Cls  VQA  Ret    VG   IND   OOD   All\n"
        "mean      40.0    -    -  40.0  40.0  40.0  40.0\n"
        "sets         1    0    0     1     1     1     2\n"
        "\n"
        "set               group  domain   P@1    R@5   R@10  chance  ties  queries  cand.\n"
        "ImageNet-1K       Cls    IND     40.0  100.0  100.0   36.67     1        5    2.8\n"
        "RefCOCO-Matching  VG     OOD     40.0  100.0  100.0   36.67     1        5    2.8\n"
    )


def test_shorter_embeddings_rank_too(tmp_path: Path) -> None:
    """Of (x, y) the first number alone, normalised again, is the sign of x."""
    tasks = [_hand_set(tmp_path, name, ROWS) for name in ("ImageNet-1K", "RefCOCO-Matching")]
    results = evaluate(tasks, Lookup(), widths=(1, 2))
    for row in results["sets"].values():
        assert row["widths"] == {"1": precision_of_signs(ROWS), "2": row["p@1"]}
    assert results["widths"]["2"] == results["groups"]
    assert results["widths"]["1"] == dict.fromkeys(results["groups"], precision_of_signs(ROWS))
    lines = format_table(results).splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["mean", "40.0"],
        ["width", "1"],
        ["width", "2"],
    ]
    with pytest.raises(ValueError, match="set ImageNet-1K: width 3: the embeddings have 2 numb"):
        evaluate(tasks, Lookup(), widths=(3,))


def precision_of_signs(rows: list[tuple[str, list[str]]]) -> float:
    """By hand: the gold one must have the sign of the query, and no other candidate may."""
    hits = 0
    for query, names in rows:
        gold, *others = [np.sign(VECTORS[query][0]) * np.sign(VECTORS[n][0]) for n in names]
        different = [o for o, n in zip(others, names[1:]) if n != names[0]]
        hits += gold > max(different, default=-2)
    return hits / len(rows)


def test_a_width_counts_where_every_set_has_it() -> None:
    row = {"group": "Ret", "domain": "IND", "p@1": 0.5}
    both = row | {"widths": {"8": 0.1, "16": 0.3}}
    found = summed_up({"a": both, "b": row | {"widths": {"16": 0.5}}})
    assert found["widths"] == {"16": dict.fromkeys(("Ret", "IND", "All"), 0.4)}
    assert "widths" not in summed_up({"a": both, "b": row})


def test_results_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, {"sets": {}, "groups": {"All": 0.5}})
    write_results(path, {"sets": {}, "groups": {"All": 0.25}})
    assert json.loads(path.read_text())["groups"] == {"All": 0.25}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(path, {"groups": {"All": float("nan")}})
    assert json.loads(path.read_text())["groups"] == {"All": 0.25}
    assert os.listdir(tmp_path) == ["results.json"]


def test_group_means_of_none() -> None:
    assert group_means({}) == {}


@quick
@given(st.integers(0, 200), st.integers(1, 30), st.integers(1, 6))
def test_blocks_do_not_depend_on_the_world(n: int, block: int, world: int) -> None:
    ranks = [split_blocks(n, block, rank, world) for rank in range(world)]
    assert len({len(blocks) for blocks in ranks}) == 1
    rounds = [blocks[i] for i in range(len(ranks[0])) for blocks in ranks]
    filled = [part for part in rounds if len(part)]
    assert filled == [part for part in split_blocks(n, block, 0, 1) if len(part)]
    assert [i for part in filled for i in part] == list(range(n))
    assert all(len(part) == block for part in filled[:-1])


def test_blocks_refuse() -> None:
    with pytest.raises(ValueError, match="cannot split 5 samples into blocks of 0 for rank 0 of 1"):
        split_blocks(5, 0, 0, 1)
