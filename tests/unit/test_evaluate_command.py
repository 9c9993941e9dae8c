"""``coma-ds evaluate`` on data that the run does not know (more of it: test_commands.py)."""

from __future__ import annotations

from coma_ds.commands import evaluate_command
from coma_ds.commands.main import run
from coma_ds.config import dump, load_config


def test_another_root_has_other_sets(tmp_path, monkeypatch):
    """``eval.sets`` of the run name sets of its own data."""
    (tmp_path / "config.yaml").write_text(
        dump(load_config("demo-match", ["eval.sets=[name_t2i/seen]"]))
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    seen = []

    def ranking(folder, config, names, device):
        seen.append((config.eval.root, config.eval.sets))
        return {"sets": {}, "groups": {}}, "table"

    monkeypatch.setattr(evaluate_command, "_ranking", ranking)
    monkeypatch.setattr("coma_ds.engine.start", lambda: "cpu")
    monkeypatch.setattr("coma_ds.run.log_to_stderr", lambda main: None)
    assert run(["evaluate", str(tmp_path), "--root", "/other"]) == 0
    assert run(["evaluate", str(tmp_path)]) == 0
    assert seen == [("/other", ()), (None, ("name_t2i/seen",))]
