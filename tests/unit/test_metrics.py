"""metrics.jsonl and TensorBoard: what is written, and what a resumed run drops."""

from __future__ import annotations

import json
import math
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coma_ds import run as run_module
from coma_ds.config import GuardConfig, RunConfig
from coma_ds.data.replacements import Replacements
from coma_ds.guard import Guard
from coma_ds.manifest import Manifest, write_manifest
from coma_ds.metrics import Monitor, flatten


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def written(folder) -> EventAccumulator:
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    return board


def monitor(folder, **options) -> Monitor:
    return Monitor(folder, active=True, **options)


def test_every_step_is_a_line_and_a_point(tmp_path) -> None:
    watch = monitor(tmp_path)
    watch.scalars(1, {"loss": 2.5, "grad_norm": None})
    watch.scalars(2, {"loss": 1.5, "lr": 1e-4})
    watch.scalars(2, {"All": 0.25}, group="eval")
    watch.close()
    found = lines(tmp_path)
    assert [(line["step"], line["group"]) for line in found] == [
        (1, "train"),
        (2, "train"),
        (2, "eval"),
    ]
    assert found[0]["loss"] == 2.5 and "grad_norm" not in found[0]
    assert found[1]["lr"] == 1e-4 and found[2]["All"] == 0.25
    assert found[0]["time"] <= found[1]["time"]
    board = written(tmp_path)
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/lr", "eval/All"}
    assert [(p.step, p.value) for p in board.Scalars("train/loss")] == [(1, 2.5), (2, 1.5)]


def test_the_end_of_a_run_that_is_taken_again_stands_once(tmp_path) -> None:
    """Its steps stay, in both; what was evaluated after the last one is written anew."""
    points = np.eye(3, dtype=np.float32), ["a", "b", "c"], np.ones((3, 3, 8, 8), np.float32)
    for start in range(3):
        watch = monitor(tmp_path, resume_step=3 * bool(start), ended=bool(start))
        if not start:
            for step in (1, 2):
                watch.scalars(step, {"loss": 2.5 / step, "memory_mib": 7.0})
                watch.scalars(step, {"saving_seconds": 0.5}, group="checkpoint")
            watch.scalars(1, {"All": 0.25}, group="eval", tags={"All": "val/All"})
        watch.scalars(2, {"All": 0.5 + start}, group="eval", tags={"All": "val/All"})
        watch.image("a", np.full((8, 8, 3), start, np.uint8), 2)
        watch.projector("tokens", *points, 2)
        watch.close()
    kept = [(line["step"], line["group"]) for line in lines(tmp_path)]
    assert sorted(kept) == [
        (step, group) for step in (1, 2) for group in ("checkpoint", "eval", "train")
    ]
    board = written(tmp_path)
    assert [(p.step, p.value) for p in board.Scalars("train/loss")] == [(1, 2.5), (2, 1.25)]
    assert [p.step for p in board.Scalars("train speed/memory_mib")] == [1, 2]
    assert [p.step for p in board.Scalars("checkpoint/saving_seconds")] == [1, 2]
    assert [(p.step, p.value) for p in board.Scalars("val/All")] == [(1, 0.25), (2, 2.5)]
    assert [image.step for image in board.Images("a")] == [2]


def fail(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_full_disk_costs_what_could_not_be_written(tmp_path, monkeypatch, caplog) -> None:
    """The writer of TensorBoard, which does not survive it, gets nothing; it is said twice."""
    watch = monitor(tmp_path)
    watch.scalars(1, {"loss": 2.5})
    real = shutil.disk_usage
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=2**20 - 1))
        full.setattr(watch._board, "add_scalar", fail)
        for step in (2, 3):
            watch.scalars(step, {"loss": 2.0})
        watch.text("config", "x", 3)
        watch.image("a", np.zeros((8, 8, 3), np.uint8), 3)
        watch.projector("a", np.eye(2, dtype=np.float32), ["a", "b"], np.ones((2, 3, 8, 8)), 3)
        watch.hparams({"a": 1}, ["train/loss"])
    for step in (4, 5):
        watch.scalars(step, {"loss": 1.5})
    watch.close()
    assert caplog.messages == [
        "from step 2 on tensorboard/ is not written: No space left on device",
        "from step 4 on tensorboard/ is written again; missing are 8 writes",
    ]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]  # there was so much room
    assert [p.step for p in written(tmp_path).Scalars("train/loss")] == [1, 4, 5]
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 1


def test_a_writer_that_died_is_replaced_after_a_while(tmp_path, monkeypatch, caplog) -> None:
    watch = monitor(tmp_path)
    with monkeypatch.context() as dead:
        dead.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fail)
        watch.scalars(1, {"loss": 2.5})
    watch.scalars(2, {"loss": 2.0})  # too early
    monkeypatch.setattr("coma_ds.metrics.RETRY", 0.0)
    watch.scalars(3, {"loss": 1.5})
    watch.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert [p.step for p in written(tmp_path).Scalars("train/loss")] == [3]
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 2
    assert caplog.messages == [
        "from step 1 on tensorboard/ is not written: [Errno 28] No space left on device",
        "from step 3 on tensorboard/ is written again; missing are 2 writes",
    ]


def test_what_is_missing_at_the_end_is_said(tmp_path, monkeypatch, caplog) -> None:
    watch = monitor(tmp_path)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", fail)
    watch.scalars(1, {"loss": 2.5})
    watch.close()
    assert caplog.messages[-1] == "tensorboard/ is not whole; missing are 1 writes"


def test_a_line_is_there_before_the_run_ends(tmp_path) -> None:
    watch = monitor(tmp_path, tensorboard=False)
    watch.scalars(1, {"loss": 2.5})
    assert lines(tmp_path)[0]["loss"] == 2.5
    watch.close()


@pytest.mark.parametrize(
    ("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")]
)
def test_a_value_that_is_not_finite_is_text_and_the_line_stays_json(value, text, tmp_path) -> None:
    watch = monitor(tmp_path)
    watch.scalars(1, {"loss": value, "lr": 0.5})
    watch.close()

    def strict(_):
        raise AssertionError("not JSON")

    raw = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(raw, parse_constant=strict)
    assert line["loss"] == text and line["lr"] == 0.5
    point = written(tmp_path).Scalars("train/loss")[0].value
    assert math.isnan(point) if math.isnan(value) else point == value


def test_a_resumed_run_writes_its_steps_anew(tmp_path) -> None:
    first = monitor(tmp_path)
    for step in range(1, 6):
        first.scalars(step, {"loss": float(step)})
    first.scalars(5, {"All": 0.1}, group="eval")
    first.close()
    second = monitor(tmp_path, resume_step=4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    for step in range(4, 7):
        second.scalars(step, {"loss": 10.0 * step})
    second.close()
    assert [line["loss"] for line in lines(tmp_path)] == [1.0, 2.0, 3.0, 40.0, 50.0, 60.0]
    board = written(tmp_path)
    found = [(p.step, p.value) for p in board.Scalars("train/loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]
    assert "eval/All" not in board.Tags()["scalars"] or not board.Scalars("eval/All")


@pytest.mark.parametrize("behind", [0, 3600])
def test_a_clock_that_is_behind_at_a_restart(tmp_path, monkeypatch, behind) -> None:
    """TensorBoard reads files by their names, which the time makes: the newer one comes last."""
    first = monitor(tmp_path)
    for step in range(1, 5):
        first.scalars(step, {"loss": 1.0})
    first.close()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - behind)
    for start in range(2):
        again = monitor(tmp_path, resume_step=3 + start)
        for step in range(3 + start, 7):
            again.scalars(step, {"loss": 2.0 + start})
        again.close()
    points = [(p.step, p.value) for p in written(tmp_path).Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0), (5, 3.0), (6, 3.0)]


def test_a_folder_that_is_gone_ends_nothing(tmp_path, caplog) -> None:
    watch = monitor(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    watch.scalars(1, {"loss": 1.0})
    watch.close()
    assert "from step 1 on tensorboard/ is not written" in caplog.text


def test_a_new_run_keeps_nothing_of_an_old_one(tmp_path) -> None:
    first = monitor(tmp_path)
    first.scalars(3, {"loss": 1.0})
    first.close()
    second = monitor(tmp_path)
    assert lines(tmp_path) == []
    second.close()


def test_a_line_that_was_cut_off_is_dropped(tmp_path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"loss": 3.0}\n[1]\n7\n{"step": 2, "lo')
    watch = monitor(tmp_path, tensorboard=False, resume_step=9)
    watch.scalars(9, {"loss": 1.0})
    watch.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 9]
    assert not list(tmp_path.glob("*.tmp"))


def test_the_step_of_a_checkpoint_is_kept(tmp_path, monkeypatch) -> None:
    """A run that resumes after step 4 has the lines of step 4, and of its evaluation."""
    first = monitor(tmp_path, tensorboard=False)
    for step in range(1, 7):
        first.scalars(step, {"loss": float(step)})
    first.scalars(4, {"All": 0.1}, group="eval")
    first.close()
    checkpoint = tmp_path / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    remembered = {"guard": Guard(GuardConfig(), None), "replaced_rows": Replacements(0.0)}
    state = {"seconds": 12.5} | {name: part.state() for name, part in remembered.items()}
    (checkpoint / "run.json").write_text(json.dumps(state))
    write_manifest(checkpoint, Manifest(step=4, world=1, stage=3, files={}))
    monkeypatch.setattr(run_module, "log_to_stderr", lambda main: None)
    monkeypatch.setattr(run_module, "load_checkpoint", lambda *_: 4)
    config = RunConfig.model_validate({"output": str(tmp_path), "logging": {"tensorboard": False}})
    run = run_module.Run(config)
    assert run.resume(SimpleNamespace(ds_config={})) == 4 and run.seconds == 12.5
    run.monitor.close()
    found = [(line["step"], line["group"]) for line in lines(tmp_path)]
    assert found == [(1, "train"), (2, "train"), (3, "train"), (4, "train"), (4, "eval")]


def test_a_value_is_written_once_a_step(tmp_path) -> None:
    """Where the best is looked for at the last step, and all is evaluated again in the end."""
    watch = monitor(tmp_path)
    watch.scalars(7, {"i2i": 0.25, "seconds": 3.0}, group="eval")
    watch.scalars(7, {"saving_seconds": 0.1}, group="checkpoint")
    watch.scalars(7, {"i2i": 0.25, "t2i": 0.5, "seconds": 4.0}, group="eval")
    watch.scalars(7, {"i2i": 0.25}, group="eval")
    watch.scalars(8, {"i2i": 0.75}, group="eval")
    watch.close()
    evaluated = [line for line in lines(tmp_path) if line["group"] == "eval"]
    assert [(line["step"], line.get("i2i"), line.get("t2i")) for line in evaluated] == [
        (7, 0.25, None),
        (7, None, 0.5),
        (8, 0.75, None),
    ]
    board = written(tmp_path)
    assert [event.step for event in board.Scalars("eval/i2i")] == [7, 8]
    assert [event.value for event in board.Scalars("eval/t2i")] == [0.5]


def test_a_full_disk_is_told_once_and_ends_nothing(tmp_path, caplog) -> None:
    watch = monitor(tmp_path, tensorboard=False)
    watch._file = open("/dev/full", "w")
    for step in (1, 2):
        watch.scalars(step, {"loss": 1.0})
    told = [line for line in caplog.messages if "is not written" in line]
    why = "[Errno 28] No space left on device"
    assert told == [f"from step 1 on metrics.jsonl is not written: {why}"]


def test_another_rank_writes_nothing(tmp_path) -> None:
    folder = tmp_path / "run"
    watch = Monitor(folder, active=False)
    watch.scalars(1, {"loss": 1.0})
    watch.text("a", "b")
    watch.table("a", ["x"], [[1]], 0)
    watch.image("a", np.zeros((2, 2, 3), dtype=np.uint8), 0)
    watch.projector("a", np.zeros((2, 2)), ["a", "b"], np.zeros((2, 3, 2, 2)), 0)
    watch.hparams({"a": 1}, {"b": 1.0})
    watch.close()
    assert not folder.exists()


def test_text_tables_pictures_and_the_projector(tmp_path) -> None:
    watch = monitor(tmp_path)
    watch.table("results", ["set", "p@1"], [["a", 0.5], ["b", 0.25]], 3)
    watch.image("queries", np.full((4, 6, 3), 200, dtype=np.uint8), 3)
    thumbs = np.random.default_rng(0).random((5, 3, 8, 8)).astype(np.float32)
    watch.projector("pool", np.eye(5, 4, dtype=np.float32), list("abcde"), thumbs, 3)
    watch.hparams({"optim.lr": 1e-4, "data.sources": ["a"], "on": True}, {"result/All": 0.5})
    watch.close()
    board = written(tmp_path)
    tensor = board.Tensors("results/text_summary")[0]
    assert tensor.step == 3
    wanted = "| set | p@1 |\n| --- | --- |\n| a | 0.5 |\n| b | 0.25 |"
    assert tensor.tensor_proto.string_val[0].decode() == wanted
    picture = board.Images("queries")[0]
    assert (picture.step, picture.height, picture.width) == (3, 4, 6)
    projector = next((tmp_path / "tensorboard").rglob("projector_config.pbtxt"))
    assert "sprite" in projector.read_text()
    vectors = next((tmp_path / "tensorboard").rglob("tensors.tsv")).read_text().splitlines()
    assert len(vectors) == 5


def test_flatten() -> None:
    tree = {"a": 1, "b": {"c": 2, "d": {"e": [3]}}, "f": {}}
    assert flatten(tree) == {"a": 1, "b.c": 2, "b.d.e": [3]}
