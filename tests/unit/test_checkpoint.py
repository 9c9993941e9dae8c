"""Publishing, with an engine that writes two small files."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from coma_ds import checkpoint
from coma_ds.checkpoint import Checkpoints, convert, load_checkpoint
from coma_ds.config import CheckpointConfig
from coma_ds.manifest import problems, published, read_manifest


class Shards:
    """An engine as far as checkpoints look at it."""

    stage = 3

    def __init__(self, *, failing: str = "", frozen: str = "f") -> None:
        self.failing, self.frozen = failing, frozen
        self.loaded: list[str] = []

    def save(self, folder: Path, tag: str) -> tuple[list[Path], list[str]]:
        files = [folder / tag / name for name in ("a.pt", "b.pt")]
        for file in files:
            file.write_text(f"{tag} {file.name}")
        return files, [self.failing] if self.failing else []

    def load(self, folder: Path, tag: str) -> None:
        self.loaded.append(tag)

    def frozen_weights(self) -> dict:
        return {"parameters": 3, "fingerprint": self.frozen}


@pytest.fixture
def told() -> list[int]:
    return []


@pytest.fixture
def checkpoints(tmp_path, told) -> Checkpoints:
    return Checkpoints(
        tmp_path / "c", CheckpointConfig(keep_last=2, best="group/All"), announce=told.append
    )


def save(checkpoints: Checkpoints, step: int, engine: Shards | None = None, **more):
    problem = checkpoints.save(engine or Shards(), step, **more)
    return problem or checkpoints.settle()


def test_what_is_published(checkpoints, told):
    done = save(checkpoints, 7, extra={"run.json": "{}"}, metric=0.5)
    assert (done.step, done.problem) == (7, "") and done.saving >= 0 and told == [7]
    (path,) = published(checkpoints.folder)
    manifest = read_manifest(path)
    assert set(manifest.files) == {"a.pt", "b.pt", "run.json"}
    assert (manifest.metric, manifest.measure) == (0.5, "group/All")
    assert {p.name for p in path.iterdir()} == {*manifest.files, "manifest.json"}
    assert problems(path) == [] and (checkpoints.folder / "latest").read_text() == path.name
    assert {p.name for p in checkpoints.folder.iterdir()} == {path.name, "latest"}
    assert checkpoints.settle() is None  # told once


def test_the_oldest_are_removed(checkpoints):
    for step, metric in ((1, 0.5), (2, None), (3, 0.1), (4, None)):
        save(checkpoints, step, metric=metric)
    assert [int(p.name[5:]) for p in published(checkpoints.folder)] == [4, 3, 1]  # 1 is the best


def test_a_pointer_that_cannot_be_written_hides_no_checkpoint(checkpoints, told, caplog):
    save(checkpoints, 1)
    (checkpoints.folder / "latest").unlink()
    (checkpoints.folder / "latest").mkdir()
    for step in (2, 3):
        assert save(checkpoints, step).problem == ""
    assert told == [1, 2, 3] and [p.name[-1] for p in published(checkpoints.folder)] == ["3", "2"]
    assert "latest does not name step-00000003" in caplog.text
    assert not list(checkpoints.folder.glob(".latest*"))


def test_a_published_one_is_never_written_again(checkpoints, told):
    save(checkpoints, 1)
    before = (published(checkpoints.folder)[0] / "a.pt").stat().st_mtime_ns
    assert save(checkpoints, 1) is None and told == [1]
    assert (published(checkpoints.folder)[0] / "a.pt").stat().st_mtime_ns == before


def test_a_broken_one_is_set_aside(checkpoints):
    save(checkpoints, 1)
    (published(checkpoints.folder)[0] / "a.pt").unlink()
    assert save(checkpoints, 1).problem == ""
    assert problems(published(checkpoints.folder)[0]) == []
    assert (checkpoints.folder / "broken-step-00000001" / "b.pt").is_file()


def test_what_cannot_be_written_leaves_nothing(checkpoints, told):
    save(checkpoints, 1)
    assert save(checkpoints, 2, Shards(failing="the disk is full")).problem == "the disk is full"
    assert [p.name for p in published(checkpoints.folder)] == ["step-00000001"]
    assert not list(checkpoints.folder.glob("staging-*")) and told == [1]
    assert save(checkpoints, 2).problem == ""  # with room again


@pytest.mark.parametrize("looks", [0, 1])
def test_an_older_start_publishes_nothing(tmp_path, told, looks):
    """Its folder was taken before the save, or between the writing and the publishing."""
    mine = iter([True] * looks + [False])
    older = Checkpoints(tmp_path, CheckpointConfig(), lambda: next(mine), told.append)
    assert "belongs to a newer start of this run" in save(older, 1).problem
    assert published(tmp_path) == [] and told == [] and not (tmp_path / "latest").exists()
    assert not list(tmp_path.glob("staging-*"))


def test_an_older_start_prunes_nothing(tmp_path, told):
    """Its folder was taken while the new checkpoint got its name."""
    settings = CheckpointConfig(keep_last=1)
    save(Checkpoints(tmp_path, settings, announce=told.append), 1)
    mine = iter([True, True, False])
    older = Checkpoints(tmp_path, settings, lambda: next(mine), told.append)
    assert save(older, 2).problem == ""
    assert [p.name for p in published(tmp_path)] == ["step-00000002", "step-00000001"]
    assert (tmp_path / "latest").read_text() == "step-00000001" and told == [1]


def test_the_manifest_names_the_base_of_what_was_left_out(tmp_path):
    for frozen, base in (({"parameters": 3, "fingerprint": "f"}, "some/base"), ({}, "")):
        engine = Shards()
        engine.frozen_weights = lambda frozen=frozen: frozen
        folder = tmp_path / (base.replace("/", "-") or "none")
        save(Checkpoints(folder, CheckpointConfig(), base="some/base"), 1, engine)
        assert read_manifest(published(folder)[0]).base == base


def test_two_starts_do_not_write_into_one_folder(tmp_path):
    """The older one, which lives on, cannot mix its shards with those of the newer."""
    staged, saving = [], []
    for start, engine in enumerate((Shards(), Shards())):
        save = engine.save
        engine.save = lambda folder, tag, save=save: staged.append(tag) or save(folder, tag)
        saving.append(Checkpoints(tmp_path, CheckpointConfig(), start=start + 1))
        saving[-1].save(engine, 5)
    for each in saving:
        each.settle()
    assert len(set(staged)) == 2 and all(tag.startswith("staging-") for tag in staged)


def test_a_file_is_on_the_disk_before_it_is_hashed(checkpoints, monkeypatch):
    """A hash of what only the cache holds would vouch for what a crash of the node takes away."""
    order = []
    for name in ("sync", "digest"):
        real = getattr(checkpoint, name)
        monkeypatch.setattr(
            checkpoint,
            name,
            lambda path, name=name, real=real: order.append((name, path.name)) or real(path),
        )
    assert save(checkpoints, 1).problem == ""
    for file in ("a.pt", "b.pt"):
        assert order.index(("sync", file)) < order.index(("digest", file))


def test_a_save_whose_folder_was_cleaned_away(checkpoints, monkeypatch):
    monkeypatch.setattr("coma_ds.checkpoint.sync", lambda path: checkpoints.clean())
    assert save(checkpoints, 1).problem
    assert published(checkpoints.folder) == []


class TestFind:
    def test_the_newest_that_verifies(self, checkpoints, caplog):
        assert checkpoints.find("auto") is None
        for step in (1, 2):
            save(checkpoints, step)
        newest, before = published(checkpoints.folder)
        (checkpoints.folder / "latest").write_text("step-00000099")  # nothing hangs on it
        assert checkpoints.find("auto") == newest and checkpoints.find("none") is None
        content = (newest / "b.pt").read_text()
        (newest / "b.pt").write_text(content.swapcase())  # of the same length
        with pytest.raises(ValueError, match=r"b\.pt is not what was written"):
            checkpoints.find(str(newest))
        assert checkpoints.find(str(before)) == before
        assert checkpoints.find("auto") == before  # for export, which only looks
        assert newest.is_dir() and (checkpoints.folder / "latest").read_text() == "step-00000099"
        assert checkpoints.find("auto", going_on=True) == before
        assert "b.pt is not what was written; falling back to the one before" in caplog.text
        # it does not stand in the way of the next one of that step
        assert published(checkpoints.folder) == [before]
        assert (checkpoints.folder / "latest").read_text() == before.name
        assert (newest.with_name(f"broken-{newest.name}") / "b.pt").is_file()

    def test_without_a_whole_one_all_stay(self, checkpoints):
        for step in (1, 2):
            save(checkpoints, step)
        for path in published(checkpoints.folder):
            (path / "manifest.json").unlink()
        for _ in range(2):
            with pytest.raises(ValueError, match=r"no checkpoint is whole \(step-00000002, step-0"):
                checkpoints.find("auto")

    def test_remains_are_no_checkpoints(self, checkpoints):
        save(checkpoints, 1)
        for name in ("staging-step-00000005", "deleting-step-00000000", "broken-step-00000009"):
            (checkpoints.folder / name).mkdir()
        assert checkpoints.find("auto").name == "step-00000001"
        checkpoints.clean()
        names = {p.name for p in checkpoints.folder.iterdir()}
        assert names == {"step-00000001", "latest", "broken-step-00000009"}


@pytest.mark.parametrize("given", ["newest", "run", "run/c", "run/c/latest"])
def test_what_is_no_checkpoint_is_told_what_is_expected(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    own = Checkpoints(tmp_path / "run" / "c", CheckpointConfig())
    save(own, 1)
    with pytest.raises(ValueError, match="expected auto, none, or a folder RUN/checkpoints/step-"):
        own.find(given, going_on=True)
    assert own.find("run/c/step-00000001") == Path("run/c/step-00000001")


def test_frozen_weights_are_compared(checkpoints):
    save(checkpoints, 4)
    path, same, other = checkpoints.find("auto"), Shards(), Shards(frozen="g")
    assert load_checkpoint(same, path) == 4 and same.loaded == [path.name]
    with pytest.raises(ValueError) as caught:
        load_checkpoint(other, path, "some/base")
    assert "its 3 frozen parameters (f) are not those of some/base (3, g)" in str(caught.value)


def test_a_conversion_that_fails_is_told(checkpoints):
    save(checkpoints, 4)
    path = checkpoints.find("auto")
    with pytest.raises(
        ValueError, match=r"step-00000004: DeepSpeed could not convert it \(.*_optim"
    ):
        convert(path)
    assert not list(checkpoints.folder.glob("universal-*"))


def test_a_conversion_leaves_a_foreign_folder_alone(checkpoints, tmp_path, monkeypatch):
    """The copy goes where this run may write, which may be another place."""
    save(checkpoints, 4)
    path, asked = checkpoints.find("auto"), []
    monkeypatch.setattr(
        checkpoint.subprocess, "run",
        lambda command, **_: asked.append(command) or SimpleNamespace(returncode=0),
    )  # fmt: skip
    own = tmp_path / "own" / "checkpoints"
    assert convert(path, own) == own / "universal-step-00000004"
    assert asked[0][-1] == str(own / "universal-step-00000004") and own.is_dir()


def test_a_poll_takes_nothing_from_a_save_under_way(checkpoints, monkeypatch):
    """The outcome is set before the thread has ended: a poll in between must not lose it."""
    go, publish = threading.Event(), Checkpoints._publish

    def slow(self, *arguments):
        publish(self, *arguments)
        go.wait(10)

    monkeypatch.setattr(Checkpoints, "_publish", slow)
    assert checkpoints.save(Shards(), 1) is None
    until = time.monotonic() + 10
    while not published(checkpoints.folder) and time.monotonic() < until:
        time.sleep(0.01)
    assert checkpoints.poll() is None
    go.set()
    assert checkpoints.settle().step == 1
