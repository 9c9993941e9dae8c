"""``coma-ds train``: the launcher's job, supervised, and the truth about its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coma_ds import entry, rank_report
from coma_ds.commands import train_command
from coma_ds.commands.main import run
from coma_ds.rank_report import RankReport
from tests.distributed.harness import free_port

JOB = """
import os, signal, sys, time
from coma_ds import rank_report
rank, how = int(os.environ["RANK"]), sys.argv[-1]
if how == "fine":
    rank_report.write_report(0, "")
elif how == "raise":
    if rank == 1:
        rank_report.write_report(1, "error on rank 1: RuntimeError: boom")
        sys.exit(1)
    time.sleep(60)
elif how == "kill" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
elif how == "launcher" and rank == 1:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
else:
    time.sleep(60)
"""


def launch_job(folder: Path, how: str) -> tuple[int, int, str]:
    """A job of two ranks under the real launcher: its return code, then the verdict."""
    (folder / "job.py").write_text(JOB)
    (folder / "reports").mkdir()
    call, environment, ranks = train_command.launch(2)
    call[-1] = str(folder / "job.py")
    environment |= {rank_report.FOLDER: str(folder / "reports")}
    returncode = train_command.supervise([*call, how], environment)
    reports = rank_report.read_reports(folder / "reports")
    return returncode, *train_command.verdict(returncode, reports, ranks)


def processes(word: str) -> int:
    """Processes whose command line has the word."""
    found = 0
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += word.encode() in file.read_bytes()
        except OSError:
            continue
    return found


class TestTrain:
    def test_a_wrong_config_starts_nothing(self, capsys, monkeypatch):
        monkeypatch.setattr(train_command, "launch", lambda _: pytest.fail("started"))
        assert run(["train", "--recipe", "demo-match", "optim.lrr=1"]) == 2
        assert run(["train", "--dry-run", "optim.stepss=1"]) == 2
        assert capsys.readouterr().err.count("error: override: unknown key") == 2

    def test_everything_is_passed_on(self, monkeypatch, capsys):
        calls = []

        def supervise(call, environment):
            calls.append(call)
            folder = Path(environment[rank_report.FOLDER])
            for rank in range(3):
                report = {"rank": rank, "world": 3, "code": 0, "message": "", "time": 1.0}
                (folder / f"{rank}.json").write_text(json.dumps(report))
            return 0

        monkeypatch.setattr(train_command, "supervise", supervise)
        words = ["--num", "3", "--recipe", "demo-match", "optim.lr=1e-4", "--dry-run"]
        assert run(["train", *words, "seed=3"]) == 0
        (call,) = calls
        script = call.index(str(Path(train_command.__file__).parents[1] / "train.py"))
        expected = ["--recipe", "demo-match", "--dry-run", "optim.lr=1e-4", "seed=3"]
        assert call[script + 1 :] == expected
        assert Path(call[script]).is_file()
        assert call[call.index("--num_accelerators") + 1] == "3"
        assert capsys.readouterr().err == ""

    def test_the_numbers_of_ranks(self, monkeypatch):
        with pytest.raises(ValueError, match=r"^--num 0: expected 1 or more$"):
            train_command.launch(0)
        assert train_command.launch(None)[2] == 1  # no GPU: one rank
        monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with pytest.raises(ValueError, match=r"^--num 8, but this machine has 4 GPU\(s\)$"):
            train_command.launch(8)
        call, environment, ranks = train_command.launch(None)
        assert ranks == 4 and call[call.index("--num_gpus") + 1] == "4"
        assert environment.get("DS_ACCELERATOR") == os.environ.get("DS_ACCELERATOR")
        # the launcher ignores the user's choice of GPUs where a number is given
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2,7,1")
        call, environment, ranks = train_command.launch(2)
        assert environment["CUDA_VISIBLE_DEVICES"] == "5,2" and "--num_gpus" not in call

    @pytest.mark.parametrize(
        ("how", "launcher", "code", "said"),
        [
            ("fine", 0, 0, ""),
            ("raise", 1, 1, "error on rank 1: RuntimeError: boom"),
            ("kill", 247, 137, "a process of the job was ended by SIGKILL"),
            # the launcher's child dies by a signal, and the launcher says 0
            ("launcher", 0, 1, "the launcher was ended by a signal, though its exit code is 0"),
        ],
    )
    def test_the_end_of_a_job_is_told_honestly(self, tmp_path, how, launcher, code, said):
        returncode, told, message = launch_job(tmp_path, how)
        assert (returncode, told) == (launcher, code)
        assert said in message and bool(message) == bool(code)
        assert not processes(str(tmp_path / "job.py"))

    def test_the_last_word_is_the_error_of_the_rank(self, monkeypatch, capsys):
        report = RankReport(1, 2, 1, "error on rank 1: RuntimeError: boom", 1.0)
        monkeypatch.setattr(train_command, "supervise", lambda *_: 1)
        monkeypatch.setattr(rank_report, "read_reports", lambda _: [report])
        assert run(["train"]) == 1
        assert capsys.readouterr().err.endswith("\nerror on rank 1: RuntimeError: boom\n")

    def test_a_stopped_command_leaves_no_process(self, tmp_path):
        code = (
            "import sys; from pathlib import Path\n"
            "from tests.unit.test_launch import launch_job\n"
            f"print(launch_job(Path({str(tmp_path)!r}), 'wait'))\n"
        )
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        until = time.monotonic() + 60
        while processes(f"{tmp_path}/job.py") < 2 and time.monotonic() < until:
            time.sleep(0.2)
        time.sleep(1)
        child.send_signal(signal.SIGTERM)
        out, _ = child.communicate(timeout=60)
        assert "(-15, 143, 'stopped by SIGTERM')" in out
        assert not processes(f"{tmp_path}/job.py")

    @pytest.mark.parametrize(
        ("returncode", "ranks", "code", "said"),
        [
            (0, [0, 1], 0, ""),
            (0, [0], 1, "error: rank 1 ended without a word: the launcher was ended by a signal"),
            (0, [], 1, "error: ranks 0, 1 ended without a word"),
            (3, [0, 1], 3, "error: the launcher ended with code 3"),
            (
                245,
                [0],
                139,
                "rank 1 ended without a word: a process of the job was ended by SIGSEGV",
            ),
            (-9, [], 137, "ended by SIGKILL; as a rule the machine ran out of memory"),
            (-2, [0], 130, "stopped by SIGINT"),
        ],
    )
    def test_only_the_word_of_every_rank_is_success(self, returncode, ranks, code, said):
        reports = [RankReport(rank, 2, 0, "", 1.0) for rank in ranks]
        told, message = train_command.verdict(returncode, reports, 2)
        assert told == code and said in message and bool(message) == bool(said)

    def test_the_earliest_error_counts(self):
        reports = [RankReport(0, 3, 1, "later", 5.0), RankReport(2, 3, 2, "first", 4.0)]
        assert train_command.verdict(1, reports, 3) == (2, "first")

    def test_a_rank_reports_through_its_way_out(self, tmp_path):
        code = (
            "from coma_ds.entry import entry_point\n"
            "def main(argv): raise RuntimeError('boom')\n"
            "entry_point(main, [])\n"
        )
        told = {rank_report.FOLDER: str(tmp_path), "RANK": "0", "WORLD_SIZE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | told, capture_output=True, text=True
        )
        (report,) = rank_report.read_reports(tmp_path)
        assert done.returncode == report.code == 1
        assert report.message == "error on rank 0: RuntimeError: boom"
        assert done.stderr.endswith(f"{report.message}\n")


UNREAD = """
import multiprocessing, signal, time
from coma_ds.entry import entry_point

def work():
    time.sleep(600)

def main(argv):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # as below a batch script
    multiprocessing.get_context("fork").Process(target=work, daemon=True).start()
    print("a step", flush=True)

entry_point(main, [])
"""


def test_a_rank_that_nobody_reads_ends_and_says_how(tmp_path):
    """slurmstepd was killed, say: no output can be written, and a worker hears no TERM."""
    reader, writer = os.pipe()
    os.close(reader)
    told = {rank_report.FOLDER: str(tmp_path), "RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", UNREAD], env=os.environ | told, stdout=writer, stderr=writer,
        timeout=60,
    )  # fmt: skip
    os.close(writer)
    (report,) = rank_report.read_reports(tmp_path)
    assert done.returncode == report.code == 1
    assert report.message == "error on rank 0: BrokenPipeError: [Errno 32] Broken pipe"


def test_a_rank_that_waits_in_vain_says_that_another_one_hangs():
    said = "[../gloo/unbound_buffer.cc:83] Timed out waiting 1800000ms for recv to complete"
    assert entry.no_answer(RuntimeError(said)).startswith(
        "another rank gave no answer in time, so it or its node hangs (Timed out waiting 1800000ms"
    )
    assert not entry.no_answer(RuntimeError("CUDA error")) + entry.no_answer(OSError(said))


def test_a_worker_that_the_launcher_ended_had_enough_memory():
    told = "DataLoader worker (pid 7) is killed by signal: Terminated. "
    assert "memory" not in entry.killed_worker(RuntimeError(told))
    assert "memory was full" in entry.killed_worker(RuntimeError(told.replace("Termin", "K")))


FAILS = """
import sys
from coma_ds import rank_report
rank_report.write_report(2, "error: a wrong key")
sys.exit(2)
"""


def torchrun(folder: Path, port: int, script: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Two ranks under our torchrun, as ``slurm/node.sh`` starts it."""
    (folder / "job.py").write_text(script)
    (folder / "reports").mkdir()
    words = ["--nnodes", "1", "--node-rank", "0", "--nproc-per-node", "2"]
    words += ["--master-addr", "127.0.0.1", "--master-port", str(port), str(folder / "job.py")]
    told = {rank_report.FOLDER: str(folder / "reports"), "MASTER_PORT": str(port)} | more
    return subprocess.run(
        [sys.executable, "-m", "coma_ds.torchrun", *words],
        env=os.environ | told, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("inside", [True, False])
def test_torchruns_port_in_use_is_a_sentence(tmp_path, inside):
    more = {"COMA_DS_CONTROL": str(tmp_path)} if inside else {}
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = torchrun(tmp_path, port, FAILS, **more)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (report,) = rank_report.read_reports(tmp_path / "reports")
    said = f"error: port {port} is in use on this machine, maybe by another run: give the "
    said += "job another one (COMA_MASTER_PORT)" if inside else "launcher another one"
    assert report.code == 2 and report.message.startswith(said) and said in done.stderr


def test_torchrun_leaves_the_word_to_the_rank_that_failed(tmp_path):
    done = torchrun(tmp_path, free_port(), FAILS)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert {r.message for r in rank_report.read_reports(tmp_path / "reports")} == {
        "error: a wrong key"
    }
