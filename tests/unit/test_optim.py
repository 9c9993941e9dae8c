"""Learning rate, parameter groups, and the optimizers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coma_ds.config import OptimConfig
from coma_ds.optim import MuonAdamW, build_optimizer, learning_rate, parameter_groups
from tests.tiny import tiny_model

CONFIGS = st.builds(
    OptimConfig,
    steps=st.integers(1, 400),
    warmup=st.floats(0, 1),
    lr=st.floats(1e-6, 1.0),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)


@given(CONFIGS)
def test_the_rate_rises_then_falls(config) -> None:
    rates = [learning_rate(step, config) for step in range(config.steps)]
    warm = math.ceil(config.warmup * config.steps)
    assert all(0 < rate <= config.lr * (1 + 1e-12) for rate in rates)
    rise, fall = rates[:warm], rates[warm:]
    assert all(a < b for a, b in pairwise(rise))
    assert not rise or rise[-1] == pytest.approx(config.lr)
    assert not fall or fall[0] == pytest.approx(config.lr)
    if config.schedule == "constant":
        assert all(rate == config.lr for rate in fall)
    else:
        assert all(a > b for a, b in pairwise(fall))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_by_hand(schedule) -> None:
    config = OptimConfig(lr=2.0, steps=110, warmup=0.09, schedule=schedule)  # 10 steps of warm-up
    assert learning_rate(0, config) == pytest.approx(0.2)
    assert learning_rate(4, config) == pytest.approx(1.0)
    assert learning_rate(9, config) == pytest.approx(2.0)
    assert learning_rate(10, config) == pytest.approx(2.0)
    assert learning_rate(60, config) == pytest.approx(1.0)
    quarter = {"cosine": 1 + math.cos(math.pi / 4), "linear": 1.5}[schedule]
    assert learning_rate(35, config) == pytest.approx(quarter)
    assert learning_rate(110, config) == pytest.approx(0.0, abs=1e-12)


def test_no_warm_up_starts_at_the_full_rate() -> None:
    assert learning_rate(0, OptimConfig(lr=3.0, warmup=0.0)) == 3.0


def names_of(model, groups: list[dict]) -> list[set[str]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in groups]


def test_groups_hold_every_trained_parameter_once() -> None:
    model = tiny_model(pooling="attention", temperature=0.05, train_vision=False)
    config = OptimConfig(lr=1e-3, token_lr=4e-3, weight_decay=0.1)
    groups = parameter_groups(model, config)
    names = names_of(model, groups)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set.union(*names) == trained and sum(map(len, names)) == len(trained)
    for group, members in zip(groups, names):
        for name in members:
            token = name == "tokens.weight"
            matrix = dict(model.named_parameters())[name].dim() > 1
            assert group["scale"] == pytest.approx(4.0 if token else 1.0)
            assert group["lr"] == pytest.approx(4e-3 if token else 1e-3)
            assert group["weight_decay"] == (0.1 if matrix and not token else 0.0)
    assert {"tokens.weight"} in names
    assert "pooling.query" in set.union(*names) and "temperature.log_ratio" in set.union(*names)


def test_tokens_follow_the_common_rate_unless_told() -> None:
    groups = parameter_groups(tiny_model(), OptimConfig(lr=1e-3))
    assert all(group["scale"] == 1.0 and group["lr"] == 1e-3 for group in groups)


def test_a_sharded_matrix_is_still_a_matrix() -> None:
    """ZeRO-3 leaves a parameter empty and keeps its shape in ``ds_shape``."""
    model = tiny_model()
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1))
    decayed = [n for g, n in zip(groups, names_of(model, groups)) if g["weight_decay"]]
    assert len(decayed) == 1 and any("q_proj.weight" in name for name in decayed[0])
    assert not any("norm" in name for name in decayed[0])


def test_nothing_to_train_is_an_error() -> None:
    model = tiny_model().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is trained: every parameter is frozen"):
        parameter_groups(model, OptimConfig())


@pytest.mark.parametrize(
    ("kind", "cls"),
    [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("muon", MuonAdamW)],
)
def test_kinds(kind, cls) -> None:
    config = OptimConfig(kind=kind, betas=(0.8, 0.95), lr=1e-2)
    optimizer = build_optimizer(tiny_model(), config)
    assert isinstance(optimizer, cls)
    if kind == "adamw":
        assert all(group["betas"] == (0.8, 0.95) for group in optimizer.param_groups)
        assert all(group["eps"] == 1e-8 for group in optimizer.param_groups)


def fill(model, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=noise)


def values(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


MUON = OptimConfig(kind="muon", lr=1e-2, weight_decay=0.1, betas=(0.9, 0.98))


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    model = tiny_model(train_vision=True)
    optimizer = MuonAdamW(model, MUON)
    matrices, rest = names_of(model, optimizer.param_groups)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert matrices | rest == trained and not matrices & rest
    assert any("q_proj.weight" in name for name in matrices)
    assert any("visual" in name and "attn.qkv.weight" in name for name in matrices)
    assert "tokens.weight" in rest and any("embed_tokens" in name for name in rest)
    assert all(dict(model.named_parameters())[name].dim() == 2 for name in matrices)


def test_muon_steps_as_torch_does_at_the_rate_of_its_groups() -> None:
    """Every trained parameter moves; the rate that the engine sets is the one that counts."""
    model, twin = tiny_model(), tiny_model()
    optimizer = MuonAdamW(model, MUON)
    named = dict(twin.named_parameters())
    matrices, rest = names_of(model, optimizer.param_groups)
    order = [n for n, _ in twin.named_parameters()]
    own = [named[n] for n in order if n in matrices], [named[n] for n in order if n in rest]
    parts = (
        torch.optim.Muon(own[0], lr=1.0, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(own[1], lr=1.0, betas=(0.9, 0.98), weight_decay=0.0),
    )
    before = values(model)
    for step, rate in enumerate((1e-2, 3e-3)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        fill(model, step)
        fill(twin, step)
        optimizer.step()
        for part in parts:
            part.param_groups[0]["lr"] = rate
            part.step()
    after, wanted = values(model), values(twin)
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)
    assert all(not torch.equal(after[name], before[name]) for name in matrices | rest)


def test_muon_continues_from_its_state() -> None:
    """Two steps, saved, loaded into a new one, a third: bit-equal to three steps."""
    straight, first, second = tiny_model(), tiny_model(), tiny_model()
    whole, part = MuonAdamW(straight, MUON), MuonAdamW(first, MUON)
    for step in range(2):
        for model, optimizer in ((straight, whole), (first, part)):
            fill(model, step)
            optimizer.step()
    second.load_state_dict(first.state_dict())
    loaded = MuonAdamW(second, MUON)
    loaded.load_state_dict(part.state_dict())
    for model, optimizer in ((straight, whole), (second, loaded)):
        fill(model, 2)
        optimizer.step()
    found, wanted = values(second), values(straight)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    fresh = MuonAdamW(first, MUON)  # without the state the third step is another one
    fill(first, 2)
    fresh.step()
    assert any(not torch.equal(a, b) for a, b in zip(values(first).values(), wanted.values()))
