"""DeepSpeed, and nothing else knows it: start, wrap, backward, step.

The only importer of deepspeed (with ``checkpoint``'s conversion of shards).
"""

from __future__ import annotations

import copy
import ctypes
import io
import json
import logging
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import safe_get_full_grad, set_z3_leaf_modules

from coma_ds.config import RunConfig
from coma_ds.optim import learning_rate

log = logging.getLogger("coma_ds")

Result = TypeVar("Result")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # malloc.h
# What the run config says; a DeepSpeed file that says it too is an error.
OWNED_BY_RUN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "torch_autocast",
    "data_types",
)


def start(timeout_minutes: int | None = None) -> torch.device:
    """Join the world that the launcher described (a world of one without it); the rank's device."""
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        os.environ.update(alone)
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    _quiet()
    if timeout_minutes:
        os.environ.setdefault("DEEPSPEED_TIMEOUT", str(timeout_minutes))
    on_gpu = torch.cuda.is_available()
    # The shared-memory collectives are compiled at first use (half a minute) for the same result.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cpu")
    if not on_gpu:
        _keep_freed_memory()
    else:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", verbose=False)
    return device


def _quiet() -> None:
    """Keep what libraries say at every start off the screen; their errors stay."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by the names that torch is about to change.
    warnings.filterwarnings("ignore", message=r".*`torch\.distributed\.\w+` is deprecated")


def share_threads() -> None:
    """Divide the cores that this job may use among the ranks of the machine.

    ``OMP_NUM_THREADS``, where it is set, is what each rank takes instead.
    """
    told = os.environ.get("OMP_NUM_THREADS", "")
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1
    fair = len(os.sched_getaffinity(0)) // int(ranks)
    torch.set_num_threads(max(1, int(told) if told.isdigit() else fair))


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, instead of giving it back to the kernel.

    Activations of a step are large blocks; on virtual machines the page faults of mapping them
    anew cost several times the arithmetic (measured: 0.6 s a step against 5 to 14 s).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_ARENA_MAX, 1)  # arenas of other threads are mapped and trimmed regardless
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**28)
    except (OSError, AttributeError):  # another C library
        log.debug("no mallopt here")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read_mechanics(name: str) -> dict:
    """The ZeRO mechanics: a name of ``ds_configs/`` or a JSON file.

    Raises ``ValueError`` for a file that is missing, is no JSON object, or says what the run
    config owns.
    """
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"deepspeed file {name!r} does not exist")
        text = path.read_text()
    else:
        folder = resources.files("coma_ds.ds_configs")
        known = sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".json"))
        if name not in known:
            raise ValueError(f"deepspeed {name!r}: expected a JSON file or one of {known}")
        text = folder.joinpath(f"{name}.json").read_text()
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed file {name!r} is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"deepspeed file {name!r}: expected an object, found {tree!r:.60}")
    for key in OWNED_BY_RUN:
        if key in tree:
            raise ValueError(
                f"deepspeed file {name!r} sets {key!r}, which the run config owns "
                "(optim.batch_size, optim.clip, optim.lr, precision): take it out"
            )
    return tree


def deepspeed_config(config: RunConfig) -> dict:
    """The complete DeepSpeed config of a run: the file's mechanics and the run's numbers.

    One forward at a time is one micro batch; accumulation is ours (boundaries), so 1 there.
    Raises ``ValueError`` naming the file for what DeepSpeed does not accept.
    """
    tree = read_mechanics(config.deepspeed)
    zero = tree.setdefault("zero_optimization", {"stage": 0})
    stage = zero.setdefault("stage", 0) if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(
            f"deepspeed file {config.deepspeed!r}: zero_optimization.stage must be 0, 1, 2 or 3, "
            f"found {zero!r:.60}"
        )
    if '"auto"' in json.dumps(tree):
        raise ValueError(
            f"deepspeed file {config.deepspeed!r} holds 'auto', which transformers' Trainer fills "
            "in: give the value, or leave the key out for DeepSpeed's default"
        )
    tree |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip,  # DeepSpeed clips at 1.0 when it is not said
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if config.precision == "bf16":
        tree["bf16"] = {"enabled": True}
        if stage > 0:  # without ZeRO DeepSpeed has no fp32 accumulation for bf16 parameters
            tree["data_types"] = {"grad_accum_dtype": "fp32"}
    try:
        DeepSpeedConfig(copy.deepcopy(tree))
    except Exception as error:  # of all kinds, by the section that is wrong
        where = ""
        if hasattr(error, "errors"):  # pydantic's
            first = error.errors()[0]
            where, error = ".".join(map(str, first["loc"])) + ": ", first["msg"]
        raise ValueError(
            f"deepspeed file {config.deepspeed!r} is not what DeepSpeed accepts: {where}{error}"
        ) from None
    return tree


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
        with redirect_stdout(io.StringIO()):  # its bf16 optimizer prints tables of memory
            self._engine, self.optimizer, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=self.ds_config
            )
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
        return self._engine(call)

    def forward_backward(self, call: Callable[[Any], tuple[torch.Tensor, Result]], *, last: bool):
        """One part of an optimizer step: forward, then backward of the scalar it returns.

        ``call(model)`` returns (loss, anything); the second is handed back.  ``last`` marks the
        last part of the step, on every rank the same.  Stage 3 counts parts by forwards, so every
        backward has a forward of its own, and DeepSpeed must know the boundary before both.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        loss, result = self._engine(call)
        self._engine.backward(loss)
        return result

    def step(self, step: int) -> StepResult:
        """Clip and update, with the rate of ``step``; skipped as a whole on a bad gradient."""
        rate = learning_rate(step, self.config.optim)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
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

    def discard_gradients(self) -> None:
        """Forget the gradients of an unfinished step: a step at rate 0, then nothing is left."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = 0.0
        self._engine.step()

    def save(self, folder: Path, tag: str) -> None:
        """DeepSpeed's shards of this rank under ``folder/tag``; no pointer file is written."""
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Read what ``save`` wrote; raises ``ValueError`` when there is nothing to read."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise ValueError(f"checkpoint {folder / tag}: DeepSpeed found nothing to load")

    def destroy(self) -> None:
        """Free hooks and buffers (several engines may live in one process, one at a time)."""
        self._engine.destroy()


@contextmanager
def full_parameters(parameters: Iterable[torch.nn.Parameter], *, modify: bool = False):
    """The parameters whole on every rank; with ``modify`` rank 0's changes are kept."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    context = nullcontext()
    if sharded:
        context = deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if modify else None)
    with context:
        yield
