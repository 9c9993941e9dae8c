"""Train one stage on the devices of this machine, through the DeepSpeed launcher."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from coma_ds import rank_report
from coma_ds.rank_report import RankReport

EXAMPLES = """Other options (--dry-run, --verify-gradients, ...) go to coma_ds/train.py as they are.

examples:
  coma-ds train
  coma-ds train --num 2 --recipe demo-match optim.steps=50
  coma-ds train --recipe qwen2_5_vl_3b-match data.root=/data/mmeb optim.lr=2e-5 --dry-run"""

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 10.0  # seconds between asking processes to end and ending them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument(
        "--num",
        type=int,
        metavar="N",
        help="ranks (default: one for each GPU, one where there is none)",
    )
    parser.add_argument(
        "--recipe",
        default="demo-compress",
        help="a shipped name or a YAML file (default: demo-compress); coma-ds config --list",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="a value in place of the recipe's"
    )


def execute(args: argparse.Namespace) -> int:
    """Check the config, start the job, wait for it; its exit code.

    Raises ``ValueError`` for a config or a number of ranks that is wrong.
    """
    from coma_ds.config import load_config
    from coma_ds.effects import check_effect

    check_effect(load_config(args.recipe, args.overrides), args.overrides)
    command, environment, ranks = launch(args.num)
    command += ["--recipe", args.recipe, *args.rest, *args.overrides]
    with tempfile.TemporaryDirectory(prefix="coma-ds-") as folder:
        environment[rank_report.FOLDER] = folder
        returncode = supervise(command, environment)
        code, message = verdict(returncode, rank_report.read_reports(Path(folder)), ranks)
    if message:
        sys.stderr.write(f"\n{message}\n")
    return code


def launch(num: int | None) -> tuple[list[str], dict[str, str], int]:
    """The launcher's command up to the training script, its environment, and the ranks.

    Raises ``ValueError`` for a number that the machine cannot serve.
    """
    import torch

    devices = torch.cuda.device_count()
    if num is not None and num < 1:
        raise ValueError(f"--num {num}: expected 1 or more")
    if devices and num and num > devices:
        raise ValueError(f"--num {num}, but this machine has {devices} GPU(s)")
    ranks = num or max(1, devices)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = dict(os.environ)
    if not devices:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    # This machine only, whatever hostfile lies about; -P: no module of the current folder.
    command = [sys.executable, "-P", "-m", "deepspeed.launcher.runner", "--hostfile", os.devnull]
    command += ["--master_port", str(port), "--log_level", "error"]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if devices and visible:  # which the launcher would ignore beside a number
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:ranks])
    else:
        command += ["--num_gpus" if devices else "--num_accelerators", str(ranks)]
    return [*command, str(Path(__file__).parents[1] / "train.py")], environment, ranks


class _Stopped(Exception):
    """A signal asks this command to end."""


def supervise(command: list[str], environment: dict[str, str]) -> int:
    """Run the job in a process group of its own; the launcher's return code.

    Nothing of the group outlives this call.  A signal that ends this command ends the job; the
    result is then the signal's number, negative.
    """
    received: list[int] = []

    def stop(number, frame):
        received.append(number)
        raise _Stopped

    heard = [n for n in STOPS if signal.getsignal(n) is not signal.SIG_IGN]  # nohup ignores one
    before = {number: signal.signal(number, stop) for number in heard}
    child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)
    try:
        return child.wait()
    except _Stopped:
        return -received[0]
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_IGN)
        end_group(child)
        for number, handler in before.items():
            signal.signal(number, handler)


def end_group(child: subprocess.Popen) -> None:
    """Ask the processes of the child's group to end, and end those that do not."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 1.0)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            return
        until = time.monotonic() + patience
        while time.monotonic() < until:
            child.poll()
            try:
                os.killpg(child.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


def verdict(returncode: int, reports: list[RankReport], ranks: int) -> tuple[int, str]:
    """The exit code of a job and the last thing to say of it.

    The launcher's code alone is not the truth: it is 0 when a signal ended the launcher's child.
    A job has succeeded when every rank said so.
    """
    failed = sorted((r for r in reports if r.code), key=lambda r: r.time)
    if failed:
        return failed[0].code, failed[0].message
    if -returncode in STOPS:
        return 128 - returncode, f"stopped by {signal.Signals(-returncode).name}"
    silent = sorted(set(range(ranks)) - {r.rank for r in reports})
    if not silent:
        if returncode:
            return _exit_code(returncode), f"error: the launcher ended with code {returncode}"
        return 0, ""
    who = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
    code = _exit_code(returncode) or 1
    return code, f"error: {who} ended without a word{_reason(returncode, code)}"


def _exit_code(returncode: int) -> int:
    """128 + N for signal N: the launcher passes a rank's -N on as 256 - N."""
    if returncode < 0:
        return 128 - returncode
    number = 256 - returncode
    return 128 + number if number in set(signal.Signals) else returncode


def _reason(returncode: int, code: int) -> str:
    if code - 128 in set(signal.Signals):
        name = signal.Signals(code - 128).name
        memory = "; as a rule the machine ran out of memory" if name == "SIGKILL" else ""
        return f": a process of the job was ended by {name}{memory}"
    if returncode == 0:
        return ": the launcher was ended by a signal, though its exit code is 0"
    return f": the launcher ended with code {returncode}, its own lines above say why"
