"""One run: its folder, its reports, its checkpoints and its end."""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from coma_ds import comm, run_folder
from coma_ds.assemble import TrainingData, export_run
from coma_ds.assessment import (
    bottleneck_questions,
    evaluate_bottleneck,
    evaluate_ranking,
    format_bottleneck,
    format_pixels,
    load_tasks,
)
from coma_ds.batch import Batch
from coma_ds.budget import remember, settle
from coma_ds.checkpoint import Checkpoints, Published, load_checkpoint
from coma_ds.config import RunConfig, dump
from coma_ds.data.collate import Collator
from coma_ds.data.processing import Processing
from coma_ds.data.replacements import Replacements
from coma_ds.displays import Displays, bottleneck_table, curves, result_tags
from coma_ds.engine import Engine, StepResult
from coma_ds.evaluation import format_table, write_results
from coma_ds.guard import SKIPPED_FILE, Guard
from coma_ds.hardware import memory_mib
from coma_ds.manifest import published, read_manifest
from coma_ds.metrics import LINES, Monitor, flatten, keep_before, lacks
from coma_ds.ownership import owns
from coma_ds.report import describe_run
from coma_ds.screen import log_to_stderr
from coma_ds.step import Budget
from coma_ds.stopping import CONTROL, Finished, Request, Requests, Stopped
from coma_ds.stragglers import OwnTime
from coma_ds.throughput import Throughput

log = logging.getLogger("coma_ds")

STATE = "run.json"  # in a checkpoint: what the run itself remembers
RANKS_COMPARED = 10  # in every so many logged steps
# Settings that make no difference between the results of two runs.
UNCOMPARED = {
    **dict.fromkeys(("output", "eval", "checkpoint", "logging"), True),
    "data": {"root", "path", "image_root", "workers"},
}
NO_SETS = "this data brings no evaluation sets (eval.root names a folder in MMEB-eval's format)"
NO_QUESTIONS = "no questions are asked (eval.path names a dialogue file)"
OTHER_OBJECTIVE = {"compress": "match", "match": "compress"}


class Run:
    """The folder of a run and everything written there; ``keep=False`` writes nothing."""

    def __init__(self, config: RunConfig, *, keep: bool = True) -> None:
        self.config = config
        self.folder = Path(config.output)
        self.keep = keep
        self.main = comm.rank() == 0
        self.seconds = 0.0  # of training, without evaluation and saving
        self.monitor: Monitor | None = None
        self.throughput: Throughput | None = None
        self.budget: Budget | None = None  # None: not settled yet
        self._known_budget: dict | None = None  # of the run that this one goes on with
        self.own_time: OwnTime | None = None  # of this rank in a step that compares the ranks
        self.bar: tqdm | None = None
        self.replacements = Replacements(config.data.bad_rows)
        self.truncated = 0  # samples of this rank so far that lost text
        self.values: dict[str, float] = {}  # of the last evaluation
        self.evaluated = -1  # the step after which that was
        log_to_stderr(self.main)
        mine = comm.decide(lambda: run_folder.claim(config, keep=keep))
        owned = partial(owns, self.folder, mine) if mine else (lambda: True)
        self.requests = Requests(self.folder, owned)
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", config.checkpoint, owned, self.requests.announce,
            start=mine.number if mine else 0, base=config.init_from or config.model.path,
        )  # fmt: skip
        self._mine, self._owned = mine, owned
        self.guard = Guard(config.guard, self.folder if keep and self.main else None)

    def report_start(self, engine: Engine, data: TrainingData, source: str) -> None:
        """The start-up report."""
        self.throughput = Throughput(engine.model, self.config)
        for line in describe_run(self.config, engine, data, source):
            log.info("%s", line)

    def resume(self, engine: Engine) -> int:
        """Load the checkpoint that ``checkpoint.resume`` says; the first step to take.

        From here on the folder is this run's: its config and versions are written.
        """
        step, own = 0, True  # of this folder, so that its metrics are this run's
        if self.keep:
            step, own = self._load(engine)
            self.requests.take_signals(bool(self.config.checkpoint.every or CONTROL in os.environ))
            begin = partial(run_folder.begin, self.config, self._mine, engine.ds_config)
            comm.decide(begin)
            if self.main:
                self.requests.announce(step, gained=False)
        logging_config = self.config.logging
        active = self.keep and self.main
        first = step + 1 if own else 1
        ended = own and 0 < step == self.config.optim.steps
        with run_folder.written(self.folder):
            self.monitor = Monitor(
                self.folder, active=active, tensorboard=logging_config.tensorboard,
                resume_step=first, ended=ended,
            )  # fmt: skip
            if active:
                keep_before(self.folder / SKIPPED_FILE, first)
        self.monitor.text("config", f"```\n{dump(self.config)}```", first)
        if self.main and logging_config.progress and sys.stderr.isatty():
            steps = self.config.optim.steps
            self.bar = tqdm(total=steps, initial=step, desc=self.config.objective, unit="step")
        return step

    def _load(self, engine: Engine) -> tuple[int, bool]:
        """The first step to take, and whether what went before it was in this folder.

        Raises ``Finished`` where there is none to take and nothing to write.
        """
        config = self.config
        self._give_way()
        if self.main:
            self.checkpoints.clean()
        path = self.checkpoints.find(config.checkpoint.resume, going_on=True)
        if path is None:
            if self.main and (self.folder / "metrics.jsonl").is_file():
                log.info("%s has no checkpoint to go on from: the run starts over", self.folder)
            self._give_way()
            if self.main:
                run_folder.start_over(self.folder)
            return 0, True
        step = read_manifest(path).step
        for difference in comm.decide(lambda: run_folder.check_same(config, path, step)):
            log.warning("changed since the checkpoint: %s", difference)
        own = comm.decide(lambda: path.resolve().parent == self.checkpoints.folder.resolve())
        last = own and step == config.optim.steps
        if comm.decide(lambda: last and run_folder.is_finished(config)):
            raise Finished(self.folder, step)
        load_checkpoint(engine, path, self.checkpoints.base, self.checkpoints.folder)
        self._give_way()
        comm.decide(lambda: run_folder.go_back(self.folder, step if own else -1))
        state = json.loads((path / STATE).read_text())
        self.seconds = state["seconds"]
        self._known_budget = state.get("budget")
        self.guard.load(state["guard"])
        self.replacements.load(state["replaced_rows"])
        log.info("resumed %s: step %d of %d", path, step, config.optim.steps)
        return step, own

    def _give_way(self) -> None:
        """Before anything is moved or removed: a newer start may have come meanwhile."""
        if not comm.decide(self._owned):
            raise self._lost()

    def _lost(self) -> Stopped:
        return Stopped(Request.YIELD, f"{self.folder} is owned by a newer start of this run")

    def settled_budget(self, engine: Engine, objective, batch: Batch) -> Budget:
        """How the batches of this run are cut into chunks; the first call may measure."""
        if self.budget is None:
            chunk = self.config.chunk
            self.budget = settle(engine, objective, batch, chunk, self._known_budget)
        return self.budget

    def guarded_step(
        self, engine: Engine, data: TrainingData, step: int, loss: float
    ) -> StepResult:
        """The optimizer step, left out where the guard says so.

        Raises ``ValueError`` after too many that were skipped in a row.
        """
        jumped = self.guard.jumps(loss)
        if jumped and self.config.guard.skip_spikes:
            engine.spoil_gradients()
        result = engine.step(step)
        samples = [] if result.applied else data.names(step)
        self.guard.after(step + 1, loss, applied=result.applied, jumped=jumped, samples=samples)
        return result

    def timed(self, engine: Engine, step: int) -> AbstractContextManager:
        """Around the forwards of a step: times them where the ranks are compared."""
        self.own_time = None
        if self.throughput:
            self.throughput.begin()
        if (step + 1) % (self.config.logging.every * RANKS_COMPARED) or not comm.is_parallel():
            return nullcontext()
        self.own_time = OwnTime(engine.device)
        return self.own_time.measure(engine.model)

    def log(
        self,
        step: int,
        batch: Batch,
        report: dict[str, float],
        result: StepResult,
        waited: float,
        took: float,
    ) -> None:
        """One step: metrics, progress, and a line now and then where there is no bar."""
        self.seconds += took
        if batch.truncated and not self.truncated:
            log.warning(
                "texts longer than model.max_length %d lose their end (metric: truncated)",
                self.config.model.max_length,
            )
        self.truncated += batch.truncated
        done = step + 1
        config = self.config
        self.replacements.add(batch.replaced, config.optim.batch_size, batch.input_ids_T.device)
        if self.bar is not None:
            self.bar.update(1)
            speed = config.optim.batch_size / took
            self.bar.set_postfix(loss=f"{report['loss']:.3f}", samples=f"{speed:.0f}/s")
        if self.main:
            self._tell(self.checkpoints.poll())
        every, ends = config.logging.every, (1, config.optim.steps)
        if done % every and done not in ends:
            return
        device = batch.input_ids_T.device
        own = torch.tensor([len(batch.input_ids_T), self.truncated], device=device)
        tokens, truncated = comm.all_sum(own).tolist()
        values = {
            **report,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "skipped": float(not result.applied),
            "skipped_in_all": float(self.guard.skipped),
            "samples_per_second": config.optim.batch_size / took,
            "tokens_per_second": tokens / took,
            "truncated": float(truncated),
            "data_wait_percent": 100 * waited / took,
            "memory_mib": memory_mib(),
            "training_seconds": self.seconds,
        }
        if self.throughput:
            values |= self.throughput.values(batch, took)
        if self.own_time is not None:
            values |= self.own_time.compare(waited)
        if config.data.bad_rows:
            values["replaced_rows"] = float(self.replacements.replaced)
        self.monitor.scalars(done, values)
        lines = max(1, config.optim.steps // 20 // every) * every
        if self.bar is None and (done % lines == 0 or done in ends):
            shown = ("loss", "answer_accuracy", "in_batch_accuracy", "samples_per_second")
            words = "  ".join(f"{k} {values[k]:.4g}" for k in shown if k in values)
            log.info("step %d/%d  %s", done, config.optim.steps, words)

    def evaluation_is_due(self, done: int) -> bool:
        """True after the steps that ``eval.every`` says; after the last one, which is measured in
        the end, where the best checkpoint is looked for."""
        every, end = self.config.eval.every, done == self.config.optim.steps
        due = self.keep and bool(every) and done % every == 0
        return due and (not end or bool(self.config.checkpoint.best))

    def evaluation_is_missing(self, done: int) -> bool:
        """True where the run was ended in the evaluation of the step that it goes on from."""
        due = 0 < done < self.config.optim.steps and self.evaluation_is_due(done)
        return due and comm.decide(lambda: lacks(self.folder / LINES, done, "eval"))

    def checkpoint_is_due(self, done: int, *, measured: bool = False) -> bool:
        """True after the steps that ``checkpoint.every`` says, and after the last one; once the
        step is ``measured``, where ``checkpoint.best`` looks at that.  Not after one that was
        skipped, which changed nothing (a row would push out all from before the fault)."""
        every, last = self.config.checkpoint.every, done == self.config.optim.steps
        best = bool(self.config.checkpoint.best) and self.evaluation_is_due(done)
        due = last or (not self.guard.in_a_row and (best or (every and done % every == 0)))
        return self.keep and bool(every) and bool(due) and measured == best

    def save(self, engine: Engine, done: int) -> bool:
        """Write a checkpoint, which is published beside the training; False where it failed."""
        self._tell(self.checkpoints.settle())
        remembered = {"guard": self.guard, "replaced_rows": self.replacements}
        state = {"seconds": self.seconds} | {k: v.state() for k, v in remembered.items()}
        if self.budget:
            state["budget"] = remember(self.budget, self.config.chunk)
        extra = {STATE: json.dumps(state), run_folder.CONFIG: dump(self.config)}
        metric = self.values.get(self.config.checkpoint.best) if self.evaluated == done else None
        problem = self.checkpoints.save(engine, done, extra=extra, metric=metric)
        self._tell(problem)
        return problem is None

    def _tell(self, ended: Published | None) -> None:
        if ended is None or not self.main:
            return
        if ended.problem:
            log.warning("no checkpoint of step %d: %s", ended.step, ended.problem)
            return
        times = {"saving_seconds": ended.saving, "publishing_seconds": ended.publishing}
        self.monitor.scalars(ended.step, times, group="checkpoint")
        log.info(
            "checkpoint of step %d: %.1f s to save, published %.1f s later",
            ended.step, ended.saving, ended.publishing,
        )  # fmt: skip

    def obey(self, engine: Engine, done: int) -> None:
        """Save, or end the run, where that is asked for.

        Raises ``Stopped`` with the exit code, also where the disk is full: the run goes on from the
        checkpoint before.
        """
        request = self.requests.agree(engine.device) if self.keep else Request.NOTHING
        if request is Request.NOTHING:
            return
        if request is Request.YIELD:
            raise self._lost()
        saved = self.save(engine, done)
        if request is Request.SAVE:
            return
        ended = self.checkpoints.settle()
        self._tell(ended)
        what = "which is saved"
        if not saved or (ended and ended.problem):
            newest = [path.name for path in published(self.checkpoints.folder)][:1]
            what = f"of which there is no checkpoint (the newest: {', '.join(newest) or 'none'})"
        if self.bar is not None:
            self.bar.close()
        self.monitor.close()
        comm.barrier()
        again = "start it again to go on" if request is Request.STOP else "held by control/stop"
        raise Stopped(request, f"stopped after step {done}, {what}: {again}")

    def evaluate(self, engine: Engine, processing: Processing, done: int, *, final=False) -> dict:
        """Ranking sets (stage 2) or the bottleneck table (stage 1), written down and returned.

        Without either there is nothing to measure, which is said.
        """
        config, collator = self.config, Collator(processing)
        displays = Displays(self.monitor, self.folder, done, final=final)
        results: dict = {"step": done, "training_seconds": round(self.seconds, 1)}
        matching = config.objective == "match"
        if matching:
            cache = Path(config.output).parent / "evaluation_sets"
            inputs = load_tasks(config, cache, () if final else config.eval.along)
        else:
            inputs = bottleneck_questions(config)
        if not inputs:
            log.info("nothing is evaluated: %s", NO_SETS if matching else NO_QUESTIONS)
            return results
        engine.eval()
        if matching:
            watch = displays.watch if self.main else None
            results |= evaluate_ranking(engine, collator, inputs, config, engine.device, watch)
            if self.main:
                displays.finish(results)
            text = format_table(results) + format_pixels(results)
        else:
            table = evaluate_bottleneck(engine, collator, inputs, config, engine.device)
            results["bottleneck"] = table
            self.monitor.table("results/bottleneck", *bottleneck_table(table), done)
            text = format_bottleneck(table)
        engine.train()
        values, tags = curves(results, means=final or not config.eval.along)
        self.values, self.evaluated = values, done
        best = config.checkpoint.best
        if best and best not in values and not final:
            raise ValueError(
                f"checkpoint.best {best!r} is no evaluated value: there are {', '.join(values)}"
            )
        self.monitor.scalars(done, values | {"training_seconds": self.seconds}, "eval", tags)
        if final:
            log.info("results after %d steps:\n%s", done, text)
        return results

    def finish(self, engine: Engine, processing: Processing, done: int) -> None:
        """Export ``model/``, evaluate, write ``results.json``."""
        if not self.keep:
            log.info("dry run: one step done, nothing written")
            return
        if self.main:
            run_folder.forget_results(self.folder, done)
        export_run(self.config, engine, processing, self.folder / "model", done)
        if self.config.eval.at_end:
            results = self.evaluate(engine, processing, done, final=True)
            if self.main:
                results["weights"] = run_folder.fingerprint(self.folder / "model")
                with run_folder.written(self.folder):
                    write_results(self.folder / run_folder.RESULTS, results)
            aside = UNCOMPARED | {OTHER_OBJECTIVE[self.config.objective]: True}
            settings = flatten(self.config.model_dump(mode="json", exclude=aside))
            self.monitor.hparams(settings, result_tags(curves(results)[1]))
        self._tell(self.checkpoints.settle())
        if self.bar is not None:
            self.bar.close()
        self.monitor.close()
        if self.replacements.replaced:
            log.warning("%s", self.replacements)
        log.info("done: %s (%.0f s of training)", self.folder, self.seconds)
