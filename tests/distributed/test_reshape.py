"""A checkpoint goes on at another number of ranks or ZeRO stage, or says why it cannot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coma_ds.model.source import resolve_model
from tests.distributed.harness import run_world
from tests.distributed.test_resume import error_of, losses

TARGET = "tests.distributed.training:train_each"
# Two rates and two decays in one optimizer, adapters over a frozen model, a rate that falls.
RUN = ["optim.steps=6", "checkpoint.every=3", "optim.token_lr=0.004", "optim.weight_decay=0.1"]
LORA = ["model.adapter=lora", "model.lora.dropout=0", "model.weights=pretrained"]
KINDS = {
    "bf16 at 0": ["deepspeed=zero0", "precision=bf16"],
    "lora at 3": [*LORA, "deepspeed=zero3"],
    "full at 3": ["deepspeed=zero3"],
    "full at 2": ["deepspeed=zero2"],
    "lora at 1": [*LORA, "deepspeed=zero1"],
    "full at 0": ["deepspeed=zero0"],
}
OTHER_STAGE = {"full at 2": "deepspeed=zero1", "lora at 1": "deepspeed=zero2"}
CLOSE = dict(rel=2e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model that no seed gives: weights that are lost would be seen."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(resolve_model("builtin:demo-base"), folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(5)
    changed = {n: w * (1 + 0.05 * torch.randn(w.shape).to(w.dtype)) for n, w in weights.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {kind: root / kind.replace(" ", "-") for kind in KINDS}


def arguments(kind: str, base: Path) -> list[str]:
    model = [f"model.path={base}"] if "lora" in kind else []
    return [*RUN, *KINDS[kind], *model, "checkpoint.keep_last=0"]


@pytest.fixture(scope="module")
def whole(folders, base) -> dict[str, dict]:
    """Every kind on two ranks, not interrupted; with the samples that both have seen."""
    wanted = [{"output": str(folders[k]), "arguments": arguments(k, base)} for k in KINDS]
    ranks = run_world(2, TARGET, runs=wanted)
    return {k: run | {"samples": samples(runs)} for k, run, *runs in zip(KINDS, ranks[0], *ranks)}


def samples(ranks: list[dict]) -> list[list[str]]:
    """Digests of the global batch of each step, from the same run of every rank."""
    return [
        sorted(digest for _, own, _ in step for digest in own)
        for step in zip(*(rank["seen"] for rank in ranks), strict=True)
    ]


def again(kind: str, folders, base, name: str, *more: str) -> dict:
    """The run of ``kind`` from its third step, into a folder of its own."""
    checkpoint = folders[kind] / "checkpoints" / "step-00000003"
    return {
        "output": str(folders[kind].with_name(f"{folders[kind].name}-{name}")),
        "arguments": [*arguments(kind, base), f"checkpoint.resume={checkpoint}", *more],
    }


@pytest.mark.parametrize("world, kinds", [(1, [*KINDS]), (4, ["lora at 3", "full at 2"])])
def test_another_number_of_ranks_goes_on_equally(whole, folders, base, world, kinds):
    wanted = [again(kind, folders, base, f"on-{world}") for kind in kinds]
    ranks = run_world(world, TARGET, runs=wanted)
    for kind, run, *runs in zip(kinds, ranks[0], *ranks):
        assert samples(runs) == whole[kind]["samples"][3:]
        said = "\n".join(run["said"])
        assert "step 3 of 6" in said, (kind, said)
        assert ("converting" in said) == (" at 0" not in kind), kind
        for (step, loss, *_, norm), (_, own, *_, own_norm) in zip(
            losses(whole[kind])[3:], losses(run), strict=True
        ):
            close = {"rel": 2e-2} if "bf16" in kind else CLOSE
            assert own == pytest.approx(loss, **close), (kind, step)
            assert own_norm == pytest.approx(norm, rel=max(1e-3, 2 * close["rel"])), (kind, step)
    assert not list(folders["full at 3"].rglob("universal-*"))


def test_another_stage_where_deepspeed_can(whole, folders, base):
    wanted = [again(k, folders, base, "stage", more) for k, more in OTHER_STAGE.items()]
    found = dict(zip(OTHER_STAGE, run_world(2, TARGET, runs=wanted)[0]))
    for kind, run in found.items():
        pairs = zip(losses(whole[kind])[3:], losses(run), strict=True)
        assert all(own[1] == pytest.approx(loss[1], **CLOSE) for loss, own in pairs), kind


def test_another_stage_where_it_cannot(whole, folders, base):
    wanted = [
        again("full at 3", folders, base, "no", "deepspeed=zero2"),
        again("full at 2", folders, base, "no", "deepspeed=zero3"),
        again("full at 0", folders, base, "no", "deepspeed=zero1"),
    ]
    for run, (then, now) in zip(
        run_world(1, TARGET, runs=wanted)[0], ((3, 2), (2, 3), (0, 1)), strict=True
    ):
        assert f"is of ZeRO stage {then}, this run has stage {now}" in error_of(run)
        assert f"take deepspeed=zero{then}, or start over" in error_of(run)


@pytest.mark.parametrize("kind", ["lora at 3", "lora at 1"])
def test_another_base_is_refused(whole, folders, base, kind):
    """The frozen weights are not in the checkpoint: those of now must be those of then."""
    other = again(kind, folders, base, "base", "model.path=builtin:demo-base")
    (found,) = run_world(1, TARGET, runs=[other])[0]
    assert "frozen parameters" in error_of(found)
    assert "are not those of builtin:demo-base" in error_of(found)


@pytest.mark.parametrize("kind", ["lora at 3", "lora at 1"])
def test_a_checkpoint_leaves_the_frozen_base_out(whole, folders, kind):
    checkpoint = folders[kind] / "checkpoints" / "step-00000003"
    names = set()
    for file in checkpoint.glob("*model_states.pt"):
        state = torch.load(file, weights_only=False)
        names |= set(state["module"])
        assert not state.get("frozen_param_fragments")
    assert names and all("lora_" in n or n in ("tokens.weight",) for n in names), names
    assert sum(f.stat().st_size for f in checkpoint.iterdir()) < 3_000_000
