"""Cases with a second copy of the weights in each group of ranks: exact, and what they move."""

from __future__ import annotations

from tests.distributed.exact import run_cases
from tests.distributed.traffic import count


def run_and_count(cases: list[dict]) -> dict[str, dict]:
    """By case: both reports in one."""
    exact, moved = run_cases(cases), count(cases)
    return {name: exact[name] | moved[name] for name in exact}
