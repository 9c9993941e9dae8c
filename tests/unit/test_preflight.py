"""Preflight: each check finds what it is for, and names the node."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from coma_ds.commands import preflight_command as preflight
from coma_ds.commands.main import run
from coma_ds.commands.preflight_command import Facts, Place
from coma_ds.config import dump, load_config
from tests.distributed.harness import free_port
from tests.folders import mmeb_folder

SAME = Facts("node1", "abc", "d1", {"python": "3.11", "torch": "2.13"})


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """The first of two nodes."""
    names = ("node1", "node2")
    return Place(0, names, tmp_path, 1, 0, "127.0.0.1", 0, seconds=3.0, free_gib=0.0)


def answers(place: Place, facts: Facts | None = None, delay: float = 0.3) -> threading.Thread:
    """The other node leaves its file a moment later."""
    other = replace(place, number=1)
    facts = facts or replace(SAME, node="node2")

    def leave() -> None:
        time.sleep(delay)
        preflight.leave(place.control / "preflight" / "0", other, facts)

    thread = threading.Thread(target=leave)
    thread.start()
    return thread


def gathered(place: Place, limit: float) -> list[Facts]:
    folder = place.control / "preflight" / "0"
    preflight.leave(folder, place, SAME)
    return preflight.gather(folder, place, SAME, time.monotonic() + limit)


def test_the_place_is_read_from_the_job(tmp_path):
    environment = {
        "COMA_NODE_NAMES": "a b c", "SLURM_NODEID": "2", "SLURM_RESTART_COUNT": "4",
        "COMA_DS_CONTROL": "/shared/x", "COMA_RANKS_PER_NODE": "8", "MASTER_ADDR": "a",
        "MASTER_PORT": "12345", "COMA_PREFLIGHT_SECONDS": "20", "COMA_MIN_FREE_GIB": "0.5",
    }  # fmt: skip
    place = preflight.read_place(environment, tmp_path)
    assert place == Place(2, ("a", "b", "c"), Path("/shared/x"), 8, 4, "a", 12345, 20.0, 0.5)
    assert place.name == "c"


def test_without_a_job_it_is_this_machine(tmp_path):
    place = preflight.read_place({"SLURM_NODEID": "3"}, tmp_path)
    assert place.number == 0 and len(place.names) == 1 and place.control == tmp_path


def test_all_nodes_come(place):
    thread = answers(place)
    assert [facts.node for facts in gathered(place, 5)] == ["node1", "node2"]
    thread.join()


def test_a_node_that_does_not_come_is_named(place):
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"^node2 did not come, or what is written there to .*"):
        gathered(place, 0.5)
    assert time.monotonic() - began < 2


def test_one_node_says_which_one_is_missing(place):
    """Of those that came the first one does."""
    place = replace(place, names=("node1", "node2", "node3"))
    folder = place.control / "preflight" / "0"
    preflight.leave(folder, place, SAME)
    second = replace(place, number=1)
    preflight.leave(folder, second, replace(SAME, node="node2"))
    found = preflight.gather(folder, second, SAME, time.monotonic())
    assert any(facts.problem for facts in found)
    with pytest.raises(ValueError, match=r"^node3 did not come"):
        preflight.gather(folder, place, SAME, time.monotonic())


def test_a_problem_of_another_node_ends_the_wait_at_once(place):
    thread = answers(place, replace(SAME, node="node2", problem="no disk"), delay=0.1)
    began = time.monotonic()
    place = replace(place, names=("node1", "node2", "node3"))
    assert any(facts.problem == "no disk" for facts in gathered(place, 30))
    assert time.monotonic() - began < 5
    thread.join()


def test_a_shared_folder_that_cannot_be_written(place):
    (place.control / "file").write_text("")
    bad = replace(place, control=place.control / "file")
    with pytest.raises(ValueError, match=r"the shared folder .*file cannot be written"):
        preflight.leave(bad.control / "preflight" / "0", bad, SAME)


@pytest.mark.parametrize(
    "other, words",
    [
        (replace(SAME, versions={"python": "3.11", "torch": "2.12"}), "n2 has torch 2.12, node1"),
        (replace(SAME, versions={"python": "3.12", "torch": "2.13"}), "n2 has python 3.12, node1"),
        (replace(SAME, commit="abd"), "n2 runs other code (commit abd, digest d1) than node1"),
        (replace(SAME, code="d2"), "n2 runs other code (commit abc, digest d2) than node1"),
    ],
)
def test_nodes_that_differ(other, words):
    with pytest.raises(ValueError) as error:
        preflight.compare([SAME, replace(SAME, node="n1"), replace(other, node="n2")])
    assert words in str(error.value)
    preflight.compare([SAME, replace(SAME, node="n1")])


def test_the_digest_is_of_the_code(tmp_path, monkeypatch):
    folder = tmp_path / "coma_ds" / "commands"
    folder.mkdir(parents=True)
    monkeypatch.setattr(preflight, "__file__", str(folder / "preflight_command.py"))
    (folder / "a.py").write_text("1")
    first = preflight.code_digest()
    assert first == preflight.code_digest()
    (folder / "a.py").write_text("2")
    second = preflight.code_digest()
    (folder / "a.py").rename(folder / "b.py")
    assert len({first, second, preflight.code_digest()}) == 3
    assert preflight.commit() == "-"  # no repository


def test_output_that_cannot_be_written_or_is_full(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output .*file/run cannot be written: it is no folder"):
        preflight.check_output(tmp_path / "file" / "run" / ".mark", 0)
    with pytest.raises(ValueError, match=r"GiB are free at .*run, 1e\+06 are needed"):
        preflight.check_output(tmp_path / "run" / ".mark", 1e6)
    assert preflight.check_output(tmp_path / "run" / ".mark", 0) > 0


def test_output_that_another_node_has_for_itself(tmp_path, place):
    (tmp_path / ".preflight-0-node1").write_text("")
    with pytest.raises(ValueError, match=r"what node2 wrote to .* is not seen here"):
        preflight.sees(tmp_path / ".preflight-0-node1", place, tmp_path)
    facts = Facts("node2", "", "", problem="runs other code")  # and has ended
    preflight.leave(tmp_path, replace(place, number=1), facts)
    assert not preflight.sees(tmp_path / ".preflight-0-node1", place, tmp_path)
    (tmp_path / ".preflight-0-node2").write_text("")
    assert preflight.sees(tmp_path / ".preflight-0-node1", place, tmp_path)


def test_fewer_gpus_than_ranks(place, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("COMA_NODE_NAMES", "node1 node2")
    with pytest.raises(ValueError, match=r"^2 GPU\(s\) found, 8 are asked for .*exclude=node1"):
        preflight.check_devices(replace(place, ranks=8))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert preflight.check_devices(replace(place, ranks=8)) == "cpu"


REDUCE = """
import sys, time
from pathlib import Path
from coma_ds.commands.preflight_command import Place, all_reduce
number, port = int(sys.argv[1]), int(sys.argv[2])
place = Place(number, ("node1", "node2"), Path("."), 1, 0, "127.0.0.1", port, 20.0, 0.0)
try:
    print(all_reduce(place, time.monotonic() + float(sys.argv[3])) > 0)
except ValueError as error:
    print(error)
"""


def reduce_on(numbers: list[int], limit: float) -> list[str]:
    port = str(free_port())
    nodes = [
        subprocess.Popen(
            [sys.executable, "-c", REDUCE, str(number), port, str(limit)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in numbers
    ]
    return [node.communicate(timeout=60)[0].strip() for node in nodes]


def test_an_all_reduce_of_two_nodes():
    assert reduce_on([0, 1], 20) == ["True", "True"]


def test_a_node_that_is_not_reached_is_named():
    (said,) = reduce_on([0], 3)
    assert said.startswith("node2 does not reach 127.0.0.1:")


@pytest.mark.parametrize("names", [("node1",), ("node1", "node2")])
def test_an_address_that_no_host_has(place, names):
    place = replace(place, names=names, address="no-such-host.invalid", port=free_port())
    with pytest.raises(ValueError, match=r"'no-such-host\.invalid' is no host .*COMA_MASTER_ADDR"):
        preflight.all_reduce(place, time.monotonic() + 3)


def test_an_address_of_another_host(place):
    """Of a documentation network: nobody answers there."""
    place = replace(place, names=("node1",), address="192.0.2.1", port=free_port())
    with pytest.raises(ValueError, match=r"^192\.0\.2\.1:\d+ is not to be had: "):
        preflight.all_reduce(place, time.monotonic() + 3)


def test_a_port_that_is_taken(place):
    import socket

    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"127.0.0.1:{port} is not to be had: .*PORT\)"):
            preflight.all_reduce(replace(place, port=port), time.monotonic() + 3)


def pairs(folder: Path) -> list[str]:
    """Overrides of a run on 10 pairs, one of which has no image."""
    rows = [json.dumps({"query": f"{n}", "target": f"{n}"}) for n in range(9)]
    rows.append(json.dumps({"query": "last", "target_image": "absent.png"}))
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    return [
        "data.format=pairs", f"data.path={folder}/pairs.jsonl", "data.sources=[]",
        f"data.image_root={folder}", f"output={folder}/run",
    ]  # fmt: skip


@pytest.fixture
def alone(monkeypatch):
    """This machine, with no job around."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("COMA_NODE_NAMES", "COMA_DS_CONTROL", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)


def test_an_image_that_is_missing(tmp_path, capsys, alone):
    words = ["preflight", "--recipe", "demo-control", *pairs(tmp_path)]
    assert run(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "absent.png" in said and said.count("\n") == 1
    assert not list((tmp_path / "run").glob(".preflight-*"))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("init_from=/no/such", "init_from '/no/such': no such folder"),
        ("model.path=/no/such", "model.path '/no/such': no such folder"),
        ("checkpoint.resume=/no/such", "checkpoint.resume '/no/such' is no checkpoint"),
    ],
)
def test_a_model_or_checkpoint_that_is_not_here(tmp_path, monkeypatch, word, said):
    recipe = "demo-match" if "init_from" in word else "demo-compress"
    config = load_config(recipe, [f"output={tmp_path}/run", word])
    with pytest.raises(ValueError, match=f"^{said}"):
        preflight.check_data(config)
    if "resume" in word:  # a later start goes on from what the job has published
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        preflight.check_data(config)


def test_an_image_that_may_be_missing(tmp_path):
    config = load_config("demo-control", [*pairs(tmp_path), "data.bad_rows=0.2"])
    preflight.check_data(config)


def test_a_machine_that_is_fit(tmp_path, capsys, monkeypatch, alone):
    monkeypatch.setenv("COMA_DS_CONTROL", str(tmp_path / "job"))
    assert run(["preflight", "--recipe", "demo-compress", f"output={tmp_path}/run"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("preflight: 1 node(s), 1 rank(s) each on cpu") and said.count("\n") == 1
    mechanics = json.loads((tmp_path / "job" / "ds_config.json").read_text())
    assert mechanics["zero_optimization"]["stage"] == 3
    assert "torch 2." in (tmp_path / "job" / "versions.txt").read_text()
    assert (
        asdict(SAME).keys()
        == json.loads((tmp_path / "job" / "preflight" / "0" / "0.json").read_text()).keys()
    )


@pytest.mark.parametrize("number, count", [("0", 1), ("1", 0)])
def test_a_wrong_config_is_said_by_one_node(capsys, monkeypatch, alone, number, count):
    monkeypatch.setenv("COMA_NODE_NAMES", "node1 node2")
    monkeypatch.setenv("SLURM_NODEID", number)
    words = ["--recipe", "demo-match", "eval.at_end=false", "eval.every=0", "eval.sets=[i2i/seen]"]
    assert run(["preflight", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("error: override eval.sets has no effect with") == count
    assert said.count("\n") == count


def test_a_run_that_is_to_be_evaluated(tmp_path, capsys, alone):
    assert run(["preflight", "--evaluate", str(tmp_path)]) == 2
    assert "is no run: there is no config.yaml in it" in capsys.readouterr().err
    assert run(["preflight", "--evaluate", str(tmp_path), "--batch-size", "many"]) == 2
    assert "argument --batch-size: invalid int value" in capsys.readouterr().err
    assert run(["preflight", "--evaluate"]) == 2
    assert "evaluate: the following arguments are required: RUN" in capsys.readouterr().err


def test_a_machine_without_a_gpu_and_a_job(tmp_path, capsys, monkeypatch, alone):
    monkeypatch.delenv("DS_ACCELERATOR")
    assert run(["preflight", "--recipe", "demo-compress", f"output={tmp_path}/run"]) == 0
    assert "1 rank(s) each on cpu" in capsys.readouterr().err
    monkeypatch.setenv("COMA_NODE_NAMES", "vm")
    assert run(["preflight", "--recipe", "demo-compress", f"output={tmp_path}/run"]) == 2
    assert "0 GPU(s) found, 1 are asked for" in capsys.readouterr().err


def test_a_set_that_is_not_there(tmp_path, capsys, alone):
    words = [f"output={tmp_path}/run", "eval.sets=[none]"]
    assert run(["preflight", "--recipe", "demo-control", *words]) == 2
    assert "eval.sets: 'none' is not in the built-in data" in capsys.readouterr().err


@pytest.fixture
def finished(tmp_path) -> Path:
    """A run on pairs whose images are gone by now."""
    config = load_config("demo-control", [*pairs(tmp_path), "init_from=null"])
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(config))
    (folder / "model" / "config.json").write_text("{}")
    return folder


def test_an_evaluation_needs_its_own_data_and_no_other(tmp_path, capsys, alone, finished):
    """Not the images of the training; those of the sets, and a place for the results."""
    root = tmp_path / "sets"
    mmeb_folder(root)
    words = ["preflight", "--evaluate", str(finished), "--root", str(root)]
    assert run(words) == 0, capsys.readouterr().err
    capsys.readouterr()
    (root / "images" / "3.png").unlink()
    assert run(words) == 2 and "3.png" in capsys.readouterr().err
    assert run([*words, "--output", f"{tmp_path}/none/x.json"]) == 2
    assert "--output names a file" in capsys.readouterr().err
    assert not list(tmp_path.rglob(".preflight-*"))


def test_an_output_that_is_no_folder_is_one_sentence(tmp_path, capsys, alone):
    (tmp_path / "file").write_text("")
    assert run(["preflight", "--recipe", "demo-compress", f"output={tmp_path}/file"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "cannot be written: it is no folder" in said
    assert said.count("\n") == 1


def test_new_files_of_the_code_count_as_a_change(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True)

    folder = tmp_path / "coma_ds" / "commands"
    folder.mkdir(parents=True)
    (folder / "preflight_command.py").write_text("")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    monkeypatch.setattr(preflight, "__file__", str(folder / "preflight_command.py"))
    (tmp_path / "notes.txt").write_text("of no matter")
    clean = preflight.commit()
    assert len(clean) == 12
    (tmp_path / "coma_ds" / "new.py").write_text("")
    assert preflight.commit() == f"{clean}+"
    (tmp_path / "coma_ds" / "new.py").unlink()
    (folder / "preflight_command.py").write_text("changed")
    assert preflight.commit() == f"{clean}+"
