"""The planner: shapes, graphs, load, and what a user reads before a job is queued."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from coma_ds.commands.main import dispatch
from coma_ds.config import load_config
from coma_ds.plan import GIB, Planner, best
from coma_ds.planning.cards import Machine, read_cards
from coma_ds.planning.flops import ModelFlops
from coma_ds.planning.graphs import SavedBytes, _Saves, measure_graphs
from coma_ds.planning.load import assume
from coma_ds.planning.outline import outline, shape_of
from coma_ds.planning.weights import count_weights
from tests.tiny import make_batch, tiny_model

# The published sizes of the checkpoints.
SIZES = {
    "qwen2_5_vl_3b-match": (3_754_622_976, 668_684_288),
    "qwen2_5_vl_7b-match": (8_292_166_656, 676_550_144),
    "qwen3_vl_2b-match": (2_127_532_032, 407_000_000),
}
CARD = read_cards()["h200"]
PLAIN = ("model.adapter=none", "model.compression_tokens=1")


@pytest.mark.parametrize("recipe", SIZES)
def test_shapes_are_those_of_the_public_models(recipe) -> None:
    weights = count_weights(outline(load_config(recipe, [*PLAIN])))
    total, vision = SIZES[recipe]
    assert weights.vision == pytest.approx(vision, rel=1e-3 if "qwen3" in recipe else 0)
    width = {"3b": 2048, "7b": 3584, "2b": 2048}[re.search(r"_(\db)-", recipe)[1]]
    assert weights.total == total + width  # one token


def test_a_plan_needs_no_weights_and_no_network(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = load_config("qwen2_5_vl_7b-compress", [])
    assert shape_of(config).endswith("Qwen2.5-VL-7B-Instruct")
    assert all(p.is_meta for p in outline(config).parameters())


@pytest.mark.parametrize("options", [{}, {"adapter": "lora"}, {"train_vision": True}])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_graphs_are_what_a_real_forward_holds(family, options) -> None:
    """Of a real model in fp32, attention left out: that is a kernel's here and torch's there."""
    samples = [{"text": 300}]
    real = tiny_model(family, **options).train()
    real.backbone.arithmetic = "hold"
    batch = make_batch(samples)

    def hold(query, key, value, scale, mask=None, causal=False):
        sums = query.new_empty(query.shape[:-1])
        return _Saves.apply(query, query, key, value, torch.empty_like(query), sums)

    from coma_ds.model import attention

    attention.ARITHMETIC["hold"] = hold
    try:
        seen = SavedBytes(real)
        with seen:
            real.backbone.hidden_states(batch, None, batch.token_rows)
    finally:
        del attention.ARITHMETIC["hold"]
    with torch.device("meta"):
        shape = tiny_model(family, **options)
    found = measure_graphs(shape.train(), liger=False)
    rows = len(batch.input_ids_T)
    # The embedding, its places and the last norm are outside the layers.
    assert found.held * rows == pytest.approx(seen.total, rel=0.04)
    assert found.patch == 0 or options.get("train_vision")


def test_liger_holds_less_and_checkpoints_hardly_anything() -> None:
    config = load_config("qwen2_5_vl_3b-compress", ["model.gradient_checkpointing=false"])
    model = outline(config)
    plain, fused = (measure_graphs(model, liger=liger) for liger in (False, True))
    # Of each token and layer: norms in 16 bits, and one row of the inner width less.
    assert plain.held - fused.held == pytest.approx(36 * 2 * (2 * 2048 * 1 + 11008), rel=0.1)
    again = measure_graphs(
        outline(load_config("qwen2_5_vl_3b-compress", ["model.gradient_checkpointing=true"])),
        liger=True,
    )
    assert again.held == 36 * 2048 * 2 and again.layer == fused.layer


def planner(*overrides: str, recipe="qwen2_5_vl_3b-match", gpus=8, per_node=8, card=CARD):
    config = load_config(recipe, [*overrides])
    return Planner(config, Machine(card, gpus, per_node, 50.0), liger=True)


@pytest.fixture(scope="module")
def match() -> Planner:
    return planner()


@pytest.fixture(scope="module")
def load(match):
    return assume(match.config, match.model, None, None)


def test_floors_are_those_of_the_modes(match, load) -> None:
    """V + 2 L, V + 3 L and 2 V + 4 L, with V / L between 0.7 and 0.9 of image tokens."""
    kept, replayed, usual = match.floors(load).values()
    assert kept == 1 and 1.3 < replayed < 1.4 and 1.8 < usual < 2.0
    compress = planner(recipe="qwen2_5_vl_3b-compress")
    own = assume(compress.config, compress.model, None, None)
    assert [round(x, 1) for x in compress.floors(own).values()] == [1.0, 1.3]


def test_executed_flops_are_those_of_the_formula(match, load) -> None:
    plan = match.plan(load)
    flops = ModelFlops.of(match.model)
    tokens, images = 128 * load.tokens, 128 * load.image_tokens
    text = 2 * tokens * (3 * flops.text.every + flops.text.trained)
    tower = 2 * images * (4 * (flops.vision.every + flops.patch.every) + flops.merger.every)
    assert plan.executed == pytest.approx(text + tower, rel=0.05)  # attention is the rest
    assert plan.executed > text + tower


def test_a_teacher_costs_a_forward_and_its_logits() -> None:
    compress = planner(recipe="qwen2_5_vl_3b-compress")
    taught = planner("compress.loss=kl", recipe="qwen2_5_vl_3b-compress")
    load = assume(compress.config, compress.model, None, None)
    flops, least = ModelFlops.of(compress.model), compress.plan(load)
    plan = taught.plan(load)
    assert plan.needed == least.needed
    dialogues = compress.config.optim.batch_size / compress.machine.gpus
    forward = (
        flops.text.forward(dialogues * load.tokens) + flops.text_pair * dialogues * load.causal
    )
    logits = flops.head.forward(dialogues * load.answers)
    more = plan.executed - least.executed  # its logits, and both once more in the backward
    assert more == pytest.approx(forward + 3 * logits, rel=1e-3)
    floor = taught.floors(load)["without checkpoints"]
    assert floor == pytest.approx(1 + (forward + logits) / plan.needed, rel=1e-3)
    language = compress.weights.language - compress.weights.embedding
    share = (compress.machine.gpus - 1) / compress.machine.gpus
    assert plan.gathered - least.gathered == pytest.approx(2 * plan.chunks * language * share)


def test_kept_graphs_and_whole_weights_save_what_they_should(match, load) -> None:
    plans = match.alternatives(load)
    assert [p.overrides for p in plans] == [
        [],
        ["chunk.tokens=auto", "chunk.samples=4096", "chunk.keep=auto"],
        ["deepspeed=zero3_whole", "chunk.tokens=auto", "chunk.samples=4096", "chunk.keep=auto"],
    ]
    plain, auto, whole = plans
    weights = 2 * match.weights.total
    assert whole.gathered == pytest.approx(weights * 7 / 8)
    assert auto.gathered > 5 * weights and plain.reduced == 2 * match.weights.trained * 7 / 8
    assert whole.memory["weights"] == pytest.approx(weights * 9 / 8)
    assert plain.memory["weights"] < weights / 7
    for plan in plans:
        assert plan.fits and plan.total < plan.capacity and plan.binds == "arithmetic"
    assert auto.kept > 0 and auto.executed < plain.executed
    assert best(plans) is whole and whole.times == pytest.approx(7 / 8) and auto.times > 5
    slow = replace(whole, computing=1.1 * whole.computing)
    assert best([plain, auto, slow]).times > 3


def test_a_large_world_keeps_every_graph() -> None:
    large = planner(gpus=64)
    plan = large.plan(
        assume(large.config, large.model, None, None),
        {"chunk.tokens": "auto", "chunk.samples": 4096, "chunk.keep": "auto"},
    )
    assert plan.kept == plan.chunks and plan.executed == pytest.approx(plan.needed, rel=1e-6)


@pytest.mark.parametrize("chunk", [{"chunk.samples": 512}, {"chunk.tokens": 10**6}])
def test_what_does_not_fit_is_said_with_its_part(match, load, chunk) -> None:
    plan = match.plan(load, {"chunk.samples": 4096, **chunk})
    assert not plan.fits and plan.binds == "memory: chunk"
    assert plan.largest_chunk * 3 < plan.budget.samples * load.tokens


def test_full_training_of_7b_does_not_fit_one_card() -> None:
    one = planner("model.adapter=none", recipe="qwen2_5_vl_7b-match", gpus=1, per_node=1)
    plan = one.plan(assume(one.config, one.model, None, None))
    assert not plan.fits and plan.binds == "memory: optimizer"
    assert plan.memory["optimizer"] == pytest.approx(12 * one.weights.trained)


def test_the_largest_batch_fits_and_the_next_does_not(match, load) -> None:
    """In chunks of one sample, on every GPU alike."""
    most = match.largest_batch(load)
    assert most > 100_000 and most % 8 == 0
    fits = {"chunk.samples": 1, "optim.batch_size": most}
    assert match.plan(load, fits).fits
    assert not match.plan(load, fits | {"optim.batch_size": int(most * 1.1)}).fits


def test_pixels_that_wait_on_the_host(match, load) -> None:
    """8 GPUs, 8 workers each, 2 batches, 128 pairs, 4 patches a token of 14 x 14 x 3 bytes."""
    assert match.waiting(load) == 8 * 8 * 2 * 128 * load.image_tokens * 4 * 14 * 14 * 3


def test_a_copy_in_each_node_leaves_the_network_to_what_an_update_changed() -> None:
    nodes = planner("optim.batch_size=8192", recipe="qwen2_5_vl_7b-match", gpus=32)
    load = assume(nodes.config, nodes.model, None, None)
    many = {"chunk.samples": 16}
    plain, copied = (nodes.plan(load, many | {"deepspeed": x}) for x in ("zero3", "zero3_hpz"))
    assert plain.gathered == copied.gathered and plain.between > 50 * nodes.weight_bytes
    changed = 2 * nodes.weights.trained
    assert changed <= copied.between <= 3 * changed  # and gradients
    assert copied.memory["copy"] == 2 * nodes.weights.total / 8
    assert copied.moving < plain.moving / 5 and copied.seconds < plain.seconds
    (said,) = (note for note in plain.notes if "zero_hpz_partition_size=8" in note)
    assert "from other nodes" in said and not any("hpz" in note for note in copied.notes)
    names = [plan.changes.get("deepspeed") for plan in nodes.alternatives(load)]
    assert "zero3_hpz" in names
    four = planner(recipe="qwen2_5_vl_7b-match", gpus=8, per_node=4)
    assert "zero3_hpz" not in [p.changes.get("deepspeed") for p in four.alternatives(load)]


def test_two_nodes_wait_for_their_network() -> None:
    slow = planner("chunk.samples=2", gpus=16)
    plan = slow.plan(assume(slow.config, slow.model, None, None))
    assert plan.moving == pytest.approx((plan.gathered + plan.reduced) / 50e9)
    assert plan.binds == "the network" and plan.seconds > plan.moving


def run(capsys, *words: str) -> tuple[int, str]:
    code = dispatch(["plan", "--gpus", "8", "--gpu", "h200", *words])
    return code, capsys.readouterr().out


def test_what_is_read(capsys) -> None:
    code, text = run(capsys, "--recipe", "qwen2_5_vl_3b-match", "--price", "2")
    assert code == 0
    hours = float(re.search(r"cost +(\d+) GPU-hours, (\d+) at 2 an hour", text)[1])
    assert abs(int(re.search(r"hours, (\d+) at", text)[1]) - 2 * hours) <= 1
    for said in (
        "8 x NVIDIA H200, 1 node", "7.4 M of them trained", "assumed: 640 tokens an image",
        "40% of 989 TFLOP/s (assumed", "best       2: deepspeed=zero3_whole",
        "1.00 with every graph kept", "GB of pixels wait in the loaders of a node at most (8 ",
    ):  # fmt: skip
        assert said in text, text
    code, text = run(capsys, "--recipe", "qwen2_5_vl_3b-match", "--json")
    plans = json.loads(text)
    assert len(plans) == 3 and all(plan["fits"] for plan in plans)
    assert plans[0]["total"] == pytest.approx(sum(plans[0]["memory"].values()))


def test_nothing_fits_is_code_1(tmp_path, capsys) -> None:
    (tmp_path / "cards.yaml").write_text(
        "mine: {memory_gib: 6, tflops: 90, node_gb: 20, share: 0.3}"
    )
    words = ["--cards", str(tmp_path / "cards.yaml"), "--gpu", "mine"]
    code, text = run(capsys, "--recipe", "qwen2_5_vl_3b-match", *words)
    assert code == 1 and "nothing fits: memory: " in text and "8 x mine" in text
    assert text.endswith(
        "to try: more GPUs, a larger card, shorter samples, deepspeed=zero3_offload\n"
    )
    code, text = run(
        capsys, "--recipe", "qwen2_5_vl_3b-match", *words, "deepspeed=zero3_offload",
        "model.adapter=none",
    )  # fmt: skip
    assert code == 1 and text.endswith("shorter samples, model.adapter=lora\n")


def test_what_is_offloaded_takes_time_and_the_hosts_memory(capsys) -> None:
    words = ("model.adapter=none", "deepspeed=zero3_offload")
    away = planner(*words, recipe="qwen2_5_vl_7b-match", gpus=1, per_node=1)
    load = assume(away.config, away.model, None, None)
    plain, moved = (away.plan(load, {"deepspeed": x}) for x in ("zero3", "zero3_offload"))
    weights = away.weights
    least = 3 * moved.chunks * 2 * weights.language / 25e9  # each chunk reads them three times
    assert plain.host == 0 and least < moved.host < 3 * least and moved.binds == "the host"
    assert moved.seconds > plain.seconds
    code = dispatch([
        "plan", "--gpus", "1", "--gpu", "h200", "--recipe", "qwen2_5_vl_7b-match", *words
    ])  # fmt: skip
    text = capsys.readouterr().out
    held = (2 * weights.total + 16 * weights.trained) / 1e9
    assert code == 0 and f"; {held:.1f} GB of weights and optimizer states beside" in text


@pytest.mark.parametrize("begun", [False, True])
def test_a_built_in_recipe_is_measured_on_its_data(capsys, tmp_path, begun) -> None:
    """Also where the stage before is yet to run, or runs."""
    before = tmp_path / "before"
    if begun:
        before.mkdir()
    code, text = run(capsys, "--recipe", "demo-match", f"init_from={before}")
    assert code == 0 and "measured: 256 rows of" in text


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "--recipe is missing"),
        (["--recipe", "demo-match", "--gpu", "h2000"], "--gpu 'h2000': known are h200, h100"),
        (["--recipe", "demo-match", "--gpus", "0"], "--gpus 0: a number above 0"),
        (["--recipe", "demo-match", "--gpus", "3"], "batch_size 256 is not a multiple of the 3"),
        (["--recipe", "demo-match", "--gpus", "8", "--per-node", "3"], "multiple of --per-node 3"),
        (["--recipe", "demo-match", "--price", "-1"], "--price -1"),
        (["--recipe", "demo-match", "--lengths", "/none"], "no lengths.parquet there"),
        (["--recipe", "demo-match", "--cards", "/none"], "--cards '/none': no such file"),
        (["--recipe", "demo-match", "--price", "nan"], "--price nan: a number above 0"),
        (["--against", "/none"], "--against '/none': no run there"),
        (["--against", "/none", "--recipe", "demo-match"], "the run's own config is planned"),
        (["--recipe", "qwen2_5_vl_3b-match", "--text-tokens", "9000"], "takes 8192 at most"),
        (["--recipe", "qwen2_5_vl_3b-match", "--image-tokens", "9000"], "takes 1024 at most"),
        (["--recipe", "demo-match", "optim.sise=3"], "unknown key 'optim.sise'"),
    ],
)
def test_errors_are_sentences(words, said) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        dispatch(["plan", "--gpus", "8", "--gpu", "h200", *words])


FORM = "expected YAML of the form NAME: {memory_gib, tflops, node_gb, share}"


@pytest.mark.parametrize(
    "text, said",
    [
        ("- a list", FORM),
        ("a: [", FORM),
        ("x: 3", FORM),
        ("\0", FORM),
        ("x: {memory: 3}", "x: unknown key 'memory', known are memory_gib, tflops"),
        ("x: {memory_gib: 9, tflops: 1, node_gb: 1}", "x: share is missing"),
        ("h200: {memory_gib: 0}", "h200: memory_gib 0: a number above 0 is expected"),
        ("h200: {tflops: fast}", "h200: tflops 'fast': a number is expected"),
        ("h200: {share: 40}", "h200: share 40: a part of 1 is expected"),
    ],
)
def test_a_wrong_file_of_cards(tmp_path, text, said) -> None:
    (tmp_path / "cards.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"--cards '.*cards.yaml'.*{re.escape(said)}"):
        read_cards(str(tmp_path / "cards.yaml"))


def test_a_card_with_a_rate_of_its_own(tmp_path) -> None:
    (tmp_path / "cards.yaml").write_text("h200: {share: 0.55, measured: 2026-12-01}")
    card = read_cards(str(tmp_path / "cards.yaml"))["h200"]
    assert (card.share, card.measured, card.name) == (0.55, "2026-12-01", "NVIDIA H200")


def test_a_measured_run_says_the_errors_and_its_rate(tmp_path, capsys) -> None:
    """A run that took what was planned has no error; one at half the rate is told so."""
    config = tmp_path / "run" / "config.yaml"
    config.parent.mkdir()
    from coma_ds.config import dump

    config.write_text(dump(load_config("qwen2_5_vl_3b-match", [])))
    plan = json.loads(run(capsys, "--recipe", str(config), "--json")[1])[0]
    for slower in (1, 2):
        lines = []
        for step in range(1, 9):
            took = plan["seconds"] * (slower if step > 3 else 9)
            lines.append({
                "step": step, "group": "train", "samples_per_second": 1024 / took,
                "tflops_per_second": plan["executed"] / took / 1e12,
                "memory_mib": plan["total"] / 2**20 * 1.25, "executed_per_needed": 1.4,
            })  # fmt: skip
        (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        code, text = run(capsys, "--against", str(tmp_path / "run"), "--json")
        found = json.loads(text)["against"]
        assert code == 0 and found["seconds_error"] == pytest.approx(1 / slower - 1, abs=0.01)
        assert found["memory_error"] == pytest.approx(-0.2)
        assert found["memory_gib"] == pytest.approx(plan["total"] * 1.25 / GIB)
        assert abs(found["seconds_error_at_its_rate"]) < 0.02
        assert found["share"] == pytest.approx(0.4 / slower, rel=0.02)
    code, text = run(capsys, "--against", str(tmp_path / "run"))
    assert "h200: {share: 0.1" in text and "measured: run}" in text
    noted = tmp_path / "run" / "versions.txt"
    noted.write_text("torch 2.13.0\nranks 8\ndevice NVIDIA H200 141GB\n")
    assert "steps on NVIDIA H200 141GB\n" in run(capsys, "--against", str(tmp_path / "run"))[1]
    for ranks, device, said in ((8, "cpu", "made on a CPU"), (4, "x", "had 4 ranks: give --gpus")):
        noted.write_text(f"ranks {ranks}\ndevice {device}\n")
        with pytest.raises(ValueError, match=said):
            run(capsys, "--against", str(tmp_path / "run"))
    noted.unlink()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="0 logged steps, fewer than 6"):
        run(capsys, "--against", str(tmp_path / "run"))
