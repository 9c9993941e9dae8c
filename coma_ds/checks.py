"""What can be known to be wrong before the first step: data, evaluation sets, arithmetic."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coma_ds import comm
from coma_ds.assemble import TrainingData
from coma_ds.assessment import bottleneck_questions, load_tasks
from coma_ds.config import RunConfig, dump
from coma_ds.data.builtin.evaluation_sets import HALVES, TASKS, check_place
from coma_ds.data.collate import Collator, named
from coma_ds.data.images import FilePicture, check_pictures
from coma_ds.data.mmeb_layout import mmeb_eval_sets
from coma_ds.data.processing import Processing
from coma_ds.data.records import Dialogue, Pair, RankingTask
from coma_ds.data.replacements import ALWAYS_ALLOWED, NAMED
from coma_ds.inference import swap_images

log = logging.getLogger("coma_ds")


@dataclass(frozen=True)
class Looks:
    """Rows of each source, evenly spread, that are looked at before a run, and how closely."""

    built: int  # read, their texts checked: about 50 microseconds each
    found: int  # their images exist
    decoded: int
    collated: int  # made into batches, as in training


EVERY_RUN, DRY_RUN = Looks(200_000, 50_000, 8, 64), Looks(10**7, 10**6, 200, 256)
GENERATED = 2000  # of a built-in source: its rows are drawn, not read
AT_A_TIME = 16  # questions
SIDES, SIDES_COLLATED = 200, 8  # queries, and candidates, of each evaluation set


class BadRows:
    """Bad rows among those looked at: the first one is an error, or a share of them ``allowed``."""

    def __init__(self, allowed: float) -> None:
        self.allowed, self.rows = allowed, 0
        self._reasons: dict[tuple[str, int], str] = {}
        self._closer: dict[str, tuple[int, int]] = {}  # bad rows and rows, by the look

    def look(self, source: str, rows: Sequence[int], check: Callable[[int], None], how="") -> None:
        """``check`` all ``rows`` of a source; ``how`` names a look at some of the rows again.

        Raises the first ``ValueError`` where none is allowed.
        """
        bad = 0
        for row in rows:
            try:
                check(row)
            except ValueError as error:
                if not self.allowed:
                    raise
                bad += 1
                self._reasons.setdefault((source, row), str(error))
        if how:
            before = self._closer.get(how, (0, 0))
            self._closer[how] = before[0] + bad, before[1] + len(rows)
        else:
            self.rows += len(rows)

    def judge(self) -> None:
        """Warn of the bad rows; ``ValueError`` when their share is above the one allowed.

        So it is when that of a closer look is, where a few bad rows are no measure.
        """
        if not self._reasons:
            return
        first = "\n".join(list(self._reasons.values())[:NAMED])
        shares = [(len(self._reasons), self.rows)]
        shares += [share for share in self._closer.values() if share[0] > ALWAYS_ALLOWED]
        bad, rows = max(shares, key=lambda share: share[0] / share[1])
        found = f"{bad} of {rows} rows looked at are bad"
        if bad > self.allowed * rows:
            raise ValueError(
                f"{found}, more than data.bad_rows {self.allowed:g} allows: repair or drop them, "
                f"or raise data.bad_rows; the first of them:\n{first}"
            )
        log.warning("%s; others will be read in their place:\n%s", found, first)


def check_run(config: RunConfig, data: TrainingData, *, thorough: bool) -> None:
    """Look at the data and the evaluation sets before any step, on rank 0.

    ``EVERY_RUN`` says how many rows of each source, ``DRY_RUN`` for a ``thorough`` look, which
    also tells a line on each source.  What is evaluated is read, and some of its images found.

    Raises ``ValueError`` for the first bad row or image (with ``data.bad_rows``: too many of them)
    or evaluation set.
    """
    comm.decide(lambda: _check_run(config, data, thorough))


def _check_run(config: RunConfig, data: TrainingData, thorough: bool) -> None:
    if thorough:
        log.info("the config of this run:\n%s", dump(config).rstrip())
    looks = DRY_RUN if thorough else EVERY_RUN
    bad, tasks = BadRows(config.data.bad_rows), set()
    for name, reader in data.sources.readers.items():
        if config.data.format == "builtin":
            looks = replace(looks, built=GENERATED)
        longest = _look_at(name, reader, data.collator, looks, bad, tasks)
        budget = config.chunk.tokens
        if budget and budget != "auto" and longest > budget:
            log.warning(
                "source %s: a sample of %d tokens is above chunk.tokens %d and goes alone",
                name, longest, budget,
            )  # fmt: skip
        if not thorough and looks.found < len(reader) and config.data.format != "builtin":
            log.info(
                "source %s: %d of %d rows were looked at (--dry-run looks at more)",
                name, looks.found, len(reader),
            )  # fmt: skip
        if thorough:
            words = "source %s: %d of %d rows looked at, up to %d tokens in a sample"
            log.info(words, name, min(looks.built, len(reader)), len(reader), longest)
    bad.judge()
    check_tasks(config, tasks)
    check_evaluation(config, data.collator, thorough)
    if thorough:
        log.info("%s", arithmetic(config, data))


def _look_at(
    name: str, reader: Sequence, collator: Collator, looks: Looks, bad: BadRows, tasks: set[str]
) -> int:
    """The tokens of the longest sample that was made; ``tasks`` takes those of the good rows."""
    built = _spread(looks.built, len(reader))
    found = [built[at] for at in _spread(looks.found, len(built))]
    decoded = {found[at] for at in _spread(looks.decoded, len(found))}
    sizes = [0]

    def texts(row: int) -> None:
        record = reader[row]
        check_texts(record, collator.processing)
        tasks.add(getattr(record, "task", ""))

    def samples(row: int) -> None:
        sizes.append(int(collator([reader[row]]).sizes_B.max()))

    bad.look(name, built, texts)
    bad.look(name, found, lambda row: check_pictures(reader[row], decoded=row in decoded), "found")
    some = [built[at] for at in _spread(looks.collated, len(built))]
    bad.look(name, some, samples, "collated")
    return max(sizes)


def _spread(count: int, length: int) -> list[int]:
    count = min(count, length)
    return [i * length // count for i in range(count)]


def check_tasks(config: RunConfig, seen: set[str]) -> None:
    """Raise ``ValueError`` for a temperature of a task that none of the rows has."""
    if config.objective == "match":
        for name in config.match.task_temperature:
            if name not in seen:
                raise ValueError(
                    f"match.task_temperature: no task {name!r} in the rows looked at, which have "
                    f"{', '.join(sorted(seen)[:20])}"
                )


def check_texts(record: Pair | Dialogue, processing: Processing) -> None:
    """Raise ``ValueError``, naming the row, for a text that cannot be taken into a sample."""
    if isinstance(record, Dialogue):
        texts = [
            record.instruction,
            *(text for t in record.turns for text in (t.question, t.answer)),
        ]
    else:
        texts = [side.text for side in (record.query, record.target, *record.negatives)]
    for text in texts:
        with named(record.name):
            processing.check_text(text)


def check_evaluation(config: RunConfig, collator: Collator, thorough: bool) -> None:
    """Read what the run evaluates: its sets, or its questions; ``ValueError`` for what is wrong."""
    if not (config.eval.at_end or config.eval.every):
        return
    check_names(config)
    if config.objective == "compress":
        if config.eval.path:
            questions = bottleneck_questions(config)
            for start in range(0, len(questions), AT_A_TIME):
                collator.dialogues(questions[start : start + AT_A_TIME], prompt_only=True)
            swap_images(questions)
        return
    if config.data.format == "builtin" and not config.eval.root:
        check_place(Path(config.output).parent / "evaluation_sets")
    if config.eval.root:
        tasks = load_tasks(config, Path(config.output))
        further = {*config.eval.along} - {task.name for task in tasks}
        if further:
            tasks += load_tasks(config, Path(config.output), sorted(further))
        for task in tasks:
            check_task(task, collator)
            if thorough:
                log.info("evaluation set %s: %d queries", task.name, len(task.queries))


def check_names(config: RunConfig) -> None:
    """Raise ``ValueError`` for a name in ``eval.sets`` or ``eval.along`` that has no set, or a
    ``checkpoint.best`` that no evaluation on the way gives."""
    root, best = config.eval.root, config.checkpoint.best
    ways = ("/tokens", "/visible", "/blind")
    if config.objective == "compress" and best and not best.endswith(ways):
        raise ValueError(f"checkpoint.best {best!r}: stage 1 measures KIND{', KIND'.join(ways)}")
    if config.objective != "match" or (root is None and config.data.format != "builtin"):
        return
    names = (
        mmeb_eval_sets(root) if root else [f"{task}/{half}" for half in HALVES for task in TASKS]
    )
    for key in ("sets", "along"):
        for name in getattr(config.eval, key):
            if name not in names:
                recipe = f" (eval.{key}=[] takes all)" if root else ""
                raise ValueError(
                    f"eval.{key}: {name!r} is not in {root or 'the built-in data'}{recipe}: it has "
                    f"{', '.join(names)}"
                )
    on_the_way = config.eval.along or config.eval.sets or names
    if best and best not in on_the_way and not best.startswith(("group/", "width/")):
        raise ValueError(
            f"checkpoint.best {best!r} is not measured on the way: there are group/All (and the "
            f"other groups), {', '.join(on_the_way)}"
        )


def check_task(task: RankingTask, collator: Collator) -> None:
    """Look at some queries and candidates: their texts, their images, and a few as in use."""
    for kind, sides in (("query", task.queries), ("candidate", task.pool)):
        for row in _spread(SIDES, len(sides)):
            with named(f"evaluation set {task.name}, {kind} {row}"):
                collator.processing.check_text(sides[row].text)
                for picture in sides[row].images:
                    if isinstance(picture, FilePicture):
                        picture.check_exists()
        for row in _spread(SIDES_COLLATED, len(sides)):
            with named(f"evaluation set {task.name}, {kind} {row}"):
                collator.sides([sides[row]])


def arithmetic(config: RunConfig, data: TrainingData) -> str:
    """One line: samples that the run takes, and how often it sees the data."""
    optim = config.optim
    samples = optim.steps * optim.batch_size
    rows = sum(data.sources.sizes.values())
    return (
        f"arithmetic {optim.steps} steps x {optim.batch_size} = {samples} samples, "
        f"{samples / rows:.2f} passes over {rows} rows"
    )
