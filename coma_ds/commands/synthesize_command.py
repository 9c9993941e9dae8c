"""Write dialogues for stage 1 about the images of a folder or of MMEB-train, with a model."""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coma_ds.data.chat import Chat
    from coma_ds.synthesis.output import Output

EXAMPLES = """The model writes questions about an image, then answers them as one conversation.  The
output is in LLaVA's form, image paths start at the folder of images: it is read by
  data.format=dialogues data.path=OUTPUT data.image_root=FOLDER
The order of the images is drawn by --seed, and rows stand in that order, so --limit N takes a
fair sample, and a larger N goes on from it.  The same command goes on where a run was stopped.
A reply that is not well formed is asked for again, three times in all; then the image is left out
and listed in OUTPUT's NAME.rejected.jsonl (delete that file to try those images again).

examples:
  coma-ds synthesize --images photos --output dialogues.jsonl \\
      --server http://localhost:8000/v1 --model Qwen/Qwen2.5-VL-7B-Instruct
  coma-ds synthesize --mmeb /data/mmeb/train --image-root /data/mmeb/images \\
      --sources OK-VQA MSCOCO_i2t --output dialogues.jsonl --server https://host/v1 \\
      --model NAME --api-key-env MY_KEY --parallel 128
  coma-ds synthesize --images photos --output tried.jsonl --limit 20 \\
      --model Qwen/Qwen2.5-VL-3B-Instruct"""

PER_SOURCE, PIXELS = 30_000, 1024 * 28 * 28
THREADS, BATCH = 32, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--images", metavar="FOLDER", help="every image file below this folder")
    images.add_argument(
        "--mmeb", metavar="ROOT", help="the images of MMEB-train: a folder of sets, or a hub name"
    )
    parser.add_argument(
        "--image-root", metavar="DIR", help="with --mmeb: the folder where image paths start"
    )
    parser.add_argument(
        "--sources", nargs="+", metavar="SET", help="with --mmeb: its sets (default: all)"
    )
    parser.add_argument(
        "--per-source",
        type=int,
        metavar="N",
        help=f"with --mmeb: unique images of a set at most (default: {PER_SOURCE})",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="a name in .jsonl")
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="the name the server knows it by; without --server a model folder, a run or a hub "
        "name, in this process",
    )
    parser.add_argument(
        "--server", metavar="URL", help="an OpenAI-compatible server, as http://host:8000/v1"
    )
    parser.add_argument(
        "--api-key-env", metavar="VAR", help="the environment variable that holds the server's key"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        metavar="N",
        help=f"images at a time: requests to a server (default: {THREADS}), or a batch in "
        f"process (default: {BATCH})",
    )
    parser.add_argument(
        "--turns",
        type=int,
        nargs=2,
        default=(3, 5),
        metavar=("LEAST", "MOST"),
        help="turns of a dialogue; 98.6 %% have the most (default: 3 5)",
    )
    parser.add_argument("--temperature", type=float, default=0.7, metavar="T", help="default: 0.7")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="a reply that is longer is not well formed (default: 1024)",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=PIXELS,
        metavar="N",
        help=f"larger images are scaled down (default: {PIXELS}, the 1024 image tokens of the "
        "recipes)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N images only")
    parser.add_argument(
        "--device", help="in process: cpu, cuda, cuda:1, ... (default: a GPU if there is one)"
    )


def check(args: argparse.Namespace) -> None:
    """Raise ``ValueError`` for arguments that do not fit together or are out of range."""
    of_mmeb = {"--image-root": args.image_root, "--sources": args.sources}
    of_mmeb["--per-source"] = args.per_source
    if args.mmeb is None:
        if given := [name for name, value in of_mmeb.items() if value is not None]:
            raise ValueError(f"{given[0]} goes with --mmeb only")
    elif args.image_root is None:
        raise ValueError("--mmeb needs --image-root, the folder where its image paths start")
    if args.server is None and args.api_key_env is not None:
        raise ValueError("--api-key-env goes with --server only")
    if args.server is not None and args.device is not None:
        raise ValueError("--device is for a model in this process, leave it out with --server")
    least, most = args.turns
    if not 1 <= least <= most:
        raise ValueError(f"--turns {least} {most}: expected LEAST MOST, 1 <= LEAST <= MOST")
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature {args.temperature}: expected 0 or more")
    for name in ("parallel", "per_source", "limit", "max_tokens", "max_pixels"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
    if args.server is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("this command is one process: for several GPUs start a server (--server)")


def api_key(variable: str | None) -> str:
    """The key in an environment variable; empty without one named.

    Raises ``ValueError`` for one that is not set or holds no key, without saying what it holds.
    """
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"--api-key-env {variable}: the environment variable is not set")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"--api-key-env {variable}: it holds what can be no key")
    return key


def settings(args: argparse.Namespace, root: str) -> dict[str, Any]:
    """What decides the dialogue of an image: a run goes on only with the same."""
    from coma_ds.synthesis.talk import PROMPT

    return {
        "images": os.path.realpath(root),
        "model": args.model,
        "turns": list(args.turns),
        "temperature": args.temperature,
        "max_tokens": args.max_tokens,
        "max_pixels": args.max_pixels,
        "seed": args.seed,
        "prompt": PROMPT,
    }


def open_chat(args: argparse.Namespace, key: str) -> Chat:
    """The server's model, or one in this process."""
    limits = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    limits["max_pixels"] = args.max_pixels
    if args.server is not None:
        from coma_ds.synthesis.server import ChatServer

        return ChatServer(args.server, args.model, key=key, **limits)
    from coma_ds.model.generate import LocalChat

    return LocalChat(args.model, device=args.device, **limits)


def wanted_images(args: argparse.Namespace, root: str) -> list[str]:
    """The names of the images in the order of the output.  Raises ``ValueError`` for none."""
    from coma_ds.data.listing import folder_images, in_drawn_order, mmeb_images

    if not os.path.isdir(root):
        raise ValueError(f"{root}: no such folder of images")
    if args.mmeb is None:
        names = folder_images(root)
    else:
        per_source = args.per_source or PER_SOURCE
        names = mmeb_images(args.mmeb, args.sources or (), per_source, args.seed)
    return in_drawn_order(names, args.seed)[: args.limit]


def write_dialogues(
    args: argparse.Namespace, root: str, names: list[str], chat: Chat, output: Output
) -> None:
    """Ask about the images ``names`` and write what comes, under a progress bar."""
    from tqdm import tqdm

    from coma_ds.data.images import FilePicture
    from coma_ds.synthesis.output import write_all
    from coma_ds.synthesis.schedule import in_batches, in_threads
    from coma_ds.synthesis.talk import ATTEMPTS, talk

    def see(name: str) -> Any:
        return chat.see(FilePicture(root, name))

    how = {"turns": tuple(args.turns), "seed": args.seed}
    how["attempts"] = ATTEMPTS if args.temperature else 1  # asked again, it would say the same
    talks = (talk(name, see, **how) for name in names)
    spread, at_a_time = (in_batches, BATCH) if args.server is None else (in_threads, THREADS)
    outcomes = spread(talks, chat.replies, args.parallel or at_a_time)
    done = len(output.done)
    shown = {"total": done + len(names), "initial": done, "disable": not sys.stderr.isatty()}
    with closing(outcomes), tqdm(unit="image", **shown) as bar:

        def progress(count: int) -> None:
            bar.set_postfix(rejected=sum(output.rejected.values()), refresh=False)
            bar.update(count)

        try:
            write_all(outcomes, output, progress)
        except OSError as error:  # of a disk; what a connection does is the server's trouble
            raise ValueError(f"{error.strerror or error}; run the same command again") from error


def execute(args: argparse.Namespace) -> int:
    """Write the dialogues.  Raises ``ValueError`` for what the user can mend."""
    check(args)
    key = api_key(args.api_key_env)
    began = time.monotonic()

    from coma_ds.screen import log_to_stderr
    from coma_ds.synthesis.output import Output, write_all

    log_to_stderr(True)
    root = args.images if args.mmeb is None else args.image_root
    names = wanted_images(args, root)
    with closing(Output(Path(args.output), settings(args, root))) as output:
        names = [name for name in names if name not in output.done]
        before = output.written
        if output.done:
            sys.stderr.write(f"{output.path}: {len(output.done)} images are done\n")
        try:
            if names:
                with closing(open_chat(args, key)) as chat:
                    write_dialogues(args, root, names, chat, output)
            else:
                write_all((), output, int)
        except BaseException:
            if output.written:
                sys.stderr.write(
                    f"{output.path} holds {output.written} dialogues; the same command goes on\n"
                )
            raise
        new = f" ({output.written - before} new)" if before else ""
        sys.stdout.write(f"{output.written} dialogues{new} -> {output.path}\n")
        if output.rejected:
            sys.stdout.write(f"rejected: {output.rejects()} -> {output.rejects_path}\n")
        sys.stdout.write(f"{time.monotonic() - began:.0f} s\n")
    return 0
