"""Turn the texts and images of a file into vectors, with a finished model."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

EXAMPLES = """The file is read and the vectors are written in parts, whatever its length.
A .parquet holds the columns row, id (if the file has one) and embedding; a .npy float32
[rows, width].  More ranks share the work:
  torchrun --nproc-per-node 8 -m coma_ds.commands.main encode ...

examples:
  coma-ds encode runs/demo/match --input texts.jsonl --output vectors.parquet
  coma-ds encode RUN/model --input photos.csv --image-column file --image-root photos \\
      --output vectors.npy"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, a run, or a hub name")
    parser.add_argument(
        "--input", required=True, metavar="FILE", help=".jsonl, .json, .csv or .parquet"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help=".parquet or .npy")
    parser.add_argument(
        "--text-column", metavar="NAME", help="default: text, where the file has it"
    )
    parser.add_argument(
        "--image-column",
        metavar="NAME",
        help="paths, bytes or lists of them; default: image, where the file has it",
    )
    parser.add_argument("--image-root", metavar="DIR", help="the folder where image paths start")
    parser.add_argument("--id-column", metavar="NAME", help="default: id, where the file has it")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that read images; default: 1"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--precision", choices=("bf16", "fp32", "autocast"), help="default: as in training"
    )


def execute(args: argparse.Namespace) -> int:
    """Encode the file.  Raises ``ValueError`` naming the row of what cannot be encoded."""
    output = Path(args.output)
    if output.suffix not in (".parquet", ".npy"):
        raise ValueError(f"--output {output}: expected a name that ends in .parquet or .npy")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.absolute().parent}")
    if args.batch_size < 1 or args.workers < 0:
        raise ValueError("--batch-size must be 1 or more, --workers 0 or more")

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
    from tqdm import tqdm

    from coma_ds import comm
    from coma_ds.bulk import Columns, InputRows, encode_file
    from coma_ds.embedder import Embedder

    asked = Columns(args.text_column, args.image_column, args.id_column)
    rows = InputRows(args.input, asked, args.image_root)
    device = args.device
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from coma_ds import engine, hardware

        device = engine.start()
        hardware.share_threads()
    embedder = Embedder(args.model, device=device, precision=args.precision)
    main = comm.rank() == 0
    with tqdm(total=len(rows), unit="row", disable=not (main and sys.stderr.isatty())) as bar:
        encode_file(
            embedder,
            rows,
            output,
            batch_size=args.batch_size,
            workers=args.workers,
            progress=bar.update,
        )
    if main:
        sys.stdout.write(f"{len(rows)} vectors of {embedder.width} -> {output}\n")
    return 0
