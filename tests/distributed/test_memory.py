"""What the planner says of weights, gradients and optimizer, against the tensors of two ranks."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

from coma_ds.planning.memory import Zero, states
from coma_ds.planning.weights import Weights
from tests.distributed.cases import LORA
from tests.distributed.exact import Case
from tests.distributed.harness import run_world
from tests.distributed.held import write_mechanics

SHARDED, WHOLE = (
    {"stage3_param_persistence_threshold": 0},
    {"stage3_param_persistence_threshold": 1e9},
)
MECHANICS = {
    "zero0": (0, {}), "zero1": (1, {}), "zero2": (2, {}), "sharded": (3, SHARDED),
    "whole": (3, WHOLE),
}  # fmt: skip
WAYS = [("fp32", "full"), ("bf16", "full"), ("bf16", "lora")]


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, list]:
    folder = tmp_path_factory.mktemp("mechanics")
    cases = []
    for name, (stage, more) in MECHANICS.items():
        path = write_mechanics(folder, name, stage, **more)
        for precision, what in WAYS:
            model = LORA if what == "lora" else {}
            named = f"{name} {precision} {what}"
            cases.append(Case(named, path, precision=precision, kind="adamw", model=model))
    return run_world(2, "tests.distributed.held:count", cases=[asdict(c) for c in cases])[0]


@pytest.mark.parametrize("precision, what", WAYS)
@pytest.mark.parametrize("name", MECHANICS)
def test_states_are_what_an_engine_holds(counted, name, precision, what) -> None:
    """Nothing is forgotten; gathered weights and buckets come and go."""
    found = counted[f"{name} {precision} {what}"]
    said = found["said"]
    gone = said["gathered"] + said["whole gradients"]
    lasting = sum(said.values()) - said["buckets"] - gone
    assert 0.97 * lasting < found["after"] < 1.03 * (lasting + said["buckets"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_that_are_reduced_once_are_whole_until_then(counted, precision) -> None:
    """Beside what a step holds where each part is reduced at once, with some gathered weights."""
    once, parts = (counted[f"{name} {precision} full"] for name in ("whole", "sharded"))
    more = once["inside"] - once["after"] - (parts["inside"] - parts["after"])
    assert parts["said"]["whole gradients"] == 0
    assert 0.6 < more / once["said"]["whole gradients"] < 1.2


@pytest.mark.parametrize("world", [1, 8, 64])
def test_all_trained_is_what_deepspeed_estimates(world) -> None:
    """It has the largest layer in fp32 beside the states of stage 3, and at stage 2 gradients in
    16 bits beside those in 32."""
    weights = Weights(vision=10**8, language=9 * 10**8, embedding=10**8, head=0, trained=10**9)
    node = min(world, 8)
    _, theirs, layer = estimate_zero3_model_states_mem_needs(
        10**9, 10**7, num_gpus_per_node=node, num_nodes=world // node, cpu_offload=False,
        cpu_offload_params=False, zero_init=True, additional_buffer_factor=1.0,
    )  # fmt: skip
    ours = states(weights, Zero(3), world=world, item=2, kind="adamw", coalesced=False)
    assert sum(ours.values()) == pytest.approx(theirs - layer, rel=1e-6)
    _, theirs = estimate_zero2_model_states_mem_needs(
        10**9, num_gpus_per_node=node, num_nodes=world // node, cpu_offload=False,
        additional_buffer_factor=1.0,
    )  # fmt: skip
    ours = states(weights, Zero(2), world=world, item=2, kind="adamw", coalesced=False)
    assert sum(ours.values()) == pytest.approx(theirs - 2 * 10**9 / world, rel=1e-6)
