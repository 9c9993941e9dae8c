"""What a run measures on its way and at its end, with an engine that does nothing."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm

from coma_ds.config import RunConfig, load_config
from coma_ds.data.records import RankingTask, Side
from coma_ds.run import Run, log_to_stderr
from tests.tiny import demo_processing

SETTINGS = ["checkpoint.every=0", "logging.tensorboard=false", "logging.progress=false"]


class Resting:
    """An engine whose model is dropout alone."""

    device = torch.device("cpu")
    stage = 0

    def __init__(self) -> None:
        self.ds_config: dict = {}
        self.model = nn.Dropout(0.5)
        self.train()

    def train(self) -> None:
        self.model.train()

    def eval(self) -> None:
        self.model.eval()

    def drops(self) -> bool:
        return not self.model(torch.ones(64)).equal(torch.ones(64))


@pytest.fixture(autouse=True)
def quiet(monkeypatch, caplog):
    """The log stays with pytest; nothing is exported."""
    caplog.set_level(logging.INFO, logger="coma_ds")
    monkeypatch.setattr("coma_ds.run.log_to_stderr", lambda main: None)
    monkeypatch.setattr("coma_ds.run.export_run", lambda *_: None)


def started(folder: Path, recipe: str, *overrides: str) -> tuple[Run, Resting]:
    engine = Resting()
    config: RunConfig = load_config(recipe, [f"output={folder}/run", *SETTINGS, *overrides])
    run = Run(config)
    run.resume(engine)
    return run, engine


def ranked(tasks: list) -> dict:
    """Results in the form of ``evaluation.evaluate``."""
    row = {"group": "Ret", "domain": "IND", "p@1": 0.5, "queries": 2, "candidates": 2.0, "ties": 0}
    row |= {"recall@5": 1.0, "recall@10": 1.0, "chance": 0.5}
    return {"sets": {t.name: dict(row) for t in tasks}, "groups": {"All": 0.5}}


@pytest.fixture
def measured(monkeypatch) -> list[tuple[str, bool]]:
    """What was measured, and whether dropout was on then."""
    seen = []
    task = RankingTask("mine", "Ret", "IND", [Side("a")], [Side("b")], [np.array([0])])

    def ranking(engine, collator, tasks, *_):
        seen.append(("ranking", engine.drops()))
        return ranked(tasks)

    def bottleneck(engine, *_):
        seen.append(("bottleneck", engine.drops()))
        return {"colour": {"tokens": 0.5, "visible": 1.0, "blind": 0.0, "questions": 2}}

    monkeypatch.setattr("coma_ds.run.load_tasks", lambda *_: [task])
    monkeypatch.setattr("coma_ds.run.bottleneck_questions", lambda _: ["question"])
    monkeypatch.setattr("coma_ds.run.evaluate_ranking", ranking)
    monkeypatch.setattr("coma_ds.run.evaluate_bottleneck", bottleneck)
    return seen


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize(
    ("recipe", "kind", "key"),
    [("demo-match", "ranking", "sets"), ("demo-compress", "bottleneck", "bottleneck")],
)
def test_dropout_is_off_in_an_evaluation_and_on_again_after_it(
    tmp_path, measured, recipe, kind, key, final
):
    run, engine = started(tmp_path, recipe)
    assert engine.drops()
    results = run.evaluate(engine, demo_processing(), 3, final=final)
    assert measured == [(kind, False)]
    assert engine.drops()
    assert results["step"] == 3 and results[key]


@pytest.mark.parametrize(
    ("recipe", "names"),
    [("demo-match", "mine, group/All"), ("demo-compress", "colour/tokens, colour/visible, ")],
)
def test_a_best_that_is_never_measured_is_told_at_the_first_evaluation(
    tmp_path, measured, recipe, names
):
    best = ["checkpoint.best=p@1", "checkpoint.every=1", "eval.every=1"]
    run, engine = started(tmp_path, recipe, *best)
    with pytest.raises(ValueError, match=rf"^checkpoint.best 'p@1' is no .*: there are {names}"):
        run.evaluate(engine, demo_processing(), 3)
    right = f"checkpoint.best={names.partition(',')[0]}"
    run, engine = started(tmp_path / "other", recipe, *best, right)
    run.evaluate(engine, demo_processing(), 3)
    assert run.values[run.config.checkpoint.best] == 0.5


NOTHING = {
    "match": (
        ["data.format=pairs", "data.path=x.jsonl", "data.sources=[]", "eval.sets=[]",
         "eval.along=[]", "data.sub_batch=0"],
        "nothing is evaluated: this data brings no evaluation sets (eval.root names a folder in "
        "MMEB-eval's format)",
    ),
    "compress": (
        ["data.format=dialogues", "data.path=x.jsonl"],
        "nothing is evaluated: no questions are asked (eval.path names a dialogue file)",
    ),
}  # fmt: skip


class TestNothingToEvaluate:
    @pytest.mark.parametrize("final", [False, True])
    @pytest.mark.parametrize("objective", NOTHING)
    def test_it_is_said_in_one_line(self, tmp_path, caplog, objective, final):
        overrides, line = NOTHING[objective]
        run, engine = started(tmp_path, f"demo-{objective}", "init_from=null", *overrides)
        caplog.clear()
        results = run.evaluate(engine, demo_processing(), 3, final=final)
        assert results == {"step": 3, "training_seconds": 0.0}
        assert caplog.messages == [line]
        assert engine.drops()

    @pytest.mark.parametrize("objective", NOTHING)
    def test_no_empty_table_is_written(self, tmp_path, caplog, objective):
        overrides, line = NOTHING[objective]
        run, engine = started(tmp_path, f"demo-{objective}", "init_from=null", *overrides)
        run.finish(engine, demo_processing(), 7)
        written = json.loads((tmp_path / "run" / "results.json").read_text())
        assert written.keys() == {"step", "training_seconds", "weights"}
        assert caplog.messages.count(line) == 1 and "P@1" not in caplog.text
        assert not (tmp_path / "run" / "neighbours.json").exists()

    @pytest.mark.parametrize("step", [None, 6, 7])
    def test_an_evaluation_that_is_not_asked_for(self, tmp_path, measured, step):
        """What was measured of an older model goes with it."""
        run, engine = started(tmp_path, "demo-match", "eval.at_end=false")
        file = tmp_path / "run" / "results.json"
        if step:
            file.write_text(json.dumps({"step": step}))
        run.finish(engine, demo_processing(), 7)
        assert not measured and file.exists() == (step == 7)


def test_the_results_of_the_end_are_written(tmp_path, measured, caplog):
    run, engine = started(tmp_path, "demo-compress")
    run.finish(engine, demo_processing(), 7)
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["bottleneck"]["colour"]["tokens"] == 0.5 and written["step"] == 7
    assert "results after 7 steps:\nquestion " in caplog.text


def test_the_log_stands_above_the_bar(monkeypatch):
    """In the order on the screen: the bar is wiped away, the line, the bar again below it."""
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    log_to_stderr(main=True)
    bar = tqdm(total=4, file=screen, ncols=40, desc="compress")
    bar.update(1)
    before = len(screen.getvalue())
    logging.getLogger("coma_ds").info("checkpoint of step 1")
    said = screen.getvalue()[before:]
    bar.close()
    wiped, line, below = said.partition("checkpoint of step 1\n")
    assert line and wiped.endswith("\r") and not wiped.strip()
    assert below.startswith("\rcompress: ")
