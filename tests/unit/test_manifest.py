"""Checkpoints as files: whole or not, kept or not, removed without a half in sight."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coma_ds.manifest import (
    Manifest,
    digest,
    problems,
    published,
    read_manifest,
    remove,
    remove_remains,
    set_apart,
    step_name,
    surplus,
    write_atomically,
    write_manifest,
)


def put(
    folder: Path,
    step: int,
    metric: float | None = None,
    content: bytes = b"abc",
    measure: str = "",
) -> Path:
    path = folder / step_name(step)
    path.mkdir(parents=True)
    (path / "one.pt").write_bytes(content)
    (path / "two.pt").write_bytes(content[::-1])
    files = {p.name: (p.stat().st_size, digest(p)) for p in path.iterdir()}
    write_manifest(path, Manifest(step, 2, 3, files, {"parameters": 7}, metric, measure))
    return path


def test_a_manifest_comes_back(tmp_path):
    path = put(tmp_path, 3, 0.5)
    found = read_manifest(path)
    assert (found.step, found.world, found.stage, found.metric) == (3, 2, 3, 0.5)
    assert found.frozen == {"parameters": 7} and set(found.files) == {"one.pt", "two.pt"}
    assert problems(path) == [] == problems(path, 0, 2) == problems(path, 1, 2)


@pytest.mark.parametrize("name", ["one.pt", "two.pt"])
def test_a_flipped_bit_is_found_by_the_rank_that_looks(tmp_path, name):
    path = put(tmp_path, 3)
    content = bytearray((path / name).read_bytes())
    content[1] ^= 4
    (path / name).write_bytes(content)
    assert read_manifest(path)  # sizes are right
    assert problems(path) == [f"checkpoint {path}: {name} is not what was written"]
    share = ["one.pt", "two.pt"].index(name)
    assert problems(path, share, 2) and not problems(path, 1 - share, 2)


def test_what_else_can_be_wrong(tmp_path):
    path = put(tmp_path, 3)
    (path / "one.pt").write_bytes(b"ab")
    assert problems(path) == [f"checkpoint {path}: one.pt is missing or not 3 bytes long"]
    (path / "one.pt").unlink()
    assert "one.pt is missing" in problems(path)[0]
    whole = json.loads((path / "manifest.json").read_text())
    for text in ("{", "[1]", "7", '"x"', "\x00", ""):
        (path / "manifest.json").write_text(text)
        assert "no readable manifest.json" in problems(path)[0], text
    changes = [{"step": 4}, {"world": 1}, {"files": [1]}, {"metric": 2.0}, {"hash": ""}, {"new": 1}]
    for tree in ({}, {"step": 1}, *(whole | change for change in changes)):
        (path / "manifest.json").write_text(json.dumps(tree))
        assert problems(path) == [f"checkpoint {path}: manifest.json is not what was written"], tree
    (path / "manifest.json").unlink()
    assert "no readable manifest.json" in problems(path)[0]
    assert "no readable manifest.json" in problems(tmp_path / "nowhere")[0]


def test_under_the_name_of_another_step(tmp_path):
    path = put(tmp_path, 3)
    moved = path.rename(tmp_path / step_name(5))
    assert problems(moved) == [f"checkpoint {moved}: it is of step 3"]
    assert problems(moved.rename(tmp_path / "copy")) == []


class TestSetApart:
    def test_those_of_later_steps(self, tmp_path):
        folder = tmp_path / "checkpoints"
        for step in (10, 20, 30):
            put(folder, step)
        (folder / "latest").write_text(step_name(30))
        (folder / "broken-step-00000040").mkdir()
        assert set_apart(folder, after=30) is None
        place = set_apart(folder, after=10)
        assert place == tmp_path / "checkpoints-1"
        assert [p.name for p in published(place)] == [step_name(30), step_name(20)]
        assert (folder / "latest").read_text() == step_name(10)
        assert {p.name for p in folder.iterdir()} == {
            step_name(10),
            "latest",
            "broken-step-00000040",
        }

    def test_all_of_them_and_again(self, tmp_path):
        for number in (1, 2):
            put(tmp_path / "checkpoints", 0)
            (tmp_path / "checkpoints" / "latest").write_text(step_name(0))
            assert set_apart(tmp_path / "checkpoints", after=-1).name == f"checkpoints-{number}"
        assert not list((tmp_path / "checkpoints").iterdir())
        assert set_apart(tmp_path / "checkpoints", after=-1) is None
        assert set_apart(tmp_path / "nowhere", after=-1) is None


class TestSurplus:
    def names(self, folder: Path, **keep) -> list[int]:
        keep = {"keep_last": 2, "keep_every": 0} | keep
        return sorted(int(p.name[5:]) for p in surplus(folder, **keep))

    def test_the_last_ones_stay(self, tmp_path):
        for step in (10, 20, 30, 40):
            put(tmp_path, step)
        assert self.names(tmp_path) == [10, 20]
        assert self.names(tmp_path, keep_last=1) == [10, 20, 30]
        assert self.names(tmp_path, keep_last=0) == []
        assert self.names(tmp_path, keep_every=20) == [10]

    def test_the_best_one_stays(self, tmp_path):
        for step, metric in ((10, 0.1), (20, 0.9), (30, None), (40, 0.4), (50, None)):
            put(tmp_path, step, metric)
        assert self.names(tmp_path) == [10, 30]

    def test_what_is_no_number_is_never_the_best(self, tmp_path):
        for step, metric in ((10, math.nan), (20, 0.9), (30, 0.3), (40, math.nan)):
            put(tmp_path, step, metric)
        assert self.names(tmp_path, keep_last=1) == [10, 30]

    def test_another_measure_is_no_rival(self, tmp_path):
        for step, metric in ((10, 0.2), (20, 0.9), (30, 0.1), (40, 0.1)):
            put(tmp_path, step, metric, measure="a" if step == 20 else "b")
        assert self.names(tmp_path, keep_last=1, best="b") == [20, 30]
        assert self.names(tmp_path, keep_last=1, best="a") == [10, 30]
        assert self.names(tmp_path, keep_last=1) == [10, 20, 30]

    def test_of_equals_the_later_one_is_the_best(self, tmp_path):
        for step, metric in ((10, 0.9), (20, 0.9), (30, 0.1), (40, 0.2)):
            put(tmp_path, step, metric)
        assert self.names(tmp_path, keep_last=1) == [10, 30]

    def test_a_broken_one_is_no_reason_to_remove_a_good_one(self, tmp_path):
        for step in (10, 20, 30):
            put(tmp_path, step)
        for step in (20, 30):
            (tmp_path / step_name(step) / "one.pt").unlink()
        assert self.names(tmp_path, keep_last=1) == []
        assert [p.name for p in published(tmp_path)] == [step_name(s) for s in (30, 20, 10)]

    @settings(max_examples=60, deadline=None)
    @given(
        steps=st.lists(st.integers(1, 40), unique=True, min_size=1, max_size=8),
        data=st.data(),
        last=st.integers(0, 4),
        every=st.integers(0, 5),
    )
    def test_never_the_newest_or_the_best(self, tmp_path_factory, steps, data, last, every):
        folder = tmp_path_factory.mktemp("run")
        metrics = {s: data.draw(st.one_of(st.none(), st.floats(0, 1))) for s in steps}
        for step in steps:
            put(folder, step, metrics[step])
        gone = set(self.names(folder, keep_last=last, keep_every=every))
        assert max(steps) not in gone
        measured = [s for s in steps if metrics[s] is not None]
        if measured:
            top = max(metrics[s] for s in measured)
            assert any(metrics[s] == top and s not in gone for s in measured)
        assert len(steps) - len(gone) >= min(len(steps), last)


def test_a_removal_that_is_cut_off_leaves_no_half(tmp_path, monkeypatch):
    path, calls = put(tmp_path, 3), []

    def dies(place, **_):
        calls.append(place)
        if len(calls) == 2:  # the removal itself, after the rest of an earlier one
            raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr("coma_ds.manifest.shutil.rmtree", dies)
        remove(path)
    assert published(tmp_path) == []
    assert [p.name for p in tmp_path.iterdir()] == [f"deleting-{step_name(3)}"]
    for name in ("staging-1-step-00000009", "universal-step-00000003"):
        (tmp_path / name).mkdir()
    put(tmp_path, 4)
    remove_remains(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [step_name(4)]


def test_a_text_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "latest"
    write_atomically(file, "one")
    write_atomically(file, "two")
    assert file.read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_the_manifest_is_plain_json(tmp_path):
    tree = json.loads((put(tmp_path, 3) / "manifest.json").read_text())
    assert tree["files"]["one.pt"] == [3, digest(tmp_path / step_name(3) / "one.pt")]
