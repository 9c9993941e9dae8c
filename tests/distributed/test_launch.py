"""The demo in a short form, through the launchers that users take: both stages, end to end."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from coma_ds.config import load_config
from coma_ds.hardware import has_fast_bf16
from tests.distributed.launched import Ended, launch

TRAIN = "coma_ds/train.py"
FEW = ["optim.steps=2", "data.length=4000", "logging.every=1", "precision=bf16"]
COMPRESS = [*FEW, "optim.batch_size=16", "chunk.samples=3", "eval.bottleneck_questions=2"]
SETS = ("name_t2i/unseen", "i2t/unseen")
MATCH = [
    "--recipe", "demo-match", *FEW, "optim.batch_size=32", "data.sub_batch=16", "chunk.samples=7",
    f"eval.sets=[{','.join(SETS)}]", f"eval.along=[{SETS[0]}]", "eval.every=1",
    "data.sources=[name_t2i,i2t,tags_t2i,i2i]",
]  # fmt: skip
FILES = ("config.yaml", "ds_config.json", "versions.txt", "metrics.jsonl", "results.json")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("launched")


def jobs(root: Path) -> dict[str, tuple[str, ...]]:
    """Everything that is started, by name; ``match`` waits for ``compress``."""
    exact = ["precision=fp32", "--verify-gradients"]
    return {
        "alone": ("python", TRAIN, f"output={root}/alone", *COMPRESS, "deepspeed=zero0"),
        "torchrun": (
            "torchrun", TRAIN, f"output={root}/torchrun", *COMPRESS, "deepspeed=zero2",
            "eval.at_end=false", "model.adapter=lora",
        ),
        "dry run": ("python", TRAIN, f"output={root}/dry", "--dry-run", *COMPRESS),
        "dry match": (
            "torchrun", TRAIN, f"output={root}/dry", "--dry-run", *MATCH, "init_from=null",
        ),
        "verify": ("python", TRAIN, f"output={root}/verify", *COMPRESS, *exact),
        "verify match": (
            "torchrun", TRAIN, f"output={root}/verify", *MATCH, *exact, "init_from=null",
        ),
    }  # fmt: skip


def both_stages(root: Path) -> tuple[Ended, Ended]:
    """compress, then match from it."""
    first = launch("deepspeed", TRAIN, f"output={root}/compress", *COMPRESS, "checkpoint.every=1")
    start = f"init_from={root}/compress"
    return first, launch("deepspeed", TRAIN, f"output={root}/match", *MATCH, start)


@pytest.fixture(scope="module")
def ended(root):
    """Name of a job to what it left on the screen."""
    with ThreadPoolExecutor(2) as pool:
        chain = pool.submit(both_stages, root)
        futures: dict[str, Future[Ended]] = {
            name: pool.submit(launch, *job) for name, job in jobs(root).items()
        }

        def result(name: str) -> Ended:
            if name in ("compress", "match"):
                return chain.result()[name == "match"]
            return futures[name].result()

        yield result


def metrics(folder: Path, group: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["group"] == group]


ALL = ("compress", "match", "alone", "torchrun", "dry run", "dry match", "verify", "verify match")


@pytest.mark.parametrize("name", ALL)
def test_it_ends_well_and_says_no_more_than_it_should(ended, name: str):
    """Beside the launchers' own lines nothing but ours: no warning of any library."""
    job = ended(name)
    assert job.code == 0, job.text
    for word in ("warn", "deprecated", "traceback", "bf16_optimizer", "untested", "it/s"):
        own = [line for line in job.lines if not line.startswith(("[20", "W1", "W0"))]
        assert not [line for line in own if word in line.lower()], job.text


def test_stage_1_leaves_a_whole_run(ended, root):
    job, folder = ended("compress"), root / "compress"
    assert "world      2 rank(s) on cpu, ZeRO-3 (zero3, weights whole), bf16" in job.text
    assert "batch      16 = 2 x 8, in chunks of at most 3 samples" in job.text
    assert all((folder / name).is_file() for name in FILES)
    assert (folder / "checkpoints" / "step-00000002" / "manifest.json").is_file()
    assert (folder / "model" / "model.safetensors").is_file()
    assert list((folder / "tensorboard").glob("events*"))
    assert [line["step"] for line in metrics(folder)] == [1, 2]
    table = json.loads((folder / "results.json").read_text())["bottleneck"]
    assert len(table) >= 4
    for row in table.values():
        assert {"tokens", "visible", "blind"} <= set(row)


def test_the_run_config_is_the_one_that_ran(ended, root):
    ended("compress")
    folder = root / "compress"
    written = load_config(str(folder / "config.yaml"))
    assert written.optim.batch_size == 16 and written.chunk.samples == 3
    mechanics = json.loads((folder / "ds_config.json").read_text())
    assert mechanics["zero_optimization"]["stage"] == 3
    assert mechanics["gradient_clipping"] == written.optim.clip


def test_stage_2_starts_from_stage_1(ended, root):
    job, folder = ended("match"), root / "match"
    assert f"from {root}/compress/model (pretrained)" in job.text
    assert [line["step"] for line in metrics(folder)] == [1, 2]
    for line in metrics(folder):
        assert line["grad_norm"] > 0 and line["skipped"] == 0
    results = json.loads((folder / "results.json").read_text())
    assert set(results["sets"]) == set(SETS)
    for row in results["sets"].values():
        assert 0 <= row["p@1"] <= 1 and row["candidates"] > 100
    along = metrics(folder, "eval")
    assert [line["step"] for line in along] == [1, 2]
    assert SETS[0] in along[0] and SETS[1] not in along[0]
    assert set(SETS) <= set(along[1])


def test_a_world_of_one_and_one_of_two_take_the_same_steps(ended, root):
    """The same batches: in bf16 the first losses, of the same weights, are near each other."""
    assert "world      1 rank(s) on cpu, ZeRO-0 (zero0), bf16" in ended("alone").text
    ended("compress")
    mine, theirs = (metrics(root / name)[0]["loss"] for name in ("alone", "compress"))
    assert mine == pytest.approx(theirs, rel=0.01)
    assert (root / "alone" / "results.json").is_file()


def test_torchrun_trains_adapters_and_exports_a_plain_model(ended, root):
    job = ended("torchrun")
    assert "world      2 rank(s) on cpu, ZeRO-2 (zero2), bf16" in job.text
    assert ("this CPU has no fast bf16" in job.text) == (not has_fast_bf16())
    assert [line["step"] for line in metrics(root / "torchrun")] == [1, 2]
    assert (root / "torchrun" / "model" / "model.safetensors").is_file()
    assert not (root / "torchrun" / "results.json").exists()


@pytest.mark.parametrize(
    "name, arithmetic",
    [
        ("dry run", "2 steps x 16 = 32 samples, 0.01 passes over 4000 rows"),
        ("dry match", "2 steps x 32 = 64 samples, 0.00 passes over 16000 rows"),
    ],
)
def test_a_dry_run_checks_takes_one_step_and_writes_nothing(ended, root, name, arithmetic):
    text = ended(name).text
    assert "dry run: one step done, nothing written" in text
    assert not (root / "dry").exists()
    assert arithmetic in text
    begin = text.index("the config of this run:\n") + len("the config of this run:\n")
    tree = yaml.safe_load(text[begin : text.index("source ", begin)])
    assert tree["optim"]["steps"] == 2 and tree["output"] == f"{root}/dry"
    assert text.count("source ") == (1 if name == "dry run" else 4)
    assert "2000 of 4000 rows looked at" in text


@pytest.mark.parametrize("name, parts", [("verify", "layers"), ("verify match", "embed_tokens")])
def test_verify_gradients_says_equal(ended, root, name, parts):
    text = ended(name).text
    assert "gradients, chunked against plain (fp32, dropout off)" in text
    assert parts in text
    assert ended(name).lines[-1].endswith(": equal")
    assert not (root / "verify").exists()
