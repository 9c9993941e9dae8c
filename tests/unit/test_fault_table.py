"""docs/faults.md names tests that exist."""

from __future__ import annotations

import ast
import re

import pytest

from tests.distributed.launched import ROOT

TABLE = (ROOT / "docs" / "faults.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TABLE)


def test_there_are_many():
    assert len(NAMED) > 20
    rows = [line for line in TABLE.splitlines() if line.startswith("| ")]
    heads = sum(row.startswith("| fault |") for row in rows)
    told = [row for row in rows if "tests/" in row or row.endswith(" the same |")]
    assert len(told) == len(rows) - heads


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_the_test_exists(file, test):
    tree = ast.parse((ROOT / file).read_text())
    names = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert (test in names) if test else any(name.startswith("test_") for name in names)
