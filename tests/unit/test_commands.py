"""The command line: what it says, what it writes, how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from coma_ds.assessment import evaluate_ranking, format_pixels
from coma_ds.commands import config_command, evaluate_command
from coma_ds.commands.main import COMMANDS, parse, run
from coma_ds.config import RunConfig, dump, load_config
from coma_ds.data.records import RankingTask, Side
from coma_ds.evaluation import GROUPS, group_means
from coma_ds.recipe_files import recipe_names
from coma_ds.run_folder import fingerprint
from tests.distributed.harness import run_world
from tests.folders import base_folder, load, mmeb_folder
from tests.tiny import Flat


def command(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    """``coma-ds ARGV`` as a process."""
    call = [sys.executable, "-m", "coma_ds.commands.main", *argv]
    return subprocess.run(
        call, capture_output=True, text=True, timeout=300, env=os.environ | environment
    )


class TestParser:
    def test_help_is_fast_and_names_every_command(self):
        code = (
            "import sys, time\n"
            "from coma_ds.commands.main import main\n"
            "sys.argv = ['coma-ds', '--help']\n"
            "try: main()\n"
            "except SystemExit as stop: assert stop.code == 0\n"
            "heavy = {'torch', 'transformers', 'numpy', 'deepspeed', 'pyarrow', 'pydantic'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for name in COMMANDS:
            assert any(line.split()[:1] == [name] for line in done.stdout.splitlines())

    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_of_a_command(self, name, capsys):
        with pytest.raises(SystemExit) as stop:
            parse([name, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0
        assert "examples:" in text and COMMANDS[name].__doc__.strip() in text
        assert "local_rank" not in text

    def test_without_a_command(self, capsys):
        assert run([]) == 2
        assert "usage: coma-ds" in capsys.readouterr().out

    def test_version(self, capsys):
        assert run(["--version"]) == 0
        assert capsys.readouterr().out.startswith("coma-ds 0.")

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            (["evaluate"], "the following arguments are required: RUN"),
            (["evaluate", "x", "--nope"], "unknown: --nope; see coma-ds evaluate --help"),
            (["traim"], "invalid choice: 'traim'"),
            (["encode", "m", "--input", "x"], "the following arguments are required: --output"),
        ],
    )
    def test_wrong_use_is_code_2(self, capsys, argv, said):
        with pytest.raises(SystemExit) as stop:
            parse(argv)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err

    def test_launchers_may_put_local_rank_first(self):
        assert parse(["--local_rank=1", "evaluate", "RUN"]).run == "RUN"

    def test_overrides_may_stand_after_options(self):
        args = parse(["config", "optim.lr=1", "--recipe", "demo-match", "optim.steps=3"])
        assert args.overrides == ["optim.lr=1", "optim.steps=3"]
        args = parse(["train", "a=1", "--dry-run", "b=2", "--num", "2"])
        assert (args.overrides, args.rest, args.num) == (["a=1", "b=2"], ["--dry-run"], 2)


class TestConfig:
    def test_prints_what_a_run_would_have(self, capsys, tmp_path):
        assert run(["config", "--recipe", "demo-match", "optim.lr=2e-5"]) == 0
        file = tmp_path / "mine.yaml"
        file.write_text(capsys.readouterr().out)
        assert load_config(str(file)) == load_config("demo-match", ["optim.lr=2e-5"])
        assert load_config(str(file)).optim.lr == 2e-5

    def test_lists_every_recipe_with_its_sentence(self, capsys):
        assert run(["config", "--list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == recipe_names()
        assert all(len(line.split()) > 3 and line.endswith(".") for line in lines)

    def test_head_comment(self):
        text = "# One at 2.5\n# pictures. Two.\nkey: 1\n# three\n"
        assert config_command.head_comment(text) == "One at 2.5 pictures."
        assert config_command.head_comment("key: 1\n") == ""

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            (["--recipe", "demo-mach"], "error: recipe 'demo-mach': did you mean 'demo-match'?"),
            (["optim.lrr=1"], "error: override: unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
            (["optim.steps=x"], "error: optim.steps: "),
            (["steps"], "error: override 'steps': expected KEY=VALUE"),
        ],
    )
    def test_errors_are_one_sentence(self, capsys, argv, said):
        assert run(["config", *argv]) == 2
        seen = capsys.readouterr()
        assert seen.err.startswith(said) and seen.err.count("\n") == 1 and not seen.out

    def test_as_a_process(self):
        done = command("config", "optim.lrr=1")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: override: unknown key")
        assert "Traceback" not in done.stderr


RUN_JOBS = "tests.distributed.jobs:run_jobs"
SMALL = [
    "deepspeed=zero3",
    "model.compression_tokens=4",
    "model.max_length=256",
    "optim.batch_size=8",
    "optim.steps=2",
    "optim.lr=1e-2",
    "chunk.samples=2",
    "data.workers=0",
    "logging.tensorboard=false",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two stages trained by two ranks, exported and evaluated there; what each job said."""
    place = tmp_path_factory.mktemp("runs")
    base = base_folder(place / "base")
    mmeb_folder(place / "mmeb")
    one, two = f"output={place}/one", f"output={place}/two"
    compress = [
        *SMALL, f"model.path={base}", "model.adapter=lora", "checkpoint.every=1",
        "eval.bottleneck_questions=2",
    ]  # fmt: skip
    match = [
        *SMALL, f"init_from={place}/one", "model.adapter=dora", "model.pooling=attention",
        "data.sub_batch=0", f"eval.root={place}/mmeb", f"eval.image_root={place}/mmeb/images",
        "eval.every=0", "eval.batch_size=4", "eval.along=[]",
    ]  # fmt: skip
    again = str(place / "again")
    rows = [{"id": 10 + i, "text": f"thing number {i}" * i, "image": f"{i}.png"} for i in range(9)]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    encode = ["encode", f"{place}/two", "--input", f"{place}/rows.jsonl", "--batch-size", "2"]
    encode += ["--image-root", f"{place}/mmeb/images", "--workers", "0"]
    jobs = [
        ["train.py", "--recipe", "demo-compress", one, *compress],
        ["export", f"{place}/one", "--output", again],
        ["export", f"{place}/one", "--output", f"{place}/first",
         "--checkpoint", f"{place}/one/checkpoints/step-00000001"],
        ["train.py", "--recipe", "demo-match", two, *match],
    ]  # fmt: skip
    assert run_world(2, RUN_JOBS, jobs=jobs) == [[""] * len(jobs)] * 2
    for world in (2, 1):  # ranks that have trained have another F.linear: DeepSpeed's, for good
        jobs = [
            ["evaluate", f"{place}/two", "--output", f"{place}/two-by-{world}.json"],
            ["evaluate", f"{place}/one", "--output", f"{place}/one-by-{world}.json"],
            [*encode, "--output", f"{place}/by-{world}.npy"],
        ]
        more = [
            ["export", f"{place}/one", "--output", f"{place}/alone"],
            ["evaluate", f"{place}/two", "--sets", "find", "--output", f"{place}/find.json"],
            ["evaluate", f"{place}/two", "--sets", "finds", "--output", f"{place}/no.json"],
        ]
        jobs += more if world == 1 else []
        said = run_world(world, RUN_JOBS, jobs=jobs)
        assert [row[:3] for row in said] == [[""] * 3] * world, said
    (place / "said.json").write_text(json.dumps(said[0]))
    return place


class TestExport:
    def test_the_newest_checkpoint_is_the_finished_model(self, runs):
        model, again = runs / "one" / "model", runs / "again"
        names = sorted(p.name for p in model.iterdir())
        assert names == sorted(p.name for p in again.iterdir())
        for name in names:
            assert (model / name).read_bytes() == (again / name).read_bytes(), name

    def test_an_earlier_checkpoint_is_another_model(self, runs):
        last = load_file(runs / "again" / "model.safetensors")
        first = load_file(runs / "first" / "model.safetensors")
        assert set(last) == set(first)
        moved = {n for n in last if not last[n].equal(first[n])}
        table = "model.language_model.embed_tokens.weight"  # its K rows
        assert moved == {n for n in last if n.split(".")[-2] in ("q_proj", "k_proj", "v_proj",
                                                                 "o_proj") and "weight" in n
                         and "visual" not in n} | {table}  # fmt: skip
        assert json.loads((runs / "first" / "coma_ds.json").read_text())["step"] == 1
        assert "1 of 2 steps" in (runs / "first" / "README.md").read_text()

    def test_another_world_size_gives_the_same_model(self, runs):
        said = json.loads((runs / "said.json").read_text())
        assert said[:4] == [""] * 4
        ours, theirs = (load_file(runs / n / "model.safetensors") for n in ("again", "alone"))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)

    def test_errors(self, runs, tmp_path, capsys):
        assert run(["export", str(tmp_path)]) == 2
        assert run(["export", str(runs / "one")]) == 2
        assert run(["export", str(runs / "one"), "--output", str(runs)]) == 2
        (tmp_path / "config.yaml").write_text((runs / "one" / "config.yaml").read_text())
        assert run(["export", str(tmp_path)]) == 2
        assert run(["export", str(tmp_path), "--checkpoint", str(runs / "base")]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[:4] == [
            f"error: {tmp_path} is no run: there is no config.yaml in it",
            f"error: {runs}/one/model is there already: name a new folder with --output",
            f"error: {runs} is there already: name a new folder with --output",
            f"error: {tmp_path} has no checkpoint to export",
        ]
        assert lines[4].startswith(f"error: checkpoint {runs}/base: no readable manifest.json")


class TestEvaluate:
    def test_any_number_of_ranks_gives_the_same_bytes(self, runs):
        for stage in ("one", "two"):
            one, two = (runs / f"{stage}-by-{n}.json" for n in (1, 2))
            assert one.read_bytes() == two.read_bytes()

    def test_the_results_of_the_trainer(self, runs):
        trainer = json.loads((runs / "two" / "results.json").read_text())
        ours = json.loads((runs / "two-by-1.json").read_text())
        assert set(ours) == {"sets", "groups", "root", "weights", "step"}
        assert [ours[key] == trainer[key] for key in ("step", "weights")] == [True, True]
        assert set(ours["sets"]) == {"find", "say"}
        assert ours["root"] == trainer["root"] == str(runs / "mmeb")
        assert ours["sets"]["find"]["candidates"] == 6
        for name, row in ours["sets"].items():  # merged in bf16: a near tie may turn
            assert abs(row["p@1"] - trainer["sets"][name]["p@1"]) <= 1 / row["queries"] + 1e-9
        assert set(ours["groups"]) == {"Ret", "Cls", "IND", "All"} <= {*GROUPS, "IND", "All"}

    def test_stage_one_has_the_bottleneck_table(self, runs):
        table = json.loads((runs / "one-by-1.json").read_text())["bottleneck"]
        assert len(table) > 3
        for row in table.values():
            assert set(row) == {"tokens", "visible", "blind", "questions"}
            assert row["questions"] == 2

    def test_only_some_sets(self, runs):
        assert set(json.loads((runs / "find.json").read_text())["sets"]) == {"find"}
        said = json.loads((runs / "said.json").read_text())
        assert said[4:] == ["", f"evaluation set 'finds' is not in {runs}/mmeb: it has find, say"]
        assert not (runs / "no.json").exists()

    def test_as_a_process_beside_what_the_file_had(self, runs, tmp_path):
        (tmp_path / "model").symlink_to(runs / "two" / "model")
        config = (runs / "two" / "config.yaml").read_text()
        (tmp_path / "config.yaml").write_text(config)
        (tmp_path / "results.json").write_text('{"step": 2, "sets": {"gone": {}}}')
        mmeb = runs / "mmeb"
        argv = ["--root", str(mmeb), "--image-root", str(mmeb / "images"), "--batch-size", "3"]
        done = command("evaluate", str(tmp_path), *argv)
        assert done.returncode == 0, done.stderr
        assert "P@1 in %" in done.stdout and f"-> {tmp_path}/results.json" in done.stdout
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["step"] == 2 and set(results["sets"]) == {"find", "say"}
        assert "Loading" not in done.stderr

    @pytest.mark.parametrize(
        ("argv", "sets", "groups"),
        [
            (["--sets", "c"], {"a": 0.5, "b": 0.25, "c": 1.0},
             {"Cls": 0.5, "Ret": 0.625, "IND": 0.5, "OOD": 0.625, "All": 1.75 / 3}),
            ([], {"c": 1.0}, {"Ret": 1.0, "OOD": 1.0, "All": 1.0}),
        ],
    )  # fmt: skip
    def test_some_sets_stand_beside_the_others(self, tmp_path, monkeypatch, argv, sets, groups):
        """And the means are those of all; without ``--sets`` the table is a new one."""
        rows = {"a": ("Cls", "IND", 0.5), "b": ("Ret", "OOD", 0.25), "c": ("Ret", "OOD", 0.0)}
        keys = ("group", "domain", "p@1")
        before = {"step": 3, "sets": {n: dict(zip(keys, row)) for n, row in rows.items()}}
        (tmp_path / "config.yaml").write_text(dump(load_config("demo-match")))
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
        (tmp_path / "model" / "coma_ds.json").write_text('{"step": 3}')
        before |= {"weights": fingerprint(tmp_path / "model"), "groups": {"All": 0.25}}
        (tmp_path / "results.json").write_text(json.dumps(before))
        asked = []

        def ranking(folder, config, names, device):
            asked.append(names)
            found = {"c": {"group": "Ret", "domain": "OOD", "p@1": 1.0}}
            return {"sets": found, "groups": group_means(found)}, "table"

        monkeypatch.setattr(evaluate_command, "_ranking", ranking)
        monkeypatch.setattr("coma_ds.engine.start", lambda: "cpu")
        monkeypatch.setattr("coma_ds.run.log_to_stderr", lambda main: None)
        assert run(["evaluate", str(tmp_path), *argv]) == 0
        assert asked == [argv[1:]]
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["step"] == 3
        assert {name: row["p@1"] for name, row in results["sets"].items()} == sets
        assert results["groups"] == pytest.approx(groups)

    def test_errors(self, runs, tmp_path, capsys):
        assert run(["evaluate", str(tmp_path)]) == 2
        assert run(["evaluate", str(runs / "one"), "--sets", "x"]) == 2
        assert run(["evaluate", str(runs / "two"), "--batch-size", "0"]) == 2
        (tmp_path / "config.yaml").write_text((runs / "two" / "config.yaml").read_text())
        assert run(["evaluate", str(tmp_path)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == f"error: {tmp_path} is no run: there is no config.yaml in it"
        assert lines[1].endswith("stage 1, which has no ranking sets: leave --sets and --root out")
        assert lines[2].startswith("error: eval.batch_size: ")
        assert lines[3] == (
            f"error: {tmp_path} has no model/: the run is not finished; "
            "coma-ds export writes it from the newest checkpoint"
        )

    def test_raw_pixels_stand_beside_the_built_in_image_sets(self, tmp_path, monkeypatch):
        model, processing = load(base_folder(tmp_path / "base"))
        colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]

        def side(colour, name):
            stripes = Stripes(name, colour)
            return Side("<|image_1|>", (stripes,))

        queries = [side(c, f"q{c}") for c in colours]
        pool = [side(c, f"p{c}") for c in colours]
        places = [np.array([i, *[k for k in range(3) if k != i]]) for i in range(3)]
        wrong = [np.array([(i + 1) % 3, i]) for i in range(3)]
        tasks = [
            RankingTask("i2i/seen", "Ret", "IND", queries, pool, places),
            RankingTask("i2i_style/unseen", "Ret", "OOD", queries, pool, wrong),
            RankingTask("name_t2i/seen", "Ret", "IND", [Side("x")] * 3, pool, places),
        ]
        from coma_ds.data.collate import Collator

        model.eval()
        config = RunConfig(objective="match", data={"workers": 0})
        results = evaluate_ranking(model, Collator(processing), tasks, config, "cpu")
        sets = results["sets"]
        assert sets["i2i/seen"]["pixel_p@1"] == 1.0
        assert sets["i2i_style/unseen"]["pixel_p@1"] == 0.0
        assert "pixel_p@1" not in sets["name_t2i/seen"]
        assert "i2i/seen 100.0 (model " in format_pixels(results)
        own = config.model_copy(update={"eval": config.eval.model_copy(update={"root": "x"})})
        results = evaluate_ranking(model, Collator(processing), tasks, own, "cpu")
        assert not any("pixel_p@1" in row for row in results["sets"].values())
        assert format_pixels(results) == "" and results["root"] == "x"  # a name on the hub
        monkeypatch.chdir(tmp_path)
        Path("x").mkdir()
        results = evaluate_ranking(model, Collator(processing), tasks[:1], own, "cpu")
        assert results["root"] == f"{tmp_path}/x"


class Stripes(Flat):
    """The left half coloured, the right half white."""

    def open(self):
        image = Image.new("RGB", (64, 64), "white")
        image.paste(self.colour, (0, 0, 32, 64))
        return image


def test_ranks_share_the_work_of_encode(runs):
    one, two = np.load(runs / "by-1.npy"), np.load(runs / "by-2.npy")
    assert one.shape == (9, 64) and np.array_equal(one, two)


def test_a_fault_of_a_library_keeps_its_trace(monkeypatch, capsys):
    def own(_):
        raise ValueError("wrong key")

    monkeypatch.setattr(config_command, "execute", lambda _: np.zeros(3).reshape(2))
    with pytest.raises(ValueError, match=r"cannot reshape"):
        run(["config"])
    own.__globals__["__name__"], before = "coma_ds.x", own.__globals__["__name__"]
    try:
        monkeypatch.setattr(config_command, "execute", own)
        assert run(["config"]) == 2
    finally:
        own.__globals__["__name__"] = before
    assert capsys.readouterr().err == "error: wrong key\n"
