"""The folder of a run: who may take it, what goes on in it, and what a failed start leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from coma_ds.config import GuardConfig, RunConfig, dump, load_config
from coma_ds.data.replacements import Replacements
from coma_ds.guard import Guard
from coma_ds.manifest import Manifest, write_manifest
from coma_ds.run import Run
from coma_ds.run_folder import changed, check_same, claim, settled, start_over

HOLD = """
import fcntl, os, sys
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
try:
    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(3)
print("held", flush=True)
sys.stdin.read()
"""


def config_of(folder: Path, *overrides: str) -> RunConfig:
    return load_config("demo-match", [f"output={folder}", *overrides])


def put_checkpoint(folder: Path, step: int, config: RunConfig | None) -> Path:
    """A published checkpoint of one rank without shards."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    write_manifest(path, Manifest(step=step, world=1, stage=0, files={}))
    remembered = {"guard": Guard(GuardConfig(), None), "replaced_rows": Replacements(0.0)}
    state = {"seconds": 5.0} | {name: part.state() for name, part in remembered.items()}
    (path / "run.json").write_text(json.dumps(state))
    if config is not None:
        (path / "config.yaml").write_text(dump(config))
    return path


class TestPrecision:
    @pytest.mark.parametrize(
        ("gpu", "capability", "precision"),
        [(False, "AVX2", "fp32"), (False, "DEFAULT", "fp32"), (False, "AVX512", "bf16"),
         (True, "AVX2", "bf16")],
    )  # fmt: skip
    def test_a_new_run_takes_what_is_fast(self, tmp_path, monkeypatch, gpu, capability, precision):
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
        assert settled(config_of(tmp_path)).precision == precision
        assert settled(config_of(tmp_path, "precision=autocast")).precision == "autocast"

    @pytest.mark.parametrize("precision", ["bf16", "fp32", "autocast"])
    def test_a_run_that_goes_on_keeps_its_own(self, tmp_path, precision):
        """Also where another one would be fast."""
        place = put_checkpoint(tmp_path / "a", 3, config_of(tmp_path, f"precision={precision}"))
        assert settled(config_of(tmp_path / "a")).precision == precision
        named = f"checkpoint.resume={place}"
        assert settled(config_of(tmp_path / "b", named)).precision == precision
        for step, damage in enumerate((b"", b"\xff\xfe", b"- a", b"a: 1", b"a: [")):
            newer = put_checkpoint(tmp_path / "a", 4 + step, None)
            (newer / "config.yaml").write_bytes(damage)
        assert settled(config_of(tmp_path / "a")).precision == precision
        anew = settled(config_of(tmp_path / "a", "checkpoint.resume=none"))
        assert anew == settled(
            config_of(tmp_path / "a", "checkpoint.resume=none", "precision=auto")
        )
        assert anew.precision == settled(config_of(tmp_path / "b")).precision


class TestClaim:
    def test_a_place_that_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        for place in (tmp_path / "file", tmp_path / "file" / "run"):
            with pytest.raises(ValueError) as caught:
                claim(config_of(place), keep=True)
            assert str(caught.value).startswith(f"output '{place}' cannot be used: ")
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_place_where_no_folder_can_be_made(self):
        """Not even by root, who may write anywhere else."""
        with pytest.raises(ValueError, match=r"^output '/proc/none/run' cannot be used: "):
            claim(config_of(Path("/proc/none/run")), keep=True)

    def test_a_place_that_cannot_be_written(self, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr(os, "access", lambda *place: asked.append(place))
        with pytest.raises(ValueError, match=r"^output '.*/run' cannot be used: "):
            claim(config_of(tmp_path / "run"), keep=False)
        assert asked == [(tmp_path, os.W_OK)]

    def test_the_folder_of_a_process_that_trains(self, tmp_path):
        """Refused as long as the other process lives, whatever of its lock file stays behind."""
        call = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
        with subprocess.Popen(
            call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(ValueError) as caught:
                claim(config_of(tmp_path), keep=True)
            other.stdin.close()
        assert other.returncode == 0
        assert str(caught.value) == (
            f"output '{tmp_path}': another process trains into this folder"
        )
        claim(config_of(tmp_path), keep=True)

    def test_the_folder_is_held_until_the_process_ends(self, tmp_path):
        claim(config_of(tmp_path / "runs" / "mine"), keep=True)
        call = [sys.executable, "-c", HOLD, str(tmp_path / "runs" / "mine" / ".lock")]
        for _ in range(2):
            assert subprocess.run(call, stdin=subprocess.DEVNULL).returncode == 3
            claim(config_of(tmp_path / "runs" / "mine"), keep=True)  # its next run

    def test_a_finished_run_is_not_written_over(self, tmp_path):
        (tmp_path / "model").mkdir()
        with pytest.raises(ValueError) as caught:
            claim(config_of(tmp_path), keep=True)
        assert str(caught.value) == (
            f"output '{tmp_path}' holds a finished run: give another output, or replace it with "
            "checkpoint.resume=none"
        )

    @pytest.mark.parametrize("resume", ["none", "elsewhere/step-00000001"])
    def test_a_finished_run_is_replaced_where_that_is_asked_for(self, tmp_path, resume):
        (tmp_path / "model").mkdir()
        claim(config_of(tmp_path, f"checkpoint.resume={resume}"), keep=True)

    def test_a_finished_run_with_a_checkpoint_goes_on(self, tmp_path):
        (tmp_path / "model").mkdir()
        put_checkpoint(tmp_path, 1, None)
        claim(config_of(tmp_path), keep=True)

    def test_checkpoints_that_were_never_published_are_none(self, tmp_path):
        (tmp_path / "model").mkdir()
        for name in ("staging-step-00000001", "broken-step-00000001"):
            (tmp_path / "checkpoints" / name).mkdir(parents=True)
        with pytest.raises(ValueError, match="holds a finished run"):
            claim(config_of(tmp_path), keep=True)

    def test_looking_at_it_writes_nothing(self, tmp_path):
        claim(config_of(tmp_path / "runs" / "mine"), keep=False)
        assert not list(tmp_path.iterdir())
        (tmp_path / "model").mkdir()
        for _ in range(2):  # it is not held either
            claim(config_of(tmp_path), keep=False)
        assert [p.name for p in tmp_path.iterdir()] == ["model"]

    def test_looking_at_it_names_a_place_that_is_no_folder(self, tmp_path):
        file = tmp_path / "file"
        file.write_text("")
        for place in (file, file / "runs" / "mine"):
            with pytest.raises(ValueError) as caught:
                claim(config_of(place), keep=False)
            assert str(caught.value) == (
                f"output '{place}' cannot be used: {file} is no folder that can be written"
            )


def test_starting_over_removes_what_a_run_ended_with_and_nothing_else(tmp_path):
    kept = ["config.yaml", "metrics.jsonl", "tensorboard/events", "checkpoints/step-00000001/x"]
    gone = ["model/config.json", "model/deep/x", "results.json", "neighbours.json"]
    for name in (*kept, *gone):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for _ in range(2):  # also where there is nothing
        start_over(tmp_path)
        left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
        moved = {name.replace("checkpoints/", "checkpoints-1/") for name in kept}
        assert left == moved and not (tmp_path / "model").exists()


def test_checkpoints_are_set_aside_and_none_is_lost(tmp_path):
    for number in (1, 2):
        (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
        (tmp_path / "checkpoints" / "step-00000001" / "of").write_text(str(number))
        start_over(tmp_path)
    for number in (1, 2):
        file = tmp_path / f"checkpoints-{number}" / "step-00000001" / "of"
        assert file.read_text() == str(number)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_another_column_name_is_a_change(tmp_path):
    (tmp_path / "config.yaml").write_text(dump(config_of(tmp_path)))
    renamed = config_of(tmp_path, "data.columns.query=title")
    assert changed(renamed, tmp_path) == ["data.columns.query: None -> title"]


FREE = [
    "output=elsewhere", "init_from=/another", "deepspeed=zero0", "eval.every=7", "eval.root=/sets",
    "eval.batch_size=3", "checkpoint.every=7", "checkpoint.resume=none", "logging.every=9",
    "chunk.samples=3", "chunk.tokens=900", "data.root=/a", "data.path=/a", "data.image_root=/a",
    "data.workers=5", "data.bad_rows=0.5", "model.path=/a", "model.attention=dense",
    "model.arithmetic=sdpa", "model.gradient_checkpointing=true",
]  # fmt: skip
COUNTED = {
    "seed=1": "seed: 0 -> 1",
    "optim.lr=0.5": "optim.lr: 1.0 -> 0.5",
    "optim.batch_size=24": "optim.batch_size: 8 -> 24",
    "optim.steps=9": "optim.steps: 6 -> 9",
    "optim.clip=0.25": "optim.clip: 1.0 -> 0.25",
    "precision=autocast": "precision: fp32 -> autocast",
    "data.limit=4": "data.limit: None -> 4",
    "data.sub_batch=2": "data.sub_batch: 0 -> 2",
    "match.temperature=0.5": "match.temperature: 0.25 -> 0.5",
}
OF_MODEL = {
    "model.compression_tokens=2": "model.compression_tokens: 4 -> 2",
    "model.adapter=dora": "model.adapter: lora -> dora",
    "model.lora.rank=3": "model.lora.rank: 2 -> 3",
    "model.pooling=last": "model.pooling: mean -> last",
    "model.train_vision=true": "model.train_vision: False -> True",
    "optim.kind=sgd": "optim.kind: adamw -> sgd",
}
START = [
    "seed=0", "precision=fp32", "optim.lr=1.0", "optim.batch_size=8", "optim.steps=6",
    "optim.clip=1.0", "optim.kind=adamw", "data.limit=null", "data.sub_batch=0",
    "match.temperature=0.25", "model.compression_tokens=4", "model.adapter=lora",
    "model.lora.rank=2", "model.pooling=mean", "model.train_vision=false", "data.workers=0",
    "eval.batch_size=2",
]  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return put_checkpoint(tmp_path / "run", 3, config_of(tmp_path / "run", *START))


def again(checkpoint: Path, *overrides: str) -> RunConfig:
    return config_of(checkpoint.parents[1], *START, *overrides)


class TestTheSameRun:
    @pytest.mark.parametrize("override", FREE)
    def test_what_may_change(self, checkpoint, override):
        config = again(checkpoint, override)
        assert config != again(checkpoint)
        assert changed(config, checkpoint) == []
        assert check_same(config, checkpoint, 3) == []

    def test_the_recipe_may_have_another_name(self, checkpoint):
        config = again(checkpoint).model_copy(update={"recipe": "mine.yaml"})
        assert check_same(config, checkpoint, 3) == []

    @pytest.mark.parametrize("override", COUNTED)
    def test_what_makes_a_difference(self, checkpoint, override):
        """An error by itself, said where the checkpoint is named."""
        line = COUNTED[override]
        assert changed(again(checkpoint, override), checkpoint) == [line]
        with pytest.raises(ValueError) as caught:
            check_same(again(checkpoint, override), checkpoint, 3)
        assert str(caught.value) == (
            f"{checkpoint} was made with another config ({line}): give the same one, go on with "
            f"this one by checkpoint.resume={checkpoint}, or start over with checkpoint.resume=none"
        )
        named = again(checkpoint, override, f"checkpoint.resume={checkpoint}")
        assert check_same(named, checkpoint, 3) == [line]

    def test_weights_of_other_bits(self, checkpoint):
        """DeepSpeed has other files for them; also where the checkpoint is named."""
        for more in ([], [f"checkpoint.resume={checkpoint}"]):
            with pytest.raises(ValueError) as caught:
                check_same(again(checkpoint, "precision=bf16", *more), checkpoint, 3)
            assert str(caught.value) == (
                f"{checkpoint} was made with another precision: fp32 -> bf16, and DeepSpeed cannot "
                "go on between weights of 16 and of 32 bits: give the same one, or start over with "
                "checkpoint.resume=none"
            )

    def test_several_differences_are_sorted_and_a_long_list_is_cut_short(self, checkpoint):
        config = again(checkpoint, *COUNTED)
        assert changed(config, checkpoint) == sorted(COUNTED.values())
        with pytest.raises(ValueError) as caught:
            check_same(config, checkpoint, 3)
        assert f"({'; '.join(sorted(COUNTED.values())[:6])}): " in str(caught.value)

    @pytest.mark.parametrize("resume", ["auto", "named"])
    @pytest.mark.parametrize("override", OF_MODEL)
    def test_another_model_is_another_run(self, checkpoint, override, resume):
        how = f"checkpoint.resume={checkpoint if resume == 'named' else resume}"
        with pytest.raises(ValueError) as caught:
            check_same(again(checkpoint, override, "seed=4", how), checkpoint, 3)
        assert str(caught.value) == (
            f"{checkpoint} is of another run ({OF_MODEL[override]}): give another output, or "
            "start over with checkpoint.resume=none"
        )

    def test_another_objective_is_another_run(self, checkpoint):
        config = again(checkpoint).model_copy(update={"objective": "compress"})
        with pytest.raises(ValueError, match=r"is of another run \(objective: match -> compress\)"):
            check_same(config, checkpoint, 3)

    @pytest.mark.parametrize("resume", ["auto", "named"])
    def test_a_checkpoint_beyond_the_last_step(self, checkpoint, resume):
        how = f"checkpoint.resume={checkpoint if resume == 'named' else resume}"
        assert check_same(again(checkpoint, how), checkpoint, 6) == []
        with pytest.raises(ValueError) as caught:
            check_same(again(checkpoint, how), checkpoint, 7)
        assert str(caught.value) == (
            f"{checkpoint} is at step 7, optim.steps is 6: raise it, or start over with "
            "checkpoint.resume=none"
        )

    def test_a_checkpoint_that_does_not_say_its_config(self, checkpoint):
        (checkpoint / "config.yaml").unlink()
        config = again(checkpoint, "seed=1", "model.adapter=dora")
        assert changed(config, checkpoint) == check_same(config, checkpoint, 3) == []
        with pytest.raises(ValueError, match=r"is at step 9, optim.steps is 6"):
            check_same(config, checkpoint, 9)


class Shards:
    """An engine as far as ``Run.resume`` looks at it."""

    def __init__(self) -> None:
        self.stage, self.ds_config = 0, {"a": 1}
        self.loaded: list[tuple[Path, str]] = []

    def load(self, folder: Path, tag: str) -> None:
        self.loaded.append((folder, tag))

    def frozen_weights(self) -> dict:
        return {}


@pytest.fixture
def quiet(monkeypatch):
    """The log stays with pytest."""
    monkeypatch.setattr("coma_ds.run.log_to_stderr", lambda main: None)


@pytest.mark.usefixtures("quiet")
class TestStart:
    OWN = ("logging.tensorboard=false", "logging.progress=false")

    def test_the_config_is_written_when_the_run_goes_on(self, checkpoint, caplog):
        folder, engine = checkpoint.parents[1], Shards()
        (folder / "config.yaml").write_text("before")
        (folder / "model").mkdir()
        named = [f"checkpoint.resume={checkpoint}", "seed=5", *self.OWN]
        config = again(checkpoint, *named)
        run = Run(config)
        assert (folder / "config.yaml").read_text() == "before"
        assert run.resume(engine) == 3 and run.seconds == 5.0
        assert engine.loaded == [(checkpoint.parent, checkpoint.name)]
        assert (folder / "config.yaml").read_text() == dump(config)
        assert json.loads((folder / "ds_config.json").read_text()) == {"a": 1}
        assert "changed since the checkpoint: seed: 0 -> 5" in caplog.text
        assert (folder / "model").is_dir()

    @pytest.mark.parametrize("override", ["seed=5", "model.adapter=dora", "optim.steps=2"])
    def test_a_run_that_may_not_go_on_leaves_the_folder_as_it_was(self, checkpoint, override):
        folder, engine = checkpoint.parents[1], Shards()
        for name in ("config.yaml", "ds_config.json", "versions.txt", "results.json"):
            (folder / name).write_text("before")
        run = Run(again(checkpoint, override, *self.OWN))
        with pytest.raises(ValueError):
            run.resume(engine)
        assert not engine.loaded
        for name in ("config.yaml", "ds_config.json", "versions.txt", "results.json"):
            assert (folder / name).read_text() == "before"

    def test_a_run_that_starts_over_leaves_no_old_result(self, checkpoint):
        folder = checkpoint.parents[1]
        (folder / "model").mkdir()
        (folder / "results.json").write_text("before")
        engine = Shards()
        run = Run(again(checkpoint, "checkpoint.resume=none", *self.OWN))
        assert (folder / "results.json").is_file()
        assert run.resume(engine) == 0 and not engine.loaded
        assert not (folder / "model").exists() and not (folder / "results.json").exists()

    def test_a_dry_run_writes_nothing(self, tmp_path):
        run = Run(config_of(tmp_path / "run", *self.OWN), keep=False)
        assert run.resume(Shards()) == 0
        run.finish(SimpleNamespace(), SimpleNamespace(), 1)
        assert not list(tmp_path.iterdir())
