"""What a start goes on from: the first of a job, the later ones, and one sent back on purpose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coma_ds.manifest import published, step_name
from coma_ds.ownership import read_owner, take, this_start
from coma_ds.run import Run
from coma_ds.run_folder import is_finished, settled
from coma_ds.stopping import Finished, Stopped
from tests.unit.test_run_folder import START, Shards, config_of, put_checkpoint

OWN = ("logging.tensorboard=false", "logging.progress=false")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """The log stays with pytest."""
    monkeypatch.setattr("coma_ds.run.log_to_stderr", lambda main: None)


def config(folder: Path, *overrides: str):
    return config_of(folder, *START, *OWN, *overrides)


def put(folder: Path, *steps: int) -> list[Path]:
    """Checkpoints of these steps, and the lines of six steps."""
    paths = [put_checkpoint(folder, step, config(folder)) for step in steps]
    for name in ("metrics.jsonl", "skipped.jsonl"):
        lines = [json.dumps({"step": step, "group": "train"}) for step in range(1, 7)]
        (folder / name).write_text("\n".join(lines) + "\n")
    (folder / "model").mkdir(exist_ok=True)
    (folder / "results.json").write_text("{}")
    return paths


def begin(folder: Path, *overrides: str) -> tuple[int, Shards]:
    engine = Shards()
    return Run(settled(config(folder, *overrides))).resume(engine), engine


def names(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in published(folder)]


def lines(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


class TestAJobThatIsStartedAgain:
    @pytest.fixture(autouse=True)
    def job(self, monkeypatch):
        monkeypatch.setenv("SLURM_JOB_ID", "12")

    @pytest.mark.parametrize("resume", ["none", "path"])
    def test_goes_on_from_its_own_checkpoints(self, tmp_path, monkeypatch, caplog, resume):
        folder = tmp_path / "run"
        (elsewhere,) = put(tmp_path / "other", 1)
        put(folder, 4)  # of an earlier run
        how = f"checkpoint.resume={'none' if resume == 'none' else elsewhere}"
        first = 0 if resume == "none" else 1
        assert begin(folder, how)[0] == first
        assert names(folder / "checkpoints-1") == [4]
        put(folder, 2, 3)
        for restart in (1, 2):
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
            step, engine = begin(folder, how)
            assert step == 3 and engine.loaded == [(folder / "checkpoints", step_name(3))]
            assert f"{how} was for the first start of this job" in caplog.text
        assert names(folder / "checkpoints") == [3, 2]
        monkeypatch.setenv("SLURM_JOB_ID", "13")  # a new job is a new start
        monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
        assert begin(folder, how)[0] == first
        assert names(folder / "checkpoints-2") == [3, 2]

    def test_goes_back_again_until_it_has_a_checkpoint_of_its_own(self, tmp_path, monkeypatch):
        """The one that it was sent back to and those before it are of another config."""
        folder = tmp_path / "run"
        (_, earlier, _) = put(folder, 1, 2, 4)
        how = [f"checkpoint.resume={earlier}", "seed=7"]
        for restart in (0, 1):
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
            assert begin(folder, *how)[0] == 2
            assert names(folder / "checkpoints") == [2, 1]
        put_checkpoint(folder, 3, config(folder, "seed=7"))
        monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
        assert begin(folder, *how)[0] == 3

    @pytest.mark.parametrize("resume", ["none", "path"])
    def test_takes_it_again_where_it_had_none(self, tmp_path, monkeypatch, resume):
        (elsewhere,) = put(tmp_path / "other", 1)
        how = f"checkpoint.resume={'none' if resume == 'none' else elsewhere}"
        for restart in (0, 1):
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
            assert begin(tmp_path / "run", how)[0] == (0 if resume == "none" else 1)

    def test_an_older_start_that_begins_late_takes_nothing_back(self, tmp_path, monkeypatch):
        """And moves none of the newer one's checkpoints."""
        (elsewhere,) = put(tmp_path / "other", 1)
        for number, resume in enumerate(("auto", "none", str(elsewhere))):
            folder = tmp_path / str(number)
            run = Run(settled(config(folder, f"checkpoint.resume={resume}")))
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(number + 1))
            newer = this_start(folder)
            take(folder, newer)
            put(folder, 4)
            (folder / "checkpoints" / "staging-2-step-00000005").mkdir()
            with pytest.raises(Stopped) as caught:
                run.resume(Shards())
            assert caught.value.code == 86 and read_owner(folder) == newer
            assert names(folder / "checkpoints") == [4] and not (folder / "config.yaml").exists()
            assert (folder / "checkpoints" / "staging-2-step-00000005").is_dir()
            assert (folder / "model").is_dir() and not (folder / "checkpoints-1").exists()

    def test_killed_before_it_had_begun(self, tmp_path, monkeypatch):
        """What lies there is still of the run before."""
        folder = tmp_path / "run"
        put(folder, 4)
        Run(settled(config(folder, "checkpoint.resume=none")))
        assert not read_owner(folder).began
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert begin(folder, "checkpoint.resume=none")[0] == 0
        assert names(folder / "checkpoints-1") == [4]


class TestSentBack:
    def test_to_an_earlier_step_of_its_own(self, tmp_path, caplog):
        folder = tmp_path / "run"
        (earlier, _, _) = put(folder, 1, 3, 5)
        step, engine = begin(folder, f"checkpoint.resume={earlier}")
        assert step == 1 and engine.loaded == [(earlier.parent, earlier.name)]
        assert names(folder / "checkpoints") == [1]
        assert names(folder / "checkpoints-1") == [5, 3]
        assert f"is kept in {folder}/checkpoints-1" in caplog.text
        assert lines(folder / "metrics.jsonl") == [1] == lines(folder / "skipped.jsonl")
        assert not (folder / "model").exists() and not (folder / "results.json").exists()

    def test_to_that_of_another_folder(self, tmp_path):
        folder = tmp_path / "run"
        (other,) = put(tmp_path / "other", 3)
        put(folder, 1, 5)
        assert begin(folder, f"checkpoint.resume={other}")[0] == 3
        assert names(folder / "checkpoints") == [] and names(folder / "checkpoints-1") == [5, 1]
        assert lines(folder / "metrics.jsonl") == [] == lines(folder / "skipped.jsonl")
        assert not (folder / "model").exists()
        assert names(tmp_path / "other" / "checkpoints") == [3]

    def test_to_one_that_does_not_fit(self, tmp_path):
        """Nothing has moved."""
        folder = tmp_path / "run"
        (earlier, _) = put(folder, 1, 3)
        with pytest.raises(ValueError, match="is of another run"):
            begin(folder, f"checkpoint.resume={earlier}", "model.adapter=dora")
        assert names(folder / "checkpoints") == [3, 1] and (folder / "model").is_dir()

    def test_to_the_newest_is_going_on(self, tmp_path):
        folder = tmp_path / "run"
        (_, newest) = put(folder, 1, 3)
        assert begin(folder, f"checkpoint.resume={newest}")[0] == 3
        assert names(folder / "checkpoints") == [3, 1] and (folder / "model").is_dir()


class TestFinished:
    def finish(self, folder: Path, step: int = 6, results: int | None = 6) -> None:
        put(folder, 6)
        (folder / "model" / "coma_ds.json").write_text(json.dumps({"step": step}))
        if results is not None:
            (folder / "results.json").write_text(json.dumps({"step": results}))

    def test_there_is_nothing_to_do(self, tmp_path):
        self.finish(tmp_path)
        engine, run = Shards(), Run(config(tmp_path))
        with pytest.raises(Finished, match=r"^0$") as caught:
            run.resume(engine)
        assert caught.value.code == 0 and not engine.loaded
        assert caught.value.message.startswith(f"{tmp_path} is finished, 6 steps: nothing to do")
        assert lines(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize(("step", "results"), [(5, 6), (6, 5), (6, None)])
    def test_an_end_that_was_cut_off_is_taken_again(self, tmp_path, step, results):
        self.finish(tmp_path, step, results)
        assert not is_finished(config(tmp_path))
        assert begin(tmp_path)[0] == 6

    def test_without_an_evaluation_the_model_is_the_end(self, tmp_path):
        self.finish(tmp_path, results=None)
        assert is_finished(config(tmp_path, "eval.at_end=false"))

    def test_another_config_is_told_all_the_same(self, tmp_path):
        self.finish(tmp_path)
        with pytest.raises(ValueError, match="made with another config"):
            begin(tmp_path, "seed=7")
