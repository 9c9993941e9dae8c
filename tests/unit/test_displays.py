"""What an evaluation shows: sample queries, neighbours, projector, tables, TensorBoard tags."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coma_ds.data.records import RankingTask, Side
from coma_ds.displays import (
    CELL,
    GAP,
    GOLD,
    NEAREST,
    QUERY_WIDTH,
    THUMB,
    Displays,
    Found,
    bottleneck_table,
    curves,
    find_neighbours,
    neighbour_grid,
    projector_points,
    ranking_tables,
    result_tags,
    sample_queries,
    without_shared_start,
)
from coma_ds.metrics import Monitor


class Flat:
    """A picture of one colour."""

    def __init__(self, colour, size=(20, 10)):
        self.colour, self.size, self.name = colour, size, f"flat {colour}"

    def open(self):
        return Image.new("RGB", self.size, self.colour)

    def digest(self):
        return hashlib.blake2b(repr(self.colour).encode(), digest_size=16).digest()


def make_task(name="draw/seen", group="Ret", domain="IND", count=30, query="text", pool="picture"):
    """Query i asks for candidate i; every query ranks all candidates."""
    picture = [Flat((i * 7 % 256, 40, 90)) for i in range(count)]

    def side(kind, i, text):
        if kind == "picture":
            return Side("<|image_1|>", (picture[i],))
        return Side(text)

    candidates = [np.array([i, *(j for j in range(count) if j != i)]) for i in range(count)]
    return RankingTask(
        name,
        group,
        domain,
        [side(query, i, f"Find a picture of: thing {i}") for i in range(count)],
        [side(pool, i, f"word {i}") for i in range(count)],
        candidates,
    )


def unit(rows, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)


def test_the_sample_depends_on_the_name_alone():
    first = sample_queries("name_t2i/seen", 1000)
    assert first == sample_queries("name_t2i/seen", 1000) == sorted(set(first))
    assert len(first) == 12 and max(first) < 1000
    assert first != sample_queries("name_t2i/unseen", 1000)
    assert sample_queries("x", 3) == [0, 1, 2]


def test_neighbours_are_those_of_a_plain_sort():
    task, query, pool = make_task(), unit(30, seed=1), unit(30, seed=2)
    scores = (query @ pool.T).numpy()
    found = find_neighbours(task, query, pool)
    assert [item.query for item in found] == sample_queries("draw/seen", 30)
    for item in found:
        order = np.argsort(-scores[item.query])
        assert item.nearest == order[:NEAREST].tolist()
        assert item.rank == order.tolist().index(item.gold)
        assert item.gold == item.query
        assert item.scores == pytest.approx(scores[item.query][order[:NEAREST]], abs=1e-4)
        assert item.text == f"Find a picture of: thing {item.query}"


def test_the_gold_candidate_is_framed_where_it_stands():
    task = make_task()
    among = Found(3, "thing 3", 1, 3, [9, 3, 5, 6, 7], [0.9, 0.8, 0.7, 0.6, 0.5])
    beyond = Found(4, "thing 4", 17, 4, [9, 8, 5, 6, 7], [0.9, 0.8, 0.7, 0.6, 0.5])
    grid = neighbour_grid(task, [among, beyond])
    assert grid.dtype == np.uint8 and grid.shape[2] == 3
    gold = np.array(ImageColor.getrgb(GOLD))
    framed = (grid == gold).all(-1)
    rows = [
        framed[GAP : GAP + CELL],
        framed[GAP + grid.shape[0] // 2 : GAP + CELL + grid.shape[0] // 2],
    ]

    def columns(row):
        return set(np.flatnonzero(row.sum(0) > CELL // 2).tolist())  # upright lines

    second = GAP + QUERY_WIDTH + (CELL + GAP)
    assert columns(rows[0]) and all(second - 4 < c < second + CELL + 4 for c in columns(rows[0]))
    last = 2 * GAP + QUERY_WIDTH + NEAREST * (CELL + GAP)
    assert columns(rows[1]) and all(last - 4 < c < last + CELL + 4 for c in columns(rows[1]))
    # the picture of candidate 9 keeps its shape and colour: 20 x 10 within a square
    middle = grid[GAP + CELL // 2, GAP + QUERY_WIDTH + CELL // 2]
    assert middle.tolist() == [63, 40, 90]
    assert grid[GAP + 4, GAP + QUERY_WIDTH + CELL // 2].tolist() == [255, 255, 255]


def test_candidates_of_text_and_queries_with_pictures_are_drawn():
    task = make_task(query="picture", pool="text")
    found = find_neighbours(task, unit(30), unit(30, seed=4))
    assert neighbour_grid(task, found[:2]).std() > 0


def test_the_projector_has_gold_candidates_with_the_names_that_ask_for_them():
    task, pool = make_task(count=50), unit(50, seed=3)
    emb, labels, thumbs = projector_points(task, pool, limit=11)
    assert emb.shape == (11, 8) and thumbs.shape == (11, 3, THUMB, THUMB)
    assert thumbs.dtype == np.float32 and 0 <= thumbs.min() and thumbs.max() <= 1
    # "thing" begins all names too, so what stays is the number
    for row, label in zip(emb, labels):
        np.testing.assert_array_equal(row, pool[int(label)].numpy())
    middle = (thumbs[:, 0, THUMB // 2, THUMB // 2] * 255).round()
    assert middle.tolist() == [int(label) * 7 % 256 for label in labels]


def test_the_shared_start_is_whole_words():
    assert without_shared_start(["Find: red car", "Find: red cat"]) == ["car", "cat"]
    assert without_shared_start(["one"]) == ["one"]
    assert without_shared_start([]) == []
    assert without_shared_start(["a b", "a b"]) == ["", ""]


RESULTS = {
    "sets": {
        "name_t2i/seen": {
            "p@1": 0.25, "recall@10": 0.5, "chance": 0.0007, "ties": 3, "group": "Ret",
            "domain": "IND",
        },
        "i2t/seen": {
            "p@1": 0.75, "recall@10": 1.0, "chance": 0.01, "ties": 0, "group": "Ret",
            "domain": "IND",
        },
        "group_cls/unseen": {
            "p@1": 0.5, "recall@10": 0.9, "chance": 1 / 9, "ties": 0, "group": "Cls",
            "domain": "OOD",
        },
    },
    "groups": {"Cls": 0.5, "Ret": 0.5, "IND": 0.5, "OOD": 0.5, "All": 0.5},
}  # fmt: skip


def test_tables_have_a_row_for_each_set_of_a_task():
    means, cls, ret = ranking_tables(RESULTS)
    assert means == ("0 means", ["%", "Cls", "Ret", "IND", "OOD", "All"], [["P@1", *["50.0"] * 5]])
    assert cls[0] == "1 Cls" and cls[2] == [["group_cls/unseen", "50.0", "90.0", "11.11", "0"]]
    assert ret[0] == "3 Ret" and ret[1] == ["set", "P@1 %", "R@10 %", "chance %", "ties"]
    assert ret[2][0] == ["name_t2i/seen", "25.0", "50.0", "0.07", "3"]
    one = {"sets": {"i2t/seen": RESULTS["sets"]["i2t/seen"]}, "groups": {"Ret": 0.75}}
    assert [name for name, *_ in ranking_tables(one)] == ["3 Ret"]


def test_the_bottleneck_table_has_the_ways_that_were_run():
    header, rows = bottleneck_table({"name": {"visible": 0.5, "questions": 9}})
    assert header == ["question", "visible %", "questions"] and rows == [["name", "50.0", "9"]]


def test_curves_are_grouped_and_means_over_other_sets_are_no_points_of_them():
    values, tags = curves(RESULTS)
    assert values["name_t2i/seen"] == 0.25 and tags["name_t2i/seen"] == "val Ret/name_t2i/seen"
    assert tags["group/All"] == "val/All"
    assert "val/All" in result_tags(tags) and len(result_tags(tags)) == 5
    values, tags = curves(RESULTS, means=False)
    assert values["group/All"] == 0.5 and "group/All" not in tags
    table = {"name": {"tokens": 0.1, "visible": 0.2, "blind": 0.0, "questions": 8}}
    values, tags = curves({"bottleneck": table})
    assert values["name/questions"] == 8 and "name/questions" not in tags
    assert result_tags(tags) == ["val tokens/name", "val visible/name"]


def watched(tmp_path, tasks, final):
    monitor = Monitor(tmp_path, active=True)
    displays = Displays(monitor, tmp_path, 7, final=final)
    for task in tasks:
        displays.watch(task, unit(len(task.queries)), unit(len(task.pool), seed=5))
    displays.finish(RESULTS)
    values, tags = curves(RESULTS)
    monitor.scalars(7, {"loss": 1.0, "samples_per_second": 2.0})
    monitor.scalars(7, values | {"training_seconds": 3.0}, group="eval", tags=tags)
    monitor.hparams({"optim.lr": 0.1, "init_from": None, "seed": 0}, result_tags(tags))
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    return events.Reload()


def five_tasks():
    return [
        make_task("a/seen"),
        make_task("b/seen"),  # of the same kind as a: not shown
        make_task("c/seen", query="picture", pool="text"),
        make_task("d/unseen", domain="OOD"),
        make_task("e/seen", group="Cls", query="picture", pool="text"),
    ]


def test_the_last_evaluation_shows_each_kind_of_set_once(tmp_path):
    events = watched(tmp_path, five_tasks(), final=True)
    shown = sorted(tag.split("/", 1)[1] for tag in events.Tags()["images"])
    assert shown == ["a/seen", "c/seen", "d/unseen", "e/seen"]
    texts = [tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]]
    assert sorted(texts) == ["results/0 means", "results/1 Cls", "results/3 Ret"]
    found = json.loads((tmp_path / "neighbours.json").read_text())
    assert list(found) == ["a/seen", "c/seen", "d/unseen", "e/seen"]
    assert Found(**found["a/seen"][0]).query == sample_queries("a/seen", 30)[0]
    config = (tmp_path / "tensorboard" / "projector_config.pbtxt").read_text()
    assert config.count("embeddings {") == 1 and "a-seen" in config
    labels = next((tmp_path / "tensorboard").rglob("metadata.tsv")).read_text().split()
    assert sorted(labels, key=int) == [str(i) for i in range(30)]


def test_an_evaluation_on_the_way_shows_one_set_and_no_projector(tmp_path):
    events = watched(tmp_path, five_tasks(), final=False)
    assert events.Tags()["images"] == ["val neighbours/a/seen"]
    assert not (tmp_path / "neighbours.json").exists()
    assert not (tmp_path / "tensorboard" / "projector_config.pbtxt").exists()


def test_curves_and_hparams_share_their_tags_without_a_second_point(tmp_path):
    events = watched(tmp_path, [make_task()], final=True)
    scalars = events.Tags()["scalars"]
    assert {"train/loss", "train speed/samples_per_second", "val/All"} <= set(scalars)
    assert not [tag for tag in scalars if "training_seconds" in tag]
    assert [(e.step, e.value) for e in events.Scalars("val/All")] == [(7, 0.5)]
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 1
    plugin = events.summary_metadata
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(plugin)
    start = plugin["_hparams_/session_start_info"].plugin_data.content
    assert b"optim.lr" in start and b"init_from" not in start
    assert b"val/All" in plugin["_hparams_/experiment"].plugin_data.content
