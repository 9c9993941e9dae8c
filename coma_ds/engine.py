"""DeepSpeed, and nothing else knows it: start, wrap, backward, step.

The only importer of deepspeed, with ``mechanics``, which reads its config.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import safe_get_full_grad, safe_set_full_grad, set_z3_leaf_modules

from coma_ds import comm
from coma_ds.config import RunConfig
from coma_ds.disk import unwritable
from coma_ds.hardware import keep_freed_memory
from coma_ds.mechanics import deepspeed_config
from coma_ds.model.adapters import adapter_layers
from coma_ds.optim import learning_rate

log = logging.getLogger("coma_ds")

Result = TypeVar("Result")
FINGERPRINT_AT_A_TIME = 2**22  # elements, for memory
BUCKET = 500_000_000  # elements, DeepSpeed's default
HELD = -1  # in place of the number of a submodule


def start(timeout_minutes: int | None = None) -> torch.device:
    """Join the world that the launcher described (a world of one without it); the rank's device.

    Raises ``ValueError`` when another process has the port at which the ranks would meet.
    """
    alone = "RANK" not in os.environ
    if alone:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # DeepSpeed wants to see some
    _quiet()
    if timeout_minutes:
        os.environ.setdefault("DEEPSPEED_TIMEOUT", str(timeout_minutes))
    on_gpu = torch.cuda.is_available()
    # The shared-memory collectives are compiled at first use (half a minute) for the same result.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cpu")
    if not on_gpu:
        keep_freed_memory()
    else:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    if alone and not dist.is_initialized():  # no port, which another process might take
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        deepspeed.init_distributed(backend, verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ValueError(comm.port_in_use()) from error
    return device


def _quiet() -> None:
    """Keep what libraries say at every start off the screen; their errors stay."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by the names that torch is about to change.
    warnings.filterwarnings("ignore", message=r".*`torch\.distributed\.\w+` is deprecated")


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did; ``grad_norm`` before clipping, inf for a skipped step."""

    applied: bool
    grad_norm: float
    lr: float


class Engine:
    """A wrapped model.  ``engine(call)`` runs ``call(model)`` inside DeepSpeed's forward."""

    def __init__(self, model, optimizer, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.ds_config = deepspeed_config(config)
        self.stage = self.ds_config["zero_optimization"].get("stage", 0)
        if self.stage and config.optim.kind == "muon":
            raise ValueError("optim.kind 'muon' needs whole matrices: use deepspeed=zero0")
        if self.stage == 3:
            set_z3_leaf_modules(model, model.shard_units())
        # DeepSpeed takes the room of its default at once, a GB, also for adapters of a few MB.
        trained = sum(
            getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad
        )
        self.ds_config["zero_optimization"].setdefault("reduce_bucket_size", min(BUCKET, trained))
        with redirect_stdout(io.StringIO()):  # its bf16 optimizer prints tables of memory
            self._engine, self.optimizer, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=self.ds_config
            )
        self._frozen: dict[str, int | str] | None = None
        lm = model.backbone.lm
        table = lm.get_input_embeddings().weight
        if self.stage == 3 and config.objective == "compress" and model.answers.weight is table:
            # Whole from the embedding to the head of a forward, and back, instead of twice.
            deepspeed.zero.register_external_parameter(model, table)
        self._whole = [p for p in model.parameters() if getattr(p, "ds_persist", False)]
        few_trained = bool(adapter_layers(lm)) and not model.vision_is_trained
        self.keeps_weights_whole = len(self._whole) == len(list(model.parameters()))
        self.reduces_once = self.stage == 3 and (few_trained or self.keeps_weights_whole)
        self._forgets = self._coalesces = False
        self._sums: dict[torch.nn.Parameter, torch.Tensor] = {}
        clip = self._engine.gradient_clipping()
        if clip != config.optim.clip:
            raise RuntimeError(f"DeepSpeed clips at {clip}, not at {config.optim.clip}")
        self.train()

    @property
    def model(self):
        """The bare module: for its methods inside ``engine(call)``, never called directly."""
        return self._engine.module

    def train(self) -> None:
        """Switch dropout on."""
        self._engine.train()

    def eval(self) -> None:
        """Switch dropout off."""
        self._engine.eval()

    def __call__(self, call: Callable[[Any], Result]) -> Result:
        self._hold()
        return self._engine(call)

    def _hold(self) -> None:
        """Keep weights whole until the step that file ``deepspeed`` lets be whole.

        DeepSpeed (0.19.8) frees them all the same as long as each forward is unlike the last, as
        those of a tower and of a language model are.
        """
        if self._engine.training:
            for parameter in self._whole:
                parameter.ds_active_sub_modules.add(HELD)

    def forward_backward(self, call: Callable[[Any], tuple[torch.Tensor, Result]], *, last: bool):
        """One part of an optimizer step: forward, then backward of the scalar it returns.

        ``call(model)`` returns (loss, anything); the second is handed back.  ``last`` marks the
        last part of the step, on every rank the same.  Stage 3 counts parts by forwards, so every
        backward has a forward of its own, and DeepSpeed must know the boundary before both.
        """
        if not self._coalesces:
            self._engine.set_gradient_accumulation_boundary(last)
        loss, result = self(call)
        self.backward(loss, last=last)
        return result

    @contextmanager
    def gradients_of_a_step(self, *, kept: bool = False):
        """Around all forwards and backwards of one optimizer step; ``kept``: graphs of several
        forwards wait for their ``backward``.

        Under ZeRO-3 the gradients of adapters, small as they are, stay whole on every rank until
        the end and are reduced once; so do all gradients where the weights may be whole.  What
        else is trained is reduced after every part, so that no gradient is ever whole; stages 1 to
        3 then take a second backward without a forward in between for the first of a step, unless
        they are told.
        """
        self._coalesces = self.reduces_once
        self._forgets = kept and self.stage > 0 and not self._coalesces
        try:
            with self._engine.coalesce_grad_reduction() if self._coalesces else nullcontext():
                yield
                if self._sums:
                    for parameter, total in self._sums.items():
                        parameter.grad.copy_(total)
        finally:
            self._forgets = self._coalesces = False
            self._sums.clear()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Backward of a scalar whose forward went through this engine; ``last`` as for
        ``forward_backward``."""
        if not self._coalesces:
            self._engine.set_gradient_accumulation_boundary(last)
        if self._forgets:
            self._engine.optimizer.clear_backward_seen_flag()
        self._engine.backward(loss)
        if self._coalesces and self.config.precision == "bf16":
            self._add_up()

    def _add_up(self) -> None:
        """Move gradients into fp32 sums: bf16 is too coarse to add up many parts."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                if parameter not in self._sums:
                    self._sums[parameter] = torch.zeros_like(parameter.grad, dtype=torch.float32)
                self._sums[parameter] += parameter.grad
                parameter.grad.zero_()  # it stays: the weight itself is sharded, and has no shape

    def step(self, step: int) -> StepResult:
        """Clip and update, with the rate of ``step``; skipped as a whole on a bad gradient."""
        rate = learning_rate(step, self.config.optim)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        for parameter in self._whole:
            parameter.ds_active_sub_modules.discard(HELD)
        norm = None
        if self.stage == 0 and self.config.precision != "bf16":
            # DeepSpeed (0.19.8) hands this case to torch's optimizer: it keeps no norm and checks
            # nothing.  The gradients are reduced by now, so every rank finds the same.
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(norm):
                self._engine.zero_grad()
                return StepResult(applied=False, grad_norm=math.inf, lr=rate)
        self._engine.step()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        return StepResult(applied=self._engine.was_step_applied(), grad_norm=norm, lr=rate)

    def gradients(self) -> dict[str, torch.Tensor]:
        """The whole reduced gradient of every trained parameter, float32 on the host.

        Between the last ``forward_backward`` and ``step``; every rank calls it.
        """
        found = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                gradient = safe_get_full_grad(parameter)
                if gradient is None:
                    gradient = torch.zeros(1)
                found[name] = gradient.detach().float().cpu().clone()
        return found

    def spoil_gradients(self) -> None:
        """Make ``step`` skip this step on every rank, as for a gradient that is not finite."""
        parameter = min(
            (p for p in self.model.parameters() if p.requires_grad),
            key=lambda p: p.ds_numel if hasattr(p, "ds_id") else p.numel(),
        )
        shape = parameter.ds_shape if hasattr(parameter, "ds_id") else parameter.shape
        spoilt = torch.full(tuple(shape), math.nan, device=self.device)
        safe_set_full_grad(parameter, spoilt)

    def discard_gradients(self) -> None:
        """Forget the gradients of an unfinished step: a step at rate 0, then nothing is left."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = 0.0
        self._engine.step()

    def save(self, folder: Path, tag: str) -> tuple[list[Path], list[str]]:
        """DeepSpeed's shards of this rank under ``folder/tag``, frozen weights left out.

        Returns the files of this rank, and what could not be written: a full disk raises on no
        rank, so that none waits for another.  No pointer file is written.
        """
        writer = _Writer(self._engine.checkpoint_engine)
        self._engine.checkpoint_engine = writer
        # A script of DeepSpeed's that it puts beside its shards, whether there is room or not.
        self._engine._copy_recovery_script = lambda path: None
        hook = self.model.register_state_dict_post_hook(_drop_frozen)
        try:
            self._engine.save_checkpoint(
                str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True
            )
        finally:
            hook.remove()
            self._engine.checkpoint_engine = writer.engine
        return writer.files, writer.problems

    def load(self, folder: Path, tag: str) -> None:
        """Read what ``save`` wrote; frozen weights stay as they are.

        Raises ``ValueError`` when there is nothing to read, or another set of weights.
        """
        path, _ = self._engine.load_checkpoint(
            str(folder), tag=tag, custom_load_fn=_load_all_but_frozen
        )
        if path is None:
            raise ValueError(f"checkpoint {folder / tag}: DeepSpeed found nothing to load")

    def load_universal(self, folder: Path, tag: str) -> None:
        """Read a checkpoint in DeepSpeed's universal form, of any world size."""
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._engine.optimizer.param_groups
        ]
        self._engine._config.load_universal_checkpoint = True
        try:
            self.load(folder, tag)
        finally:
            self._engine._config.load_universal_checkpoint = False
        # DeepSpeed (0.19.8, stage 3) gives every group the settings of the first, and all of them
        # one and the same step counter, which then counts once for each.
        for group, own in zip(self._engine.optimizer.param_groups, groups, strict=True):
            group.update(own)
        for state in getattr(self._engine.optimizer, "optimizer", self.optimizer).state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    def frozen_weights(self) -> dict[str, int | str]:
        """Number and fingerprint of the weights that a checkpoint leaves out; empty without any.

        The fingerprint is the same at any world size and ZeRO stage.  Every rank calls it; what
        it costs is paid once.
        """
        if self._frozen is None:
            frozen = [(n, p) for n, p in self.model.named_parameters() if not p.requires_grad]
            self._frozen = {}
            if frozen:
                total = sum(p.ds_numel if hasattr(p, "ds_id") else p.numel() for _, p in frozen)
                self._frozen = {"parameters": total, "fingerprint": _fingerprint(frozen)}
        return self._frozen

    def destroy(self) -> None:
        """Free hooks and buffers (several engines may live in one process, one at a time)."""
        self._engine.destroy()


class _Writer(TorchCheckpointEngine):
    """Writes as ``engine`` does; remembers the files, and the errors instead of raising them."""

    def __init__(self, engine) -> None:
        super().__init__()
        self.engine, self.name = engine, engine.name
        self.files: list[Path] = []
        self.problems: list[str] = []

    def save(self, state_dict, path: str) -> None:
        try:
            self.engine.save(state_dict, path)
            self.files.append(Path(path))
        except (OSError, RuntimeError) as error:  # torch does not tell a full disk as such
            self.problems.append(unwritable(Path(path), error))


def _drop_frozen(module, state: dict, prefix: str, _) -> None:
    """DeepSpeed leaves a frozen weight out under the first of its names only."""
    if not prefix:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                state.pop(name, None)


def _load_all_but_frozen(src: dict, dst) -> None:
    missing, unexpected = dst.load_state_dict(src, strict=False)
    trained = {n for n, p in dst.named_parameters(remove_duplicate=False) if p.requires_grad}
    if problems := sorted(trained.intersection(missing)) + sorted(unexpected):
        raise ValueError(f"the checkpoint is of another model: {', '.join(problems[:5])}")


def _fingerprint(parameters: list[tuple[str, torch.nn.Parameter]]) -> str:
    """A sum over all elements of their bits mixed with name and place: shards add up to it."""
    total = None
    for name, parameter in parameters:
        start, values = 0, parameter.detach().flatten()
        if hasattr(parameter, "ds_id"):
            values = parameter.ds_tensor.detach().flatten()
            start = comm.rank() * values.numel()
            values = values[: max(0, parameter.ds_numel - start)]  # the last shard is padded
        elif comm.rank():
            values = values[:0]
        if total is None:
            total = torch.zeros(1, dtype=torch.int64, device=parameter.device)
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
        for first in range(0, values.numel(), FINGERPRINT_AT_A_TIME):
            part = values[first : first + FINGERPRINT_AT_A_TIME]
            bits = part.view(torch.int16 if part.element_size() == 2 else torch.int32).long()
            place = torch.arange(len(bits), device=bits.device) + (start + first + seed)
            mixed = (bits + 1) * -7046029254386353131 + place * -4658895280553007687
            mixed = (mixed ^ (mixed >> 29)) * -7723592293110705685
            total += (mixed ^ (mixed >> 32)).sum()
    return f"{int(comm.all_sum(total)) & (2**64 - 1):016x}"


@contextmanager
def full_parameters(parameters: Iterable[torch.nn.Parameter], *, modify: bool = False):
    """The parameters whole on every rank; with ``modify`` rank 0's changes are kept."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    context = nullcontext()
    if sharded:
        context = deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if modify else None)
    with context:
        yield
