"""A few kills at random moments: the short form of ``python -m tests.faults.soak``."""

from __future__ import annotations

import os

from tests.faults.soak import soak


def test_a_run_that_is_killed_ends_as_if_nothing_had_happened(tmp_path):
    seed = int.from_bytes(os.urandom(4), "big")
    report = soak(tmp_path / "soak", steps=20, kills=3, seed=seed)
    assert report["differences"] == [], (seed, report)
    assert report["kills"] >= 2 and report["kills_in_a_save"], (seed, report)
    assert (tmp_path / "soak" / "soak.png").stat().st_size > 5000
