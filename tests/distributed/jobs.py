"""Whole commands inside the ranks of a spawned world: train, export, evaluate, encode."""

from __future__ import annotations

from coma_ds import train
from coma_ds.commands.main import dispatch


def run_jobs(jobs: list[list[str]]) -> list[str]:
    """Run command lines in turn; "" or the sentence of the ``ValueError`` of each."""
    said = []
    for command, *argv in jobs:
        try:
            if command == "train.py":
                train.main(argv)
            else:
                assert dispatch([command, *argv]) == 0
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said
