"""Every key of the config reaches what it is for, while a run runs: its loop, figures, rates."""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from coma_ds import assemble, train
from coma_ds.config import dump, load_config
from coma_ds.data.collate import Collator
from coma_ds.data.records import Pair, Side
from coma_ds.engine import StepResult
from coma_ds.objectives.match import Match
from coma_ds.run import Run
from coma_ds.step import Budget, grad_cache
from coma_ds.stopping import Request, Stopped
from tests.distributed.exact import whole_parameters
from tests.distributed.harness import run_world
from tests.folders import base_folder
from tests.tiny import make_batch

CPU = torch.device("cpu")


def config_of(*overrides: str):
    return load_config(None, list(overrides))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(base_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture
def quiet(monkeypatch):
    """The log stays with pytest."""
    monkeypatch.setattr("coma_ds.run.log_to_stderr", lambda main: None)
    monkeypatch.setattr("coma_ds.run.export_run", lambda *_: None)


class Still:
    """An engine whose steps do nothing."""

    device, stage, ds_config = CPU, 0, {}
    model = SimpleNamespace(backbone=SimpleNamespace(carrier="packed"))

    def train(self) -> None: ...

    def eval(self) -> None: ...

    def step(self, step: int) -> StepResult:
        return StepResult(applied=True, grad_norm=4.0, lr=0.25)


def slowly(seconds, call):
    def slow(*args, **kwargs):
        time.sleep(seconds)
        return call(*args, **kwargs)

    return slow


@pytest.mark.parametrize("objective", ["compress", "match"])
def test_loop(monkeypatch, tmp_path, quiet, folder, objective):
    """What ``train.main`` hands to a step, when it evaluates and saves, what it measures."""
    steps, logged, done = [], [], []

    def step_of(name):
        def take(engine, objective, batch, chunk, *, seed, step):
            steps.append(
                (name, type(objective).__name__, len(batch), batch.pairs, chunk, seed, step)
            )
            return {"loss": 1.0}

        return slowly(0.1, take)

    def note(name):
        return lambda run, *rest, **_: done.append((name, rest[-1]))

    data_batches, log = assemble.TrainingData.batches, Run.log

    def batches(self, start, stop):
        for batch in data_batches(self, start, stop):
            time.sleep(0.05)
            yield batch

    def logs(run, *rest):
        logged.append(rest)
        log(run, *rest)

    patched = {"accumulate": step_of("accumulate"), "grad_cache": step_of("grad_cache")}
    patched |= {"build_engine": lambda *_: Still(), "check_run": lambda *_, **__: None}
    for name, value in patched.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(train.engine, "start", lambda: CPU)
    monkeypatch.setattr(train.hardware, "share_threads", lambda: None)
    monkeypatch.setattr(assemble.TrainingData, "batches", batches)
    monkeypatch.setattr(Run, "report_start", lambda *_: None)
    monkeypatch.setattr(Run, "log", logs)
    for name in ("evaluate", "save", "finish"):
        monkeypatch.setattr(Run, name, note(name))
    recipe = tmp_path / "empty.yaml"
    recipe.write_text("seed: 1")
    train.main([
        "--recipe", str(recipe), f"objective={objective}", f"output={tmp_path}/run", "seed=5",
        f"model.path={folder}", "data.workers=0", "optim.batch_size=4", "optim.steps=5",
        "chunk={samples: 3, tokens: 77}", "eval.every=2", "checkpoint.every=3",
        "logging.tensorboard=false",
    ])  # fmt: skip
    name, kind = ("accumulate", "Compress") if objective == "compress" else ("grad_cache", "Match")
    size, pairs = (4, 0) if objective == "compress" else (8, 4)
    chunk = Budget(samples=3, tokens=77, keep=0, packed=True)
    assert steps == [(name, kind, size, pairs, chunk, 5, step) for step in range(5)]
    assert done == [("evaluate", 2), ("save", 3), ("evaluate", 4), ("save", 5), ("finish", 5)]
    assert [row[0] for row in logged] == list(range(5))
    for *_, waited, took in logged:
        assert 0.05 <= waited <= took - 0.1


class TestRun:
    @pytest.fixture
    def start(self, tmp_path, quiet):
        def start(*overrides: str) -> Run:
            run = Run(config_of(f"output={tmp_path}/run", *overrides))
            run.resume(Still())
            return run

        return start

    def step(self, run: Run, step: int, truncated: int = 0) -> None:
        batch = make_batch([{"text": 3}, {"text": 9}])  # 20 tokens with those of compression
        batch = replace(batch, truncated=truncated)
        run.log(step, batch, {"loss": 2.5}, Still().step(step), 0.5, 2.0)

    def lines(self, run: Run) -> list[dict]:
        return [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]

    def board(self, run: Run) -> EventAccumulator:
        run.monitor.close()
        return EventAccumulator(str(run.folder / "tensorboard")).Reload()

    def test_figures_of_a_step(self, start, monkeypatch):
        def peak() -> float:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        run, before = start("optim.batch_size=6", "optim.steps=2"), peak()
        self.step(run, 0, truncated=1)
        self.step(run, 1, truncated=2)
        first, second = self.lines(run)
        wanted = {
            "loss": 2.5, "lr": 0.25, "grad_norm": 4.0, "skipped": 0, "samples_per_second": 3,
            "tokens_per_second": 10, "data_wait_percent": 25,
        }  # fmt: skip
        for line in (first, second):
            assert {name: line[name] for name in wanted} == wanted
            assert before <= line["memory_mib"] <= peak()
        assert [first["training_seconds"], second["training_seconds"]] == [2, 4]
        assert [first["truncated"], second["truncated"]] == [1, 3]

    @pytest.mark.parametrize("request_, code", [(Request.STOP, 85), (Request.HOLD, 87)])
    def test_asked_to_stop_on_a_full_disk(self, start, monkeypatch, request_, code):
        """It ends as it was asked to, and says what is left to go on from."""
        run = start("optim.steps=9")
        monkeypatch.setattr(run.requests, "agree", lambda device: request_)
        monkeypatch.setattr(run, "save", lambda engine, done: False)
        with pytest.raises(Stopped) as caught:
            run.obey(Still(), 7)
        assert caught.value.code == code
        wanted = "stopped after step 7, of which there is no checkpoint (the newest: none)"
        assert caught.value.message.startswith(wanted)

    def test_where_the_best_is_looked_for_the_last_step_is_measured_before_it_is_saved(self, start):
        asked = ("eval.every=3", "checkpoint.every=2", "optim.steps=9")
        for best, wanted in (("checkpoint.best=All", [3, 6, 9]), ("seed=1", [3, 6])):
            run = start(*asked, best)
            assert [n for n in range(1, 10) if run.evaluation_is_due(n)] == wanted

    def test_where_the_best_is_measured_it_is_saved(self, start):
        asked = ("eval.every=3", "checkpoint.every=2", "optim.steps=9")
        for best, wanted in (("checkpoint.best=All", [2, 3, 4, 6, 8, 9]), (None, [2, 4, 6, 8, 9])):
            run, due = start(*asked, *([best] if best else [])), []
            for done in range(1, 10):
                if run.evaluation_is_due(done):
                    run.evaluated = done
                for measured in (False, True):
                    due += [done] * run.checkpoint_is_due(done, measured=measured)
            assert due == wanted

    def test_a_checkpoint_is_written_before_an_evaluation(self, start):
        """Which may be ended; one that may be the best is written after it."""
        for best, before in ((None, True), ("checkpoint.best=All", False)):
            run = start(
                "eval.every=3", "checkpoint.every=3", "optim.steps=9", *([best] if best else [])
            )
            assert run.checkpoint_is_due(3) == before
            assert run.checkpoint_is_due(3, measured=True) != before

    def test_an_evaluation_that_was_ended_is_made_up_for(self, start):
        run = start("eval.every=3", "checkpoint.every=3", "optim.steps=9")
        assert not run.evaluation_is_missing(3)  # nothing of this folder is the run's
        run.monitor.scalars(3, {"loss": 1.0})
        assert run.evaluation_is_missing(3) and not run.evaluation_is_missing(2)
        run.monitor.scalars(3, {"All": 1.0}, group="eval")
        assert not run.evaluation_is_missing(3)
        run.monitor.scalars(9, {"loss": 1.0})
        assert not run.evaluation_is_missing(9)  # is done in the end

    def test_a_row_of_skipped_steps_is_not_saved(self, start):
        """Each would push out a checkpoint from before the fault."""
        run = start("checkpoint.every=2", "optim.steps=9")
        due = []
        for done in range(1, 10):
            run.guard.in_a_row = max(0, done - 4) if done < 9 else 0
            due += [done] * run.checkpoint_is_due(done)
        assert due == [2, 4, 9]

    def test_every(self, start):
        run = start("logging.every=3", "optim.steps=8")
        for step in range(8):
            self.step(run, step)
        assert [line["step"] for line in self.lines(run)] == [1, 3, 6, 8]

    @pytest.mark.parametrize("wanted", [True, False])
    def test_displays_can_be_switched_off(self, start, monkeypatch, wanted):
        terminal = StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stderr", terminal)
        run = start(f"logging.tensorboard={wanted}", f"logging.progress={wanted}")
        assert (run.folder / "tensorboard").exists() == wanted == (run.bar is not None)

    def test_the_config_stands_in_tensorboard(self, start):
        run = start("optim.steps=7")
        (text,) = self.board(run).Tensors("config/text_summary")
        assert text.tensor_proto.string_val[0].decode() == f"```\n{dump(run.config)}```"

    def test_hparams(self, start, monkeypatch):
        table = {"colour": {"tokens": 0.5, "visible": 1.0, "blind": 0.0, "questions": 2}}
        monkeypatch.setattr("coma_ds.run.bottleneck_questions", lambda _: ["question"])
        monkeypatch.setattr("coma_ds.run.evaluate_bottleneck", lambda *_: table)
        run = start("optim.steps=7", "optim.lr=0.125")
        run.finish(Still(), SimpleNamespace(), 7)
        board = self.board(run)
        found = {}
        for name in ("session_start_info", "experiment"):
            content = board.summary_metadata[f"_hparams_/{name}"].plugin_data.content
            found[name] = getattr(HParamsPluginData.FromString(content), name)
        values = found["session_start_info"].hparams
        assert values["optim.steps"].number_value == 7 and values["optim.lr"].number_value == 0.125
        assert values["compress.loss"].string_value == "ce"
        assert not [name for name in values if name.startswith(("match", "output", "eval"))]
        tags = {info.name.tag for info in found["experiment"].metric_infos}
        assert tags and tags <= set(board.Tags()["scalars"])

    def test_sets_on_the_way(self, start, monkeypatch):
        asked = []
        monkeypatch.setattr("coma_ds.run.load_tasks", lambda _, __, sets: asked.append(sets) or [])
        run = start("objective=match", "eval.along=[i2t/seen]")
        for final in (False, True):
            run.evaluate(Still(), SimpleNamespace(), 1, final=final)
        assert asked == [("i2t/seen",), ()]


RATES = [(stage, rate) for stage in ("zero0", "zero2", "zero3") for rate in ("null", "0.04")]


def first_steps(folder: str) -> list[dict]:
    """How far the tokens and the rest move in one SGD step, for each of ``RATES``."""
    found = []
    for stage, rate in RATES:
        config = config_of(
            "objective=match", f"model.path={folder}", "model.compression_tokens=4",
            "precision=fp32", "optim.kind=sgd", "optim.clip=0", "optim.warmup=0",
            "optim.lr=0.01", f"optim.token_lr={rate}", f"deepspeed={stage}",
        )  # fmt: skip
        source, processing = assemble.build_processing(config)
        engine = assemble.build_engine(config, source, processing, CPU)
        pairs = [Pair(Side(f"find {n}"), Side(f"thing {n}")) for n in range(3)]
        before = whole_parameters(engine)
        batch = Collator(processing)(pairs)
        grad_cache(engine, Match(config.match), batch, Budget.of(config.chunk), seed=0, step=0)
        result = engine.step(0)
        gaps = {n: (p - before[n]).norm().item() for n, p in whole_parameters(engine).items()}
        rest = sum(gap for name, gap in gaps.items() if name != "tokens.weight")
        row = {"stage": engine.stage, "tokens": gaps["tokens.weight"], "rest": rest}
        found.append(row | {"lr": result.lr})
        engine.destroy()
    return found


def test_rate_of_the_tokens(folder):
    """Through DeepSpeed: four times the rate, four times as far."""
    ((*rows,),) = run_world(1, "tests.unit.test_wiring_run:first_steps", folder=folder)
    assert [row["stage"] for row in rows] == [0, 0, 2, 2, 3, 3]
    for plain, faster in zip(rows[::2], rows[1::2]):
        assert plain["tokens"] > 1e-4 and plain["lr"] == faster["lr"] == 0.01
        assert faster["tokens"] == pytest.approx(4 * plain["tokens"], rel=1e-3)
        assert faster["rest"] == pytest.approx(plain["rest"], rel=1e-3)
