"""What the reports of the ranks make together."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from coma_ds import rank_report
from coma_ds.rank_report import RankReport, outcome

NODES = ("node1", "node1", "node2", "node2")


def reports(*codes: int | None, messages: dict[int, str] | None = None) -> list[RankReport]:
    """One a rank, in time the last rank first; None: no report."""
    said = messages or {}
    return [
        RankReport(rank, len(codes), code, said.get(rank, ""), 100.0 - rank)
        for rank, code in enumerate(codes)
        if code is not None
    ]


@pytest.mark.parametrize(
    "codes, code",
    [
        ((0, 0, 0, 0), 0), ((85, 85, 85, 85), 85), ((85, 0, 85, 85), 85), ((86, 85, 85, 86), 86),
        ((87, 87, 87, 87), 87), ((2, 1, 1, 1), 1), ((2, None, None, None), 2),
        ((85, 85, 1, 85), 1), ((85, 85, None, 85), 1), ((None,) * 4, 1),
    ],
)  # fmt: skip
def test_codes(codes, code):
    assert outcome(reports(*codes), range(4))[0] == code


def test_the_first_fault_is_told():
    found = reports(1, 0, 1, 0, messages={0: "error: echo", 2: "error: cause"})
    assert outcome(found, range(4)) == (1, "error: cause")


def test_a_fault_without_words():
    assert outcome(reports(0, 3), range(2)) == (3, "error: rank 1 ended with 3")


def test_silent_ranks_are_named_with_their_nodes():
    words = "ended without a word: killed from outside, or see the lines above"
    found = reports(0, None, None, None)
    all_of_them = f"error: rank 1 on node1, rank 2 on node2, rank 3 on node2 {words}"
    assert outcome(found, range(4), NODES) == (1, all_of_them)
    assert outcome(found, range(4), NODES, "node1") == (1, f"error: rank 1 on node1 {words}")
    nobody = f"error: rank 0, rank 1, rank 2, rank 3 and 4 more {words}"
    assert outcome([], range(8)) == (1, nobody)


def test_a_rank_that_hangs_is_named_by_what_it_did_not_say():
    waited = "error on rank 0: another rank gave no answer in time, so it or its node hangs"
    found = reports(1, None, None, None, messages={0: waited})
    code, said = outcome(found, range(4), NODES)
    named = "rank 1 on node1, rank 2 on node2, rank 3 on node2"
    assert (code, said) == (1, f"{waited}; ended without a word: {named}")
    found = reports(1, None, messages={0: "error: another fault"})
    assert outcome(found, range(2)) == (1, "error: another fault")


def test_the_ranks_of_one_node(tmp_path, monkeypatch):
    """As slurm/node.sh asks, and as the batch script does."""
    monkeypatch.setenv(rank_report.FOLDER, str(tmp_path))
    for rank in (0, 1, 2):
        monkeypatch.setenv("RANK", str(rank))
        assert rank_report.write_report(85, "stopped" if rank == 0 else "")
    program = [sys.executable, "-m", "coma_ds.rank_report", str(tmp_path)]

    def ask(*words: str) -> tuple[int, str]:
        done = subprocess.run([*program, *words], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout

    assert ask("0", "2") == (85, "stopped\n")
    assert ask("2", "2")[0] == 1
    (tmp_path / "failed").write_text("node2 ended with 1, its launcher with 1\nnode1 ended\n")
    code, said = ask("0", "4", "2", "node1", "node2")
    assert code == 1 and said.startswith("error: rank 3 on node2 ended without a word")
    (tmp_path / "failed").write_text("")  # all that a full disk took
    assert ask("0", "4", "2", "node1", "node2")[0] == 1


def test_without_a_folder_nothing_is_reported(tmp_path, monkeypatch):
    monkeypatch.delenv(rank_report.FOLDER, raising=False)
    assert not rank_report.write_report(85, "")
    monkeypatch.setenv(rank_report.FOLDER, str(tmp_path / "absent"))
    assert not rank_report.write_report(85, "")


class TestAFullDisk:
    """What was reserved at the start has room for the end."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv(rank_report.FOLDER, str(tmp_path))
        return tmp_path

    def test_the_end_is_written_in_its_place(self, folder):
        rank_report.reserve()
        (partial,) = folder.iterdir()
        place, size = partial.stat().st_ino, partial.stat().st_size
        assert size == rank_report.RESERVED and rank_report.read_reports(folder) == []
        assert rank_report.write_report(85, "stopped")
        (whole,) = folder.iterdir()
        assert (whole.stat().st_ino, whole.stat().st_size) == (place, size)
        (report,) = rank_report.read_reports(folder)
        assert (report.code, report.message) == (85, "stopped")

    def test_a_long_message_loses_its_end(self, folder, monkeypatch):
        rank_report.reserve()
        write = io.TextIOWrapper.write

        def no_more_than_reserved(file, text):
            if len(text) > rank_report.RESERVED:
                raise OSError(28, "No space left on device")
            return write(file, text)

        opened = Path.open
        monkeypatch.setattr(Path, "open", lambda path, *mode: Narrow(opened(path, *mode)))

        class Narrow:
            def __init__(self, file) -> None:
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *error) -> None:
                self.file.close()

            def write(self, text: str) -> None:
                no_more_than_reserved(self.file, text)

            def truncate(self) -> None:
                self.file.truncate()

        assert rank_report.write_report(2, "x" * 9000)
        monkeypatch.undo()
        (report,) = rank_report.read_reports(folder)
        assert report.code == 2 and report.message == "x" * (rank_report.RESERVED // 8)

    def test_without_any_room(self, folder, monkeypatch, capsys):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "open", full)
        rank_report.reserve()
        assert rank_report.write_report(0, "") is False
        said = capsys.readouterr().err
        assert said == (
            f"{folder}: this rank's end cannot be written ([Errno 28] No space left on device)\n"
        )
