"""The files of a run: dialogues, rejects and settings, and how a later start goes on with them.

Beside ``NAME.jsonl`` stand ``NAME.rejected.jsonl`` (image, reason, detail) and
``NAME.settings.json``, which says what the dialogues came from.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from coma_ds import disk
from coma_ds.manifest import write_atomically
from coma_ds.synthesis.talk import TROUBLE, Outcome

log = logging.getLogger("coma_ds")

HOPELESS = 50  # rejects in a row from the start that end a run
FAILURES = 8  # images in a row that a server fails at: it is the server


class Output:
    """The dialogues at ``path``, to which outcomes are appended.

    Lines that were cut off by a kill are taken away.  ``done`` holds the images that need not be
    asked for again, ``rejected`` the number of rejects by reason.

    Raises:
        ValueError: another name than ``.jsonl``, no such folder, a file that this command did not
            begin or began with other settings, one that cannot be read, or another process writes.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.rejects_path = path.with_suffix(".rejected.jsonl")
        self.settings_path = path.with_suffix(".settings.json")
        self.done: set[str] = set()
        self.written = 0
        self.rejected: Counter[str] = Counter()
        self._files: list[BinaryIO] = []
        self._locked = False
        if path.suffix != ".jsonl":
            raise ValueError(f"--output {path}: expected a name that ends in .jsonl")
        if not path.absolute().parent.is_dir():
            raise ValueError(f"--output {path}: there is no folder {path.absolute().parent}")
        try:
            for each in (path, self.rejects_path):
                self._files.append(each.open("a+b"))
            self._lock()
            self._agree(settings)
            self._read()
        except OSError as error:
            self.close()
            raise ValueError(f"--output {path}: {error.strerror or error}") from None
        except ValueError:
            self.close()
            raise

    def write(self, outcome: Outcome) -> None:
        """Append an outcome; it is in the file, or lost as a whole, whenever the process ends."""
        line = json.dumps(outcome.row()).encode() + b"\n"
        file = self._files[1 if outcome.reason else 0]
        try:
            file.write(line)
            file.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                f"{self.path}: the disk is full ({disk.room(self.path)}); make room and run the "
                "same command again"
            ) from None
        self._count(outcome.image, outcome.reason)

    def close(self) -> None:
        """Close the files.  What was written stays; a file that holds nothing goes."""
        for file in self._files:
            try:
                file.close()
            except OSError:  # a full disk, said before
                pass
        if self._locked:
            held = [path for path in (self.path, self.rejects_path) if _holds(path)]
            for path in {self.path, self.rejects_path} - {*held}:
                path.unlink(missing_ok=True)
            if not held:
                self.settings_path.unlink(missing_ok=True)

    def rejects(self) -> str:
        """The number of rejects, reason by reason, the most frequent first; empty without any."""
        ranked = sorted(self.rejected.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count} {reason}" for reason, count in ranked)

    def _agree(self, settings: dict[str, Any]) -> None:
        """Compare the settings with those that the files were begun with, or write them down."""
        if not _holds(self.path) and not _holds(self.rejects_path):
            write_atomically(self.settings_path, json.dumps(settings, indent=1) + "\n")
            return
        try:
            before = json.loads(self.settings_path.read_text())
            if not isinstance(before, dict):
                raise ValueError
        except (FileNotFoundError, ValueError):
            raise ValueError(
                f"--output {self.path}: it holds something, but {self.settings_path.name}, which "
                "says what that came from, is not there or no JSON object: name another file"
            ) from None
        keys = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        if keys:
            said = (f"{key} was {before.get(key)!r}, now {settings.get(key)!r}" for key in keys)
            raise ValueError(
                f"--output {self.path} was begun with other settings: {'; '.join(said)}; give the "
                "same ones to go on, or name another file"
            )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--output {self.path}: another process is writing it") from None
        except OSError as error:  # a file system without locks
            log.debug("%s is not locked: %s", self.path, error)
        self._locked = True

    def _read(self) -> None:
        for path, file in zip((self.path, self.rejects_path), self._files):
            for number, line in enumerate(_whole_lines(file), start=1):
                try:
                    row = json.loads(line)
                    image, reason = row["image"], row.get("reason", "")
                    self._count(image, reason)
                except (ValueError, TypeError, KeyError, AttributeError):
                    raise ValueError(
                        f"{path} line {number}: not a line of this command; take it out"
                    ) from None

    def _count(self, image: str, reason: str) -> None:
        self.done.add(image)
        if reason:
            self.rejected[reason] += 1
        else:
            self.written += 1


def _holds(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines from the start; a last one without its end is cut off the file."""
    file.seek(0)
    end = 0
    for line in file:
        if not line.endswith(b"\n"):
            file.truncate(end)
            return
        end += len(line)
        yield line


def write_all(outcomes: Iterable[Outcome], output: Output, progress: Callable[[int], Any]) -> None:
    """Write outcomes as they come; ``progress`` is told how many were written.

    An image that a server failed at is a reject where the server answered for others; ``FAILURES``
    in a row, or nothing else, and the run ends without them.

    Raises:
        ValueError: the server failed, or nothing was accepted: of the first ``HOPELESS`` images
            of this run, or of all that the files know.
    """
    failed: list[Outcome] = []
    answered = rejected = 0

    def write(outcome: Outcome) -> None:
        output.write(outcome)
        progress(1)

    for outcome in outcomes:
        if outcome.reason == TROUBLE:
            failed.append(outcome)
            if len(failed) == FAILURES:
                raise ValueError(failed[-1].detail)
            continue
        for each in (*failed, outcome):
            write(each)
        failed.clear()
        answered += 1
        rejected += bool(outcome.reason)
        if rejected == HOPELESS and not output.written:
            raise _nothing_accepted(output, outcome)
    if failed and not answered:
        raise ValueError(failed[-1].detail)
    for outcome in failed:
        write(outcome)
    if output.rejected and not output.written:
        raise _nothing_accepted(output, None)


def _nothing_accepted(output: Output, last: Outcome | None) -> ValueError:
    end = f"; the last one: {last.detail}" if last else ""
    return ValueError(
        f"not one image became a dialogue ({output.rejects()}{end}); {output.rejects_path} lists "
        "them: mend what it says, or choose another model, delete it and run again"
    )
