"""Train: ``deepspeed coma_ds/train.py [--recipe NAME] [KEY=VALUE ...]``.

Also under torchrun, and as plain ``python`` in a world of one.  Without a recipe it runs
``demo-compress``.
"""

from __future__ import annotations

import os
import sys

# Run by path, Python puts this folder first on sys.path, where a file of ours could shadow a
# package of the same name.
if __name__ == "__main__":
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.realpath(p or ".") != here]

import argparse
import time
from typing import NoReturn

from coma_ds import comm, engine, hardware
from coma_ds.assemble import build_data, build_engine, build_objective, build_processing
from coma_ds.checks import check_run
from coma_ds.config import RunConfig, load_config
from coma_ds.effects import check_effect, in_a_job
from coma_ds.entry import entry_point
from coma_ds.run import Run
from coma_ds.run_folder import settled
from coma_ds.step import accumulate, grad_cache
from coma_ds.verify import verify_gradients


class Parser(argparse.ArgumentParser):
    """Its errors are the user's, as all others: one sentence, said once."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(argv: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    """The command line and the resolved config."""
    parser = Parser(
        prog="train.py",
        description="Compress, then match: train one stage of one run.",
        allow_abbrev=False,  # the batch scripts look for --recipe
    )
    parser.add_argument("--recipe", default="demo-compress", help="a shipped name or a YAML file")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, take one step, stop"
    )
    parser.add_argument(
        "--verify-gradients",
        action="store_true",
        help="compare one chunked step with one plain step on this model, and stop",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # launchers add it
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. optim.lr=2e-5")
    args = parser.parse_intermixed_args(argv)
    config = in_a_job(load_config(args.recipe, args.overrides))
    check_effect(config, args.overrides)
    return args, config


def main(argv: list[str]) -> None:
    """Build the run, then one visible loop."""
    args, config = parse(argv)
    device = engine.start()
    hardware.share_threads()
    config = comm.decide(lambda: settled(config))
    run = Run(config, keep=not (args.dry_run or args.verify_gradients))
    source, processing = build_processing(config)
    data = build_data(config, processing)
    check_run(config, data, thorough=args.dry_run)
    objective = build_objective(config)
    trainer = build_engine(config, source, processing, device)
    take_step = accumulate if config.objective == "compress" else grad_cache
    run.report_start(trainer, data, source)
    if args.verify_gradients:
        return verify_gradients(trainer, objective, next(data.batches(0, 1)), config)
    first = run.resume(trainer)
    last = first + 1 if args.dry_run else config.optim.steps

    if run.evaluation_is_missing(first):
        run.evaluate(trainer, processing, first)
    batches = data.batches(first, last)
    for step in range(first, last):
        began = time.perf_counter()
        batch = next(batches).to(device)
        waited = time.perf_counter() - began
        budget = run.settled_budget(trainer, objective, batch)
        with run.timed(trainer, step):
            report = take_step(trainer, objective, batch, budget, seed=config.seed, step=step)
        result = run.guarded_step(trainer, data, step, report["loss"])
        run.log(step, batch, report, result, waited, time.perf_counter() - began)
        if run.checkpoint_is_due(step + 1):
            run.save(trainer, step + 1)
        if run.evaluation_is_due(step + 1):
            run.evaluate(trainer, processing, step + 1)
            if run.checkpoint_is_due(step + 1, measured=True):
                run.save(trainer, step + 1)
        run.obey(trainer, step + 1)

    run.finish(trainer, processing, last)


if __name__ == "__main__":
    entry_point(main, sys.argv[1:])
