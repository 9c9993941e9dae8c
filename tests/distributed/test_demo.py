"""The demo in its short form, through the real launcher on two ranks, twice into one folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

ARMS = ("untrained", "match", "control")


@pytest.mark.timeout(900)
def test_the_short_demo_trains_every_arm_and_writes_its_report(tmp_path):
    folder = tmp_path / "runs" / "demo"
    (folder / "match").mkdir(parents=True)
    (folder / "match" / "config.yaml").write_text("recipe: demo-match\n")
    (folder / "match" / "stale.txt").write_text("of an earlier demo")
    began = time.time()
    run = subprocess.run(
        [sys.executable, "-m", "coma_ds.commands.demo", "--short", "--output", str(folder)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert not (folder / "match" / "stale.txt").exists()

    results = {n: json.loads((folder / n / "results.json").read_text()) for n in ARMS}
    assert [results[n]["step"] for n in ARMS] == [0, 2, 2]
    for values in results.values():
        assert values["sets"]["name_t2i/seen"]["candidates"] >= 1000
    for arm in ("match", "control"):
        groups = set(results[arm]["groups"])
        assert groups == {"Cls", "VQA", "Ret", "VG", "IND", "OOD", "All"}
    # both arms learn from the same batches with GradCache under ZeRO-3 on two ranks
    for arm in ("match", "control"):
        mechanics = json.loads((folder / arm / "ds_config.json").read_text())
        assert mechanics["zero_optimization"]["stage"] == 3
        config = yaml.safe_load((folder / arm / "config.yaml").read_text())
        assert config["chunk"]["samples"] * 2 < config["optim"]["batch_size"]
        assert "2 rank(s)" in (folder / "logs" / f"{arm}.txt").read_text()
        assert list((folder / arm / "tensorboard").glob("events.*"))
    # the arms start from different models: stage 1 took place and was read
    first = {
        arm: json.loads((folder / arm / "metrics.jsonl").read_text().splitlines()[0])
        for arm in ("match", "control")
    }
    assert first["match"]["loss"] != first["control"]["loss"]
    bottleneck = json.loads((folder / "compress" / "results.json").read_text())["bottleneck"]
    base = json.loads((folder / "base" / "results.json").read_text())["bottleneck"]
    assert set(bottleneck) == set(base) and len(base) >= 6
    for kind, row in bottleneck.items():
        assert {"tokens", "visible", "blind"} <= set(row)
        assert set(base[kind]) == {"visible", "questions"}

    page = (folder / "report.html").read_text()
    assert "One seed: a demonstration, not evidence." in page and "http" not in page
    with Image.open(folder / "report.png") as picture:
        assert picture.width == 2000
    said = run.stdout
    for phase in ("base", "untrained", "compress", "match", "control", "report"):
        assert f"\n{phase:<11}" in f"\n{said}"
    assert "compress + match" in said and str(folder / "report.html") in said
    assert (folder / "report.html").stat().st_mtime >= began


def test_a_demo_that_is_ended_ends_its_run(tmp_path):
    """A terminated demo leaves no ranks behind: the run is a group that ends with it."""
    mark = tmp_path / "pid"
    script = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"""
import signal, sys
from pathlib import Path
from coma_ds.commands import demo
demo.launch_command = lambda phase: [sys.executable, "-c", {script!r}]
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
Path({str(tmp_path / "logs")!r}).mkdir()
demo.run_phase(demo.Phase("match", "demo-match", "", ()), Path({str(tmp_path)!r}), demo.Console())
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (mark.is_file() and mark.read_text()):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.terminate()
    assert parent.wait(30) == 143
    status = Path(f"/proc/{mark.read_text()}")
    deadline = time.monotonic() + 10
    while status.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists()
