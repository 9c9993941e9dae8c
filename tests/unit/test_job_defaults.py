"""Checkpoints of a job that says nothing of them, and what may be called the best of some."""

from __future__ import annotations

import re

import pytest

from coma_ds.checks import check_names
from coma_ds.config import load_config
from coma_ds.effects import check_effect, in_a_job


@pytest.mark.parametrize(
    "words, every",
    [
        (["optim.steps=120"], 12),
        (["optim.steps=19"], 2),
        (["optim.steps=3"], 1),
        (["checkpoint.every=7"], 7),
    ],
)
def test_a_job_that_says_nothing_of_checkpoints_publishes_some(words, every, monkeypatch):
    """And may keep the best of them."""
    best = ["eval.every=2", "checkpoint.best=group/All"]
    own = load_config("demo-match", words)
    assert in_a_job(own) == own
    monkeypatch.setenv("COMA_DS_CONTROL", "/job")
    assert in_a_job(own).checkpoint.every == every
    check_effect(in_a_job(load_config("demo-match", [*words, *best])), [*words, *best])


@pytest.mark.parametrize(
    "recipe, best, said",
    [
        ("demo-compress", "name/nosuch", "stage 1 measures KIND/tokens, KIND/visible, KIND/blind"),
        ("demo-control", "name/tokens", "is not measured on the way: there are group/All"),
        ("demo-control", "i2i/seen", "is not measured on the way"),  # not among eval.along
    ],
)
def test_a_best_checkpoint_that_nothing_measures(recipe, best, said) -> None:
    words = ["eval.every=2", "checkpoint.every=2", f"checkpoint.best={best}"]
    words += ["eval.along=[name_t2i/seen]"] if "control" in recipe else []
    with pytest.raises(ValueError, match=re.escape(said)):
        check_names(load_config(recipe, words))


@pytest.mark.parametrize("best", ["group/All", "width/8", "name_t2i/seen"])
def test_a_best_checkpoint_that_is_measured(best) -> None:
    words = ["eval.every=2", "checkpoint.every=2", f"checkpoint.best={best}"]
    check_names(load_config("demo-control", [*words, "eval.along=[name_t2i/seen]"]))
