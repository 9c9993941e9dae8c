"""Who asks a run to stop, and who owns its folder."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from coma_ds import ownership
from coma_ds.config import load_config
from coma_ds.ownership import Incarnation, owns, read_owner, take, takes_over, this_start
from coma_ds.run_folder import claim
from coma_ds.stopping import Request, Requests, Stopped, check_not_held

CPU = torch.device("cpu")


@pytest.fixture
def signals():
    before = {n: signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def job(tmp_path, monkeypatch):
    folder = tmp_path / "job"
    folder.mkdir()
    monkeypatch.setenv("COMA_DS_CONTROL", str(folder))
    return folder


class TestRequests:
    def test_nothing_is_asked(self, tmp_path):
        assert Requests(tmp_path, lambda: True).agree(CPU) is Request.NOTHING

    def test_files_of_people(self, tmp_path):
        requests, switches = Requests(tmp_path, lambda: True), tmp_path / "control"
        switches.mkdir()
        (switches / "save").touch()
        assert requests.agree(CPU) is Request.SAVE
        assert requests.agree(CPU) is Request.NOTHING  # once
        (switches / "save").touch()
        (switches / "stop").touch()
        assert requests.agree(CPU) is Request.HOLD
        with pytest.raises(ValueError, match=r"control/stop holds this run: remove the file"):
            check_not_held(tmp_path)
        (switches / "stop").unlink()
        check_not_held(tmp_path)

    def test_a_switch_that_is_a_folder(self, tmp_path, caplog):
        requests, switch = Requests(tmp_path, lambda: True), tmp_path / "control" / "save"
        switch.mkdir(parents=True)
        assert requests.agree(CPU) is Request.SAVE and not switch.exists()
        (switch / "full").mkdir(parents=True)
        assert requests.agree(CPU) is Request.SAVE and "control/save cannot be re" in caplog.text
        assert requests.agree(CPU) is Request.NOTHING

    def test_the_file_of_the_job(self, tmp_path, job):
        requests = Requests(tmp_path, lambda: True)
        assert requests.agree(CPU) is Request.NOTHING
        (job / "stop").touch()
        assert requests.agree(CPU) is Request.STOP
        assert (job / "stop").exists()  # the job script removes it
        requests.announce(16, gained=False)
        assert not (job / "gained").exists()  # where the start went on from
        requests.announce(17)
        assert (job / "published").read_text() == "17\n"
        assert (job / "gained").read_text() == "0\n"

    def test_a_job_folder_on_a_full_disk(self, tmp_path, job, monkeypatch, caplog):
        """It costs what the job would have been told, not the checkpoint."""

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("coma_ds.stopping.write_atomically", full)
        Requests(tmp_path, lambda: True).announce(3)
        assert "the job is not told of step 3: [Errno 28] No space left" in caplog.text

    def test_a_job_folder_that_is_gone(self, tmp_path, job):
        job.rmdir()
        requests = Requests(tmp_path, lambda: True)
        requests.announce(3)
        assert requests.agree(CPU) is Request.NOTHING

    @pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
    def test_signals(self, tmp_path, signals, number):
        requests = Requests(tmp_path, lambda: True)
        requests.take_signals()
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert requests.agree(CPU) is Request.STOP
        again = signal.getsignal(signal.SIGTERM)
        assert (again == signal.SIG_DFL) == (number == signal.SIGTERM)

    def test_a_run_that_is_to_end_at_sigterm(self, tmp_path, signals):
        """Without checkpoints: only the signal that is meant for it asks it to save."""
        before = signal.getsignal(signal.SIGTERM)
        requests = Requests(tmp_path, lambda: True)
        requests.take_signals(terminate=False)
        assert signal.getsignal(signal.SIGTERM) == before
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
        assert requests.agree(CPU) is Request.STOP

    def test_a_folder_that_is_lost_counts_most(self, tmp_path):
        (tmp_path / "control").mkdir()
        (tmp_path / "control" / "stop").touch()
        assert Requests(tmp_path, lambda: False).agree(CPU) is Request.YIELD

    def test_the_hard_timer(self, tmp_path, monkeypatch, job):
        ended = []
        monkeypatch.setattr("coma_ds.stopping.os._exit", ended.append)
        monkeypatch.setenv("COMA_DS_LEAD_SECONDS", "0.2")
        requests = Requests(tmp_path, lambda: True)
        requests.agree(CPU)
        time.sleep(0.3)
        assert not ended  # nobody asked
        (job / "stop").touch()
        requests.agree(CPU)
        assert not ended
        time.sleep(0.4)
        assert ended == [1]

    @pytest.mark.parametrize(
        ("lead", "limit"), [(300, 270.0), (600, 570.0), (40, 20.0), (60, 30.0)]
    )
    def test_when_the_hard_timer_ends_the_run(self, tmp_path, monkeypatch, job, lead, limit):
        """In time for the script's own, which comes 20 s before the end, and for the requeue."""
        started = []
        timer = SimpleNamespace(start=lambda: None)
        monkeypatch.setattr(
            "coma_ds.stopping.threading.Timer",
            lambda seconds, *_: started.append(seconds) or timer,
        )
        monkeypatch.setenv("COMA_DS_LEAD_SECONDS", str(lead))
        (job / "stop").touch()
        requests = Requests(tmp_path, lambda: True)
        for _ in range(2):
            requests.agree(CPU)
        assert started == [limit]

    def test_codes(self):
        codes = {request: Stopped(request, "x").code for request in list(Request)[2:]}
        assert codes == {Request.STOP: 85, Request.HOLD: 87, Request.YIELD: 86}


class TestOwnership:
    def test_the_newer_start_owns_the_folder(self, tmp_path):
        first = this_start(tmp_path)
        assert first.number == 1 and owns(tmp_path, first)
        take(tmp_path, first)
        second = this_start(tmp_path)
        assert second.number == 2 and owns(tmp_path, first)
        take(tmp_path, second)
        assert owns(tmp_path, second) and not owns(tmp_path, first)
        assert read_owner(tmp_path) == second

    def test_an_owner_that_cannot_be_read_is_none(self, tmp_path):
        for text in ("", "{", "[]", '{"number": 1}'):
            (tmp_path / ownership.OWNER).write_text(text)
            assert read_owner(tmp_path) is None
            assert owns(tmp_path, this_start(tmp_path))

    def test_who_takes_over(self):
        mine = Incarnation(2, "b", "n1", 7, job="41", restart=1)
        assert takes_over(mine, Incarnation(1, "a", "n2", 9, job="41", restart=0))
        assert not takes_over(mine, replace(mine, token="c"))  # the same start, twice
        assert not takes_over(mine, Incarnation(1, "a", "n2", 9, job="40"))
        assert not takes_over(mine, Incarnation(1, "a", "n2", 9))
        assert not takes_over(replace(mine, job=""), Incarnation(1, "a", "n2", 9))
        assert not takes_over(mine, None)

    def test_a_start_of_the_same_job_takes_a_locked_folder(self, tmp_path, monkeypatch, caplog):
        config = load_config("demo-match", [f"output={tmp_path}"])

        def locked(*_):
            raise BlockingIOError

        monkeypatch.setenv("SLURM_JOB_ID", "12")
        first = claim(config, keep=True)
        monkeypatch.setattr("coma_ds.run_folder.fcntl.flock", locked)
        with pytest.raises(
            ValueError, match=r"another process trains into this folder, start 1 \("
        ):
            claim(config, keep=True)
        assert owns(tmp_path, first)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        second = claim(config, keep=True)
        assert "is taken over from start 1" in caplog.text
        assert owns(tmp_path, second) and not owns(tmp_path, first)

    def test_a_job_that_began_here_is_known_at_its_next_starts(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        first = this_start(tmp_path)
        assert not first.began
        take(tmp_path, first)
        for restart, began in ((1, False), (2, True), (3, True), (4, True)):
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
            mine = this_start(tmp_path)
            assert mine.began == began, restart
            take(tmp_path, replace(mine, began=began or restart == 1))
        monkeypatch.setenv("SLURM_JOB_ID", "13")
        assert not this_start(tmp_path).began  # another job, which may start over

    def test_a_held_run_does_not_start(self, tmp_path):
        (tmp_path / "control").mkdir()
        (tmp_path / "control" / "stop").touch()
        with pytest.raises(ValueError, match="holds this run"):
            claim(load_config("demo-match", [f"output={tmp_path}"]), keep=True)
        assert read_owner(tmp_path) is None
