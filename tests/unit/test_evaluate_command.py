"""``coma-ds evaluate`` on data that the run does not know (more of it: test_commands.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coma_ds.commands import evaluate_command
from coma_ds.commands.main import run
from coma_ds.config import dump, load_config
from coma_ds.evaluation import group_means
from coma_ds.run_folder import fingerprint, forget_results


@pytest.fixture
def asked(tmp_path, monkeypatch) -> list:
    """What a finished run in ``tmp_path`` is asked to measure; each set named has P@1 1."""
    (tmp_path / "config.yaml").write_text(
        dump(load_config("demo-match", ["eval.sets=[name_t2i/seen]"]))
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "coma_ds.json").write_text('{"step": 4}')
    seen = []

    def ranking(folder, config, names, device):
        seen.append((config.eval.root, config.eval.sets))
        found = {name: {"group": "Ret", "domain": "OOD", "p@1": 1.0} for name in names or ["c"]}
        return {"sets": found, "groups": group_means(found), "root": config.eval.root}, "table"

    monkeypatch.setattr(evaluate_command, "_ranking", ranking)
    monkeypatch.setattr("coma_ds.engine.start", lambda: "cpu")
    monkeypatch.setattr("coma_ds.run.log_to_stderr", lambda main: None)
    return seen


def test_another_root_has_other_sets(tmp_path, asked):
    """``eval.sets`` of the run name sets of its own data."""
    assert run(["evaluate", str(tmp_path), "--root", "/other"]) == 0
    assert run(["evaluate", str(tmp_path)]) == 0
    assert asked == [("/other", ()), (None, ("name_t2i/seen",))]


def test_sets_of_two_roots_are_not_averaged(tmp_path, asked, capsys):
    def sets(*words: str) -> list[str]:
        assert run(["evaluate", str(tmp_path), *words]) == 0
        return list(json.loads((tmp_path / "results.json").read_text())["sets"])

    assert sets("--root", "/one", "--sets", "a", "b") == ["a", "b"]
    assert sets("--root", "/one", "--sets", "b", "d") == ["a", "b", "d"]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith("results.json, beside 1 measured before: P@1 100.0 % over all")
    assert sets("--root", "/two", "--sets", "e") == ["e"]
    assert sets("--sets", "f") == ["f"]
    assert "beside" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["results.json", "both.json"])
def test_sets_of_two_models_are_not_averaged(tmp_path, asked, name):
    def sets(*words: str) -> list[str]:
        assert run(["evaluate", *words, "--output", str(tmp_path / name)]) == 0
        return list(json.loads((tmp_path / name).read_text())["sets"])

    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"a" * 3_000_000)
    (tmp_path / "moved").symlink_to(tmp_path)
    assert sets(str(tmp_path), "--sets", "a") == ["a"]
    assert sets(f"{tmp_path}/moved", "--sets", "b") == ["a", "b"]
    weights.write_bytes(b"a" * 1_000_000 + b"b" * 2_000_000)  # trained again, to the same step
    assert sets(str(tmp_path), "--sets", "c") == ["c"]
    assert json.loads((tmp_path / name).read_text())["step"] == 4


def test_what_the_trainer_measured_stays(tmp_path, asked):
    """Also where its file is named."""
    row = {"group": "Ret", "domain": "OOD", "p@1": 0.0}
    mine = {"sets": {"a": row}, "root": None, "weights": fingerprint(tmp_path / "model")}
    for words in ([], ["--output", f"{tmp_path}/results.json"]):
        (tmp_path / "results.json").write_text(json.dumps(mine | {"training_seconds": 7.5}))
        assert run(["evaluate", str(tmp_path), "--sets", "b", *words]) == 0
        found = json.loads((tmp_path / "results.json").read_text())
        assert set(found["sets"]) == {"a", "b"} and found["training_seconds"] == 7.5
        assert found["groups"]["All"] == 0.5


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none/x.json", None, "x.json cannot be: {}/none is no folder; --output names a file"),
        ("model", None, "model is a folder; --output names a file"),
        ("x.json", "{", "x.json holds no results (Expecting property name"),
        ("x.json", "[1]", "x.json holds no results: name another --output"),
        ("model/config.json", None, "config.json holds no results: name another --output"),
    ],
)
def test_a_bad_output_is_told_before_the_work(tmp_path, asked, capsys, name, text, said):
    if text:
        (tmp_path / name).write_text(text)
    assert run(["evaluate", str(tmp_path), "--output", f"{tmp_path}/{name}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said.format(tmp_path) in error and not asked


def test_a_read_only_place_is_told_before_the_work(tmp_path, asked, capsys, monkeypatch):
    """Root may write anywhere but on a file system that is read-only, as ``access`` says."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert run(["evaluate", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "results.json cannot be written" in said and "is read-only here" in said and not asked


@pytest.mark.parametrize(
    ("text", "stays"),
    [('{"step": 4}', True), ('{"step": 3}', False), ("{}", False), ("{", False), ("[]", False)],
)
def test_results_of_another_step_do_not_outlive_its_model(tmp_path: Path, text: str, stays: bool):
    forget_results(tmp_path, 4)
    (tmp_path / "results.json").write_text(text)
    (tmp_path / "neighbours.json").write_text("{}")
    (tmp_path / "model").mkdir()
    forget_results(tmp_path, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"model"} | (
        {"results.json", "neighbours.json"} if stays else set()
    )
