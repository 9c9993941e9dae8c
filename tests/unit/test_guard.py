"""What becomes of steps that go wrong."""

from __future__ import annotations

import json
import math
import random

import pytest

from coma_ds.config import GuardConfig
from coma_ds.guard import ENOUGH, SKIPPED_FILE, WINDOW, Guard

NAN = float("nan")


def fed(guard: Guard, count: int, seed: int = 0) -> Guard:
    noise = random.Random(seed)
    for step in range(count):
        guard.after(step + 1, 2.0 + 0.1 * noise.random(), applied=True, jumped=False, samples=[])
    return guard


class TestJumps:
    def test_far_above_the_last_losses(self):
        guard = fed(Guard(GuardConfig(), None), WINDOW)
        assert not guard.jumps(2.0) and not guard.jumps(2.1) and not guard.jumps(0.1)
        assert guard.jumps(3.0) and not guard.jumps(2.2)

    def test_nothing_is_judged_by_a_few(self):
        guard = fed(Guard(GuardConfig(), None), ENOUGH - 1)
        assert not guard.jumps(100.0)
        fed(guard, 1)
        assert guard.jumps(100.0)

    def test_switched_off_and_not_finite(self):
        assert not fed(Guard(GuardConfig(spike=0.0), None), WINDOW).jumps(100.0)
        guard = fed(Guard(GuardConfig(), None), WINDOW)
        assert not guard.jumps(NAN) and not guard.jumps(math.inf)

    def test_a_jump_does_not_move_the_measure(self):
        guard = fed(Guard(GuardConfig(), None), WINDOW)
        for step in range(WINDOW):
            assert guard.jumps(50.0)
            guard.after(step, 50.0, applied=True, jumped=True, samples=[])

    def test_equal_losses_are_no_trap(self):
        guard = Guard(GuardConfig(), None)
        for step in range(WINDOW):
            guard.after(step, 1.0, applied=True, jumped=False, samples=[])
        assert not guard.jumps(1.05) and guard.jumps(1.2)


class TestSkips:
    def test_too_many_in_a_row_end_the_run(self, tmp_path):
        guard = Guard(GuardConfig(skips_in_a_row=3), tmp_path)
        samples = [["web", 4], ["web", 9]]
        for step in (1, 2):
            guard.after(step, NAN, applied=False, jumped=False, samples=samples)
        guard.after(3, 1.0, applied=True, jumped=False, samples=[])
        for step in (4, 5):
            guard.after(step, NAN, applied=False, jumped=False, samples=samples)
        with pytest.raises(ValueError) as caught:
            guard.after(6, 7.5, applied=False, jumped=True, samples=samples)
        assert str(caught.value).startswith("3 steps in a row were skipped, the last is 6 (loss s")
        assert guard.skipped == 5
        lines = [json.loads(x) for x in (tmp_path / SKIPPED_FILE).read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 4, 5, 6]
        assert lines[0] == {
            "step": 1, "reason": "gradient not finite", "loss": "nan", "samples": samples,
        }  # fmt: skip
        assert lines[-1]["reason"] == "loss spike" and lines[-1]["loss"] == 7.5

    def test_it_is_told(self, tmp_path, caplog):
        guard = Guard(GuardConfig(), None)
        guard.after(4, NAN, applied=False, jumped=False, samples=[])
        assert "step 4 was skipped on every rank" in caplog.text
        fed(guard, WINDOW)
        caplog.clear()
        guard.after(99, 9.0, applied=True, jumped=True, samples=[])
        assert "step 99: its loss 9 is far above the last ones" in caplog.text
        assert "left out" not in caplog.text


def test_it_goes_on_where_it_stood():
    config = GuardConfig(skips_in_a_row=2)
    first = fed(Guard(config, None), 40)
    first.after(41, NAN, applied=False, jumped=False, samples=[])
    second = Guard(config, None)
    second.load(json.loads(json.dumps(first.state())))
    assert second.state() == first.state() and second.skipped == 1
    for loss in (2.05, 2.3, 5.0):
        assert second.jumps(loss) == first.jumps(loss)
    with pytest.raises(ValueError, match="2 steps in a row"):
        second.after(42, NAN, applied=False, jumped=False, samples=[])
