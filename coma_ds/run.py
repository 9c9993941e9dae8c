"""One run: its folder, its reports, its checkpoints and its end."""

from __future__ import annotations

import json
import logging
import platform
import resource
import sys
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from coma_ds import comm
from coma_ds.assemble import TrainingData
from coma_ds.assessment import (
    bottleneck_questions,
    evaluate_bottleneck,
    evaluate_ranking,
    format_bottleneck,
    format_pixels,
    load_tasks,
)
from coma_ds.batch import Batch
from coma_ds.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from coma_ds.config import RunConfig, dump
from coma_ds.data.collate import Collator
from coma_ds.data.processing import Processing
from coma_ds.displays import Displays, bottleneck_table, curves, result_tags
from coma_ds.engine import Engine, StepResult, full_parameters
from coma_ds.evaluation import format_table, write_results
from coma_ds.metrics import Monitor, flatten
from coma_ds.model.card import model_card
from coma_ds.model.export import export_model
from coma_ds.report import describe_run

log = logging.getLogger("coma_ds")

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "triton", "flash-attn")
# Settings that make no difference between the results of two runs.
UNCOMPARED = {
    **dict.fromkeys(("output", "eval", "checkpoint", "logging"), True),
    "data": {"root", "path", "image_root", "workers"},
}
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
        self.bar: tqdm | None = None
        log_to_stderr(self.main)
        if keep and self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(dump(config))
            (self.folder / "versions.txt").write_text(versions())
        comm.barrier()

    def report_start(self, engine: Engine, data: TrainingData, source: str) -> None:
        """The start-up report, the resolved config, and the DeepSpeed config of the run."""
        lines = describe_run(self.config, engine, data, source)
        for line in lines:
            log.info("%s", line)
        if self.keep and self.main:
            path = self.folder / "ds_config.json"
            path.write_text(json.dumps(engine.ds_config, indent=2) + "\n")

    def resume(self, engine: Engine) -> int:
        """Load the checkpoint that ``checkpoint.resume`` says; the first step to take."""
        step = 0
        if self.keep:
            folder, wanted = self.folder / "checkpoints", self.config.checkpoint.resume
            path = comm.decide(lambda: find_checkpoint(folder, wanted))
            if path is not None:
                step = load_checkpoint(engine, path)
                self.seconds = json.loads((path / "clock.json").read_text())["seconds"]
                log.info("resumed %s: step %d of %d", path, step, self.config.optim.steps)
            elif (self.folder / "metrics.jsonl").is_file():
                log.info("%s has no checkpoint to go on from: the run starts over", self.folder)
        logging_config = self.config.logging
        active = self.keep and self.main
        self.monitor = Monitor(
            self.folder, active=active, tensorboard=logging_config.tensorboard, resume_step=step + 1
        )
        self.monitor.text("config", f"```\n{dump(self.config)}```")
        if self.main and logging_config.progress and sys.stderr.isatty():
            steps = self.config.optim.steps
            self.bar = tqdm(total=steps, initial=step, desc=self.config.objective, unit="step")
        return step

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
        done = step + 1
        config = self.config
        if self.bar is not None:
            self.bar.update(1)
            speed = f"{config.optim.batch_size / took:.0f}/s"
            self.bar.set_postfix(loss=f"{report['loss']:.3f}", samples=speed)
        if not result.applied:
            log.warning("step %d was skipped: its gradient is not finite", done)
        every, ends = config.logging.every, (1, config.optim.steps)
        if done % every and done not in ends:
            return
        own = torch.tensor([len(batch.input_ids_T)], device=batch.input_ids_T.device)
        tokens = int(comm.all_sum(own))
        values = {
            **report,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "skipped": float(not result.applied),
            "samples_per_second": config.optim.batch_size / took,
            "tokens_per_second": tokens / took,
            "data_wait_percent": 100 * waited / took,
            "memory_mib": memory_mib(),
            "training_seconds": self.seconds,
        }
        self.monitor.scalars(done, values)
        lines = max(1, config.optim.steps // 20 // every) * every
        if self.bar is None and (done % lines == 0 or done in ends):
            shown = ("loss", "answer_accuracy", "in_batch_accuracy", "samples_per_second")
            words = "  ".join(f"{k} {values[k]:.4g}" for k in shown if k in values)
            log.info("step %d/%d  %s", done, config.optim.steps, words)

    def evaluation_is_due(self, done: int) -> bool:
        """True after the steps that ``eval.every`` says, not after the last one."""
        every = self.config.eval.every
        return self.keep and bool(every) and done % every == 0 and done < self.config.optim.steps

    def checkpoint_is_due(self, done: int) -> bool:
        """True after the steps that ``checkpoint.every`` says, and after the last one."""
        every = self.config.checkpoint.every
        last = done == self.config.optim.steps
        return self.keep and bool(every) and (done % every == 0 or last)

    def save(self, engine: Engine, done: int) -> None:
        """Publish a checkpoint."""
        clock = {"clock.json": json.dumps({"seconds": self.seconds})}
        save_checkpoint(engine, self.folder / "checkpoints", done, extra=clock)

    def evaluate(self, engine: Engine, processing: Processing, done: int, *, final=False) -> dict:
        """Ranking sets (stage 2) or the bottleneck table (stage 1), written down and returned."""
        config, collator = self.config, Collator(processing)
        engine.eval()
        displays = Displays(self.monitor, self.folder, done, final=final)
        results: dict = {"step": done, "training_seconds": round(self.seconds, 1)}
        if config.objective == "match":
            cache = Path(config.output).parent / "evaluation_sets"
            tasks = load_tasks(config, cache, () if final else config.eval.along)
            watch = displays.watch if self.main else None
            results |= evaluate_ranking(engine, collator, tasks, config, engine.device, watch)
            if self.main:
                displays.finish(results)
            text = format_table(results) + format_pixels(results)
        else:
            questions = bottleneck_questions(config)
            table = evaluate_bottleneck(engine, collator, questions, config, engine.device)
            results["bottleneck"] = table
            self.monitor.table("results/bottleneck", *bottleneck_table(table), done)
            text = format_bottleneck(table)
        engine.train()
        values, tags = curves(results, means=final or not config.eval.along)
        values["training_seconds"] = self.seconds
        self.monitor.scalars(done, values, group="eval", tags=tags)
        if final:
            log.info("results after %d steps:\n%s", done, text)
        return results

    def finish(self, engine: Engine, processing: Processing, done: int) -> None:
        """Export ``model/``, evaluate, write ``results.json``."""
        if not self.keep:
            log.info("dry run: one step done, nothing written")
            return
        export_run(self.config, engine, processing, self.folder / "model", done)
        if self.config.eval.at_end:
            results = self.evaluate(engine, processing, done, final=True)
            if self.main:
                write_results(self.folder / "results.json", results)
            aside = UNCOMPARED | {OTHER_OBJECTIVE[self.config.objective]: True}
            settings = flatten(self.config.model_dump(mode="json", exclude=aside))
            self.monitor.hparams(settings, result_tags(curves(results)[1]))
        if self.bar is not None:
            self.bar.close()
        self.monitor.close()
        log.info("done: %s (%.0f s of training)", self.folder, self.seconds)


def export_run(
    config: RunConfig, engine: Engine, processing: Processing, folder: Path, step: int
) -> None:
    """Write the model of a run, as it is after ``step`` steps; every rank takes part."""
    export_model(
        engine.model,
        processing,
        folder,
        whole=full_parameters,
        main=comm.rank() == 0,
        card=model_card(config, step),
        extras={"objective": config.objective, "recipe": config.recipe, "step": step},
    )


def memory_mib() -> float:
    """Peak memory of this rank: of its GPU, or of its process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def versions() -> str:
    """Python and the packages that decide a result, one a line."""
    lines = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} -")
    return "\n".join(lines) + "\n"


def log_to_stderr(main: bool) -> None:
    """The package's log on stderr, bare lines; of other ranks than ``main`` errors only."""
    log.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if main else logging.ERROR)
    log.propagate = False
