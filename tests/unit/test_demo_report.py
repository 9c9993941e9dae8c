"""The demo as a user sees it: its plan, its console, what it finds, the page and the picture."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from coma_ds.commands import demo
from coma_ds.commands.demo_figure import ticks
from coma_ds.commands.demo_findings import CAVEAT, MARK, collect, percent, terminal_table
from coma_ds.commands.demo_report import render, write_report
from coma_ds.config import dump, load_config

COUNT = 20  # drawings of the made-up set
KINDS = {"name": (0.08, 0.12, 0.01, 0.15), "colour": (0.6, 0.7, 0.1, 0.75)}
ARMS = {"untrained": 0.1, "control": 0.5, "match": 0.55}


def set_row(p, group="Ret", domain="IND", chance=1 / COUNT):
    return {
        "p@1": p, "recall@5": 0.9, "recall@10": 1.0, "queries": COUNT, "candidates": COUNT,
        "chance": chance, "ties": 0, "group": group, "domain": domain,
    }  # fmt: skip


def write_sets(root):
    """name_t2i/seen in the layout of MMEB-eval: query i asks for picture i of colour i."""
    (root / "images").mkdir(parents=True)
    paths = [f"{i}.png" for i in range(COUNT)]
    for i, path in enumerate(paths):
        Image.new("RGB", (16, 16), (10 * i, 90, 200)).save(root / "images" / path)
    own = [[paths[i], *(p for p in paths if p != paths[i])] for i in range(COUNT)]
    folder = root / "name_t2i" / "seen"
    folder.mkdir(parents=True)
    table = {
        "qry_text": [f"Find a picture of: thing <{i}>" for i in range(COUNT)],
        "qry_img_path": [""] * COUNT,
        "tgt_text": [[""] * COUNT] * COUNT,
        "tgt_img_path": own,
    }
    pq.write_table(pa.table(table), folder / "test-00000-of-00001.parquet")
    index = [{"name": "name_t2i/seen", "group": "Ret", "domain": "IND"}]
    (root / "sets.json").write_text(json.dumps(index))


def write_run(folder, recipe, results, lines, init_from=None):
    folder.mkdir(parents=True)
    config = load_config(recipe, [f"init_from={init_from or 'null'}"])
    (folder / "config.yaml").write_text(dump(config))
    (folder / "versions.txt").write_text("python 3.11\ntorch 2.13.0\nflash-attn -\n")
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def curve(steps, final, seconds):
    lines = []
    for step in range(1, steps + 1):
        at = seconds * step / steps
        lines.append({"step": step, "group": "train", "loss": 5.0 / step, "training_seconds": at})
        value = final * step / steps
        point = {"step": step, "group": "eval", "name_t2i/seen": value, "training_seconds": at}
        lines.append(point)
    return lines


@pytest.fixture
def demo_folder(tmp_path):
    """A finished demo with made-up figures: control 100 s, compress 60 s, match 90 s."""
    folder = tmp_path / "demo"
    write_sets(folder / "evaluation_sets")
    times = {"untrained": 0.0, "control": 100.0, "match": 90.0}
    for arm, p in ARMS.items():
        sets = {
            "name_t2i/seen": set_row(p),
            "name_t2i/unseen": set_row(p / 2, domain="OOD"),
            "i2i/seen": set_row(p / 5) | {"pixel_p@1": 0.321},
        }
        steps = 0 if arm == "untrained" else 4
        results = {"step": steps, "training_seconds": times[arm], "sets": sets}
        recipe = "demo-match" if arm == "match" else "demo-control"
        start = "somewhere/compress" if arm == "match" else None
        write_run(folder / arm, recipe, results, curve(steps, p, times[arm]), start)
        found = []
        for query in (2, 5, 11):
            gold_is_there = (query + len(arm)) % 2 == 0
            near = [query, 1, 3, 4, 6] if gold_is_there else [0, 1, 3, 4, 6]
            found.append({
                "query": query, "text": f"Find a picture of: thing <{query}>",
                "rank": 0 if gold_is_there else 8, "gold": query, "nearest": near,
                "scores": [0.9, 0.8, 0.7, 0.6, 0.5],
            })  # fmt: skip
        (folder / arm / "neighbours.json").write_text(json.dumps({"name_t2i/seen": found}))
    ways = {
        kind: {"tokens": t, "visible": v, "blind": b, "questions": 50}
        for kind, (t, v, b, _) in KINDS.items()
    }
    results = {"step": 3, "training_seconds": 60.0, "bottleneck": ways}
    lines = [x for x in curve(3, 1.0, 60.0) if x["group"] == "train"]
    write_run(folder / "compress", "demo-compress", results, lines)
    base = {k: {"visible": v[3], "questions": 50} for k, v in KINDS.items()}
    results = {"step": 0, "training_seconds": 0.0, "bottleneck": base}
    write_run(folder / "base", "demo-base", results, [])
    model = folder / "match" / "model"
    model.mkdir()
    save_file({"a": torch.zeros(1000, 700), "b": torch.zeros(7)}, model / "model.safetensors")
    (model / "coma_ds.json").write_text(json.dumps({"compression_tokens": 8}))
    names = ("base", "untrained", "compress", "match", "control")
    phases = [{"name": n, "recipe": f"demo-{n}", "seconds": 12.3} for n in names]
    (folder / MARK).write_text(json.dumps({"length": "standard", "phases": phases}))
    return folder


def test_the_seconds_of_compress_and_match_count_both_stages(demo_folder):
    findings = collect(demo_folder)
    assert findings.seconds["compress + match"] == 150.0
    assert findings.seconds["match only (control)"] == 100.0
    assert findings.seconds["untrained base"] == 0.0 and findings.seconds["chance"] is None
    assert findings.precision["match"].seconds == [82.5, 105.0, 127.5, 150.0]
    # the untrained base is where the control starts
    assert findings.precision["control"].steps == [0, 1, 2, 3, 4]
    assert findings.precision["control"].values[0] == ARMS["untrained"]


def test_the_headline_has_every_arm_and_chance(demo_folder):
    findings = collect(demo_folder)
    assert list(findings.headline) == [
        "chance", "untrained base", "match only (control)", "compress + match",
    ]  # fmt: skip
    columns = findings.columns
    assert columns == [
        "name_t2i/seen", "name_t2i/unseen", "Cls", "VQA", "Ret", "VG", "IND", "OOD", "All",
    ]  # fmt: skip
    ours = dict(zip(columns, findings.headline["compress + match"]))
    assert ours["name_t2i/seen"] == 0.55 and ours["Cls"] is None
    assert ours["All"] == pytest.approx((0.55 + 0.275 + 0.11) / 3)


def test_means_over_other_sets_are_not_shown(demo_folder):
    file = demo_folder / "untrained" / "results.json"
    results = json.loads(file.read_text())
    del results["sets"]["i2i/seen"]
    file.write_text(json.dumps(results))
    findings = collect(demo_folder)
    row = dict(zip(findings.columns, findings.headline["untrained base"]))
    assert row["name_t2i/seen"] == 0.1 and row["All"] is None and row["Ret"] is None
    write_report(findings, demo_folder)
    assert findings.headline["chance"][0] == 1 / COUNT
    assert findings.parameters == 700_007 and findings.tokens == 8
    assert findings.pixels["raw pixels"] == [0.321, None]


def test_the_remarks_say_at_equal_what(demo_folder):
    equal_steps, equal_time, tokens = collect(demo_folder).remarks
    assert "At equal contrastive steps (4)" in equal_steps
    assert "55.0 % with compress and 50.0 % without, a difference of +5.0" in equal_steps
    # after 100 s of its 150 s, compress + match had been evaluated at 82.5 s, one step in
    assert "the 100 s of the control" in equal_time and "13.8 % after 1 match" in equal_time
    assert "2 of 2 kinds" in tokens


def test_a_difference_has_the_decimals_of_its_figures(demo_folder):
    path = demo_folder / "match" / "results.json"
    results = json.loads(path.read_text())
    results["sets"]["name_t2i/seen"]["p@1"] = 0.0085
    path.write_text(json.dumps(results))
    assert (
        "0.85 % with compress and 50.0 % without, a difference of -49.15"
        in (collect(demo_folder).remarks[0])
    )


def test_an_arm_that_had_not_begun_to_match_is_said(demo_folder):
    path = demo_folder / "compress" / "results.json"
    results = json.loads(path.read_text()) | {"training_seconds": 300.0}
    path.write_text(json.dumps(results))
    assert "had not been evaluated yet" in collect(demo_folder).remarks[1]
    assert "300 s on stage 1" in collect(demo_folder).remarks[1]


def test_a_demo_that_did_not_end_is_refused(demo_folder):
    (demo_folder / "control" / "results.json").unlink()
    with pytest.raises(ValueError, match=r"control/results.json is missing: run the demo to its"):
        collect(demo_folder)


class Page(HTMLParser):
    """Balanced tags, and everything that the page would have to fetch."""

    VOID = ("meta", "img", "br", "wbr", "link", "input")

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.gold, self.images, self.text = [], [], 0, [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "link", "iframe", "object"):
            self.fetched.append(tag)
        for key in ("src", "href", "xlink:href", "srcset", "poster"):
            if key in attrs and not attrs[key].startswith("data:"):
                self.fetched.append(attrs[key])
        if tag == "img":
            self.images.append(attrs["src"])
            self.gold += attrs.get("class") == "gold"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_fetches_nothing(demo_folder):
    text = render(collect(demo_folder))
    page = Page()
    page.feed(text)
    assert not page.open and not page.fetched
    assert "http" not in text and "url(" not in text and "@import" not in text and "$" not in text
    shown = " ".join(" ".join(page.text).split())
    for what in (CAVEAT, "compress + match", "150 s", "55.0", "chance", "<11>", "32.1", "0.7 mil"):
        assert what in shown
    assert "--host 127.0.0.1" in shown
    assert page.text.count("<2>") == 1  # escaped, and without the words all queries begin with
    golds = sum(
        i["gold"] in i["nearest"]
        for arm in ("control", "match")
        for i in neighbours_of(demo_folder, arm)
    )
    assert page.gold == golds > 0
    assert len(page.images) == 3 * (1 + 2 * 5)
    image = Image.open(io.BytesIO(base64.b64decode(page.images[0].partition(",")[2])))
    assert abs(np.asarray(image.convert("RGB"), int)[8, 8] - [20, 90, 200]).max() < 4
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ET.fromstring(svg)


def neighbours_of(folder, arm):
    return json.loads((folder / arm / "neighbours.json").read_text())["name_t2i/seen"]


def test_the_picture_shows_the_same(demo_folder):
    paths = write_report(collect(demo_folder), demo_folder)
    assert [path.name for path in paths] == ["report.html", "report.png"]
    with Image.open(paths[1]) as picture:
        width, height = picture.size
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    assert width == 2000 and 1500 < height < 6000
    for colour in ((29, 106, 134), (196, 117, 46), (15, 138, 95)):  # both arms, the gold frames
        assert (abs(pixels - colour).max(1) <= 3).sum() > 200
    assert (abs(pixels - [110, 90, 200]).max(1) <= 6).sum() > 1000  # picture 11


def test_the_terminal_table_is_aligned(demo_folder):
    lines = terminal_table(collect(demo_folder)).split("\n")
    assert lines[-1] == CAVEAT and len({len(line) for line in lines[:-1]}) == 1
    assert lines[4].split()[-4:] == ["27.5", "31.2", "150", "s"]


def test_figures_below_one_percent_keep_two_decimals():
    assert [percent(v) for v in (None, 0.0, 0.0007, 0.00994, 0.01, 0.1234, 1.0)] == [
        "-", "0.0", "0.07", "0.99", "1.0", "12.3", "100.0",
    ]  # fmt: skip


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4), st.integers(2, 8))
def test_ticks_cover_the_values_with_few_round_numbers(low, span, count):
    marks = ticks(low, low + span, count)
    slack = 1e-5 * (span + abs(low))
    assert marks[0] <= low + slack and marks[-1] >= low + span - slack
    assert 2 <= len(marks) <= count + 2
    steps = np.diff(marks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("length", list(demo.LENGTHS))
def test_every_phase_is_a_config_and_the_arms_differ_in_stage_one_alone(length, tmp_path):
    folder = tmp_path / "with space: and colon"
    phases = {p.name: p for p in demo.plan(length, folder, "pretrained")}
    configs = {n: load_config(p.recipe, list(p.overrides)) for n, p in phases.items()}
    assert list(phases) == ["base", "untrained", "compress", "match", "control"]
    for name, config in configs.items():
        assert config.output == str(folder / name)
        assert config.checkpoint.resume == "none"
    assert configs["base"].optim.steps == configs["untrained"].optim.steps == 0
    assert configs["match"].init_from == configs["compress"].output
    assert configs["control"].init_from is None

    def less(config, *aside):
        tree = config.model_dump(exclude={"recipe", "output", "init_from"})
        for section, key in aside:
            del tree[section][key]
        return tree

    assert less(configs["match"]) == less(configs["control"])
    apart = (("optim", "steps"), ("eval", "sets"))
    assert less(configs["untrained"], *apart) == less(configs["control"], *apart)
    assert demo.MEASURED in configs["untrained"].eval.sets
    asked = {configs[n].eval.bottleneck_questions for n in ("base", "compress")}
    assert len(asked) == 1


def test_random_weights_reach_all_that_starts_from_the_base(tmp_path):
    for phase in demo.plan("short", tmp_path, "random"):
        config = load_config(phase.recipe, list(phase.overrides))
        expected = "pretrained" if phase.name == "match" else "random"
        assert config.model.weights == expected


def test_an_earlier_demo_is_removed_and_nothing_else(demo_folder):
    (demo_folder / "mine.txt").write_text("mine")
    (demo_folder / "report.html").write_text("old")
    demo.clear(demo_folder, demo.plan("standard", demo_folder, "pretrained"))
    assert [path.name for path in demo_folder.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("what", ["another recipe", "checkpoints", "no run"])
def test_what_is_not_the_demos_is_refused_and_kept(demo_folder, what):
    run = demo_folder / "compress"
    if what == "another recipe":
        (run / "config.yaml").write_text("recipe: mine\n")
    elif what == "checkpoints":
        (run / "checkpoints").mkdir()
    else:
        (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"compress is not a demo-compress run of the demo: move"):
        demo.clear(demo_folder, demo.plan("standard", demo_folder, "pretrained"))
    assert (run / "results.json").is_file() and (demo_folder / "match").is_dir()


def child(monkeypatch, tmp_path, script):
    """Run a phase whose launcher is ``script``."""
    monkeypatch.setattr(demo, "launch_command", lambda phase: [sys.executable, "-c", script])
    (tmp_path / "logs").mkdir()
    phase = demo.Phase("match", "demo-match", "stage 2", ())
    return demo.run_phase(phase, tmp_path, demo.Console())


NOISE = "print('[2026-01-01 00:00:00,000] [INFO] [launch.py:1:main] exits')"


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("print('error: lr is bad'); print('later'); raise SystemExit(3)", 3, "error: lr is bad"),
        ("import os; print('so far'); os.kill(os.getpid(), 9)", 137, "so far"),
        ("print('so far')", 1, "so far"),  # a launcher that says 0 without a result
    ],
)
def test_a_child_that_fails_ends_the_demo(monkeypatch, tmp_path, capsys, end, code, message):
    script = f"import sys; sys.stdout.reconfigure(line_buffering=True); {NOISE}; {end}"
    if code == 1:
        script += f"; {NOISE}"
    with pytest.raises(SystemExit) as stop:
        child(monkeypatch, tmp_path, script)
    assert stop.value.code == code
    shown = capsys.readouterr().out
    assert f"match failed (code {code}): {message}\n" in shown
    assert str(tmp_path / "logs" / "match.txt") in shown
    assert "exits" in (tmp_path / "logs" / "match.txt").read_text()


def test_a_child_that_ends_well_is_timed_and_its_quarters_are_said(monkeypatch, tmp_path, capsys):
    (tmp_path / "match").mkdir()
    (tmp_path / "match" / "results.json").write_text("{}")
    lines = [f"step {i}/20  loss {i / 10:.1f}" for i in range(1, 21)]
    seconds = child(monkeypatch, tmp_path, f"print({chr(10).join(lines)!r})")
    assert 0 < seconds < 30
    said = re.findall(r"step (\d+)/20  loss", capsys.readouterr().out)
    assert said == ["5", "10", "15", "20"]


def test_the_launcher_is_that_of_this_python_on_a_free_port(tmp_path):
    phase = demo.plan("short", tmp_path, "random")[0]
    command, again = demo.launch_command(phase), demo.launch_command(phase)
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert command[3] in ("--num_accelerators", "--num_gpus")
    script = command.index("--recipe") - 1
    assert command[script].endswith("train.py") and command[script + 2] == "demo-base"
    ports = {c[c.index("--master_port") + 1] for c in (command, again)}
    assert all(1024 < int(port) < 65536 for port in ports)
