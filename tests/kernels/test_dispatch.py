"""Which implementation runs, why, and what is said about it."""

from __future__ import annotations

import logging

import pytest
import torch

from coma_ds.kernels.dispatch import choice, choose, outlook
from coma_ds.kernels.info_nce import info_nce

CPU = torch.zeros(1)


@pytest.fixture
def machine(monkeypatch):
    """A machine of one's own: with or without Triton, with or without its interpreter."""

    def make(mode: str | None = None, interpret: str = "0", failure: str | None = None) -> None:
        monkeypatch.delenv("COMA_KERNELS", raising=False)
        if mode is not None:
            monkeypatch.setenv("COMA_KERNELS", mode)
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        monkeypatch.setattr(choice, "_import_failure", lambda: failure)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")

    return make


@pytest.mark.parametrize(
    ("device", "mode", "interpret", "failure", "supported", "wanted", "reason"),
    [
        ("cpu", None, "0", None, None, "torch", "the tensors are on the CPU"),
        ("cpu", "auto", "1", None, None, "torch", "COMA_KERNELS=triton asks"),
        ("cpu", "triton", "1", None, None, "triton", "COMA_KERNELS=triton"),
        ("cpu", "torch", "1", None, None, "torch", "COMA_KERNELS=torch"),
        ("cuda", None, "0", None, None, "triton", "a card"),
        ("cuda", "auto", "0", "no triton here", None, "torch", "no triton here"),
        ("cuda", "auto", "0", None, "float64 input", "torch", "float64 input"),
        ("cuda", "torch", "0", None, None, "torch", "COMA_KERNELS=torch"),
        ("xpu", "auto", "0", None, None, "torch", "a device of type xpu"),
    ],
)
def test_choice_and_reason(
    device, mode, interpret, failure, supported, wanted, reason, machine
) -> None:
    machine(mode, interpret, failure)
    found = outlook("op", device, supported)
    assert found[0] == wanted and reason in found[1]


@pytest.mark.parametrize(
    ("device", "interpret", "failure", "supported", "message"),
    [
        ("cpu", "0", None, None, "op cannot run on Triton: the tensors are on the CPU; use 'auto'"),
        ("cuda", "0", "triton cannot be imported (X)", None, "imported"),
        ("cuda", "0", None, "float64 input", "op cannot run on Triton: float64 input"),
    ],
)
def test_triton_where_it_is_impossible(
    device, interpret, failure, supported, message, machine
) -> None:
    machine("triton", interpret, failure)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        outlook("op", device, supported)


def test_unknown_mode(machine) -> None:
    machine("cuda")
    with pytest.raises(ValueError, match="COMA_KERNELS='cuda': expected 'auto', 'triton' or 'tor"):
        choose("op", CPU)


def test_devices_may_not_differ(machine) -> None:
    machine()
    with pytest.raises(ValueError, match="op: tensors on cpu, meta: expected all on one device"):
        choose("op", CPU, None, torch.zeros(1, device="meta"))


def test_said_once_for_each_reason(machine, monkeypatch, caplog) -> None:
    machine()
    monkeypatch.setattr(choice, "_said", set())
    with caplog.at_level(logging.DEBUG, logger="coma_ds"):
        for supported in (None, None, "x", "x"):
            assert choose("op", CPU, supported=supported) == "torch"
        machine("torch")
        choose("op", CPU)
        choose("other", CPU)
    said = [r.message for r in caplog.records]
    assert said == [
        "op: torch (the tensors are on the CPU)",
        "op: torch (COMA_KERNELS=torch)",
        "other: torch (COMA_KERNELS=torch)",
    ]


def test_a_broken_triton_is_a_reason(monkeypatch) -> None:
    def broken(name):
        raise OSError("no such library")

    choice._import_failure.cache_clear()
    monkeypatch.setattr(choice.importlib, "import_module", broken)
    try:
        assert "OSError: no such library" in choice._import_failure()
    finally:
        choice._import_failure.cache_clear()


def test_info_nce_asks(machine) -> None:
    machine("triton")
    with pytest.raises(ValueError, match="info_nce cannot run on Triton: the tensors are on the C"):
        info_nce(torch.ones(1, 2), torch.ones(1, 2), positive_index=0, temperature=1.0)
