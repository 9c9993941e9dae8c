"""Where the sets of MMEB lie, what they are called, and their columns as Arrow arrays."""

from __future__ import annotations

import fnmatch
import glob
import json
import logging
import os
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from coma_ds.data.tables import ArrowTable, read_hub, read_parquet

log = logging.getLogger("coma_ds")

GROUPS = ("Cls", "VQA", "Ret", "VG")
DOMAINS = ("IND", "OOD")

_OFFICIAL = {
    ("Cls", "IND"): "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
    ("Cls", "OOD"): "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ("VQA", "IND"): "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
    ("VQA", "OOD"): "ScienceQA VizWiz GQA TextVQA",
    ("Ret", "IND"): "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
    ("Ret", "OOD"): "OVEN FashionIQ EDIS Wiki-SS-NQ",
    ("VG", "IND"): "MSCOCO",
    ("VG", "OOD"): "Visual7W-Pointing RefCOCO RefCOCO-Matching",
}
OFFICIAL_SETS = {name: key for key, names in _OFFICIAL.items() for name in names.split()}
"""Group and domain of the 36 sets of MMEB (Jiang et al., arXiv 2410.05160)."""

TRAIN_COLUMNS = (
    "qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path",
)  # fmt: skip
EVAL_COLUMNS = ("qry_inst", "qry_text", "qry_img_path", "tgt_inst", "tgt_text", "tgt_img_path")


def mmeb_eval_sets(root_or_hub: str) -> list[str]:
    """Names of the sets at ``root_or_hub``: those of ``sets.json``, else the official ones there.

    Raises:
        ValueError: a folder that holds none, or that is not there.
    """
    if not os.path.isdir(root_or_hub):
        check_hub_name(root_or_hub)
        return list(OFFICIAL_SETS)
    index = _read_index(root_or_hub)
    names = list(index) or [
        name for name in OFFICIAL_SETS if os.path.isdir(os.path.join(root_or_hub, name))
    ]
    if not names:
        raise ValueError(
            f"{root_or_hub}: no MMEB set here; expected folders such as "
            f"{next(iter(OFFICIAL_SETS))}/test-00000-of-00001.parquet, or sets.json"
        )
    others = [name for name in folders(root_or_hub) if name not in names]
    strange = [name for name in others if glob.glob(os.path.join(root_or_hub, name, "*.parquet"))]
    if strange and not index:
        log.warning(
            "%s: left out, none of the 36 sets of MMEB and not in sets.json: %s",
            root_or_hub, ", ".join(strange),
        )  # fmt: skip
    return names


def check_hub_name(name: str) -> None:
    """Raise ``ValueError`` for what looks like a folder that is not there."""
    local = name.startswith((".", "/", "~")) or os.path.isdir(os.path.dirname(name) or ".")
    if name.count("/") != 1 or local:
        raise ValueError(f"{name}: no such folder, nor the name of a hub repository (owner/name)")


def open_set(root_or_hub: str, subset: str, split: str, columns: Sequence[str]) -> ArrowTable:
    """The rows of one split of one set, with those of ``columns`` that exist.

    Raises:
        ValueError: no such folder, set or split (those that are there are named), or the hub
            refuses.
    """
    if not os.path.isdir(root_or_hub):
        check_hub_name(root_or_hub)
        return read_hub(root_or_hub, subset, split).select(columns)
    folder = os.path.join(root_or_hub, subset)
    if not os.path.isdir(folder):
        raise ValueError(
            f"{root_or_hub}: no set {subset!r} here; there are "
            f"{', '.join(folders(root_or_hub)) or 'none'}"
        )
    names = sorted(os.listdir(folder))
    files = [name for name in names if fnmatch.fnmatch(name, f"{split}-*.parquet")] or [
        name for name in names if name == f"{split}.parquet"
    ]
    if not files:
        raise ValueError(
            f"{folder}: no file {split}-*.parquet; there are {', '.join(names[:20]) or 'none'}"
        )
    return read_parquet([os.path.join(folder, name) for name in files], columns)


def folders(root: str) -> list[str]:
    """Names of the folders in ``root``, so many as can be shown."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir())[:60]


def group_and_domain(root_or_hub: str, subset: str) -> tuple[str, str]:
    """Group and domain of a set: from ``sets.json`` at the root, else of the 36 of MMEB.

    Raises:
        ValueError: neither knows it, or ``sets.json`` has another form.
    """
    index = _read_index(root_or_hub) if os.path.isdir(root_or_hub) else {}
    if subset in index:
        return index[subset]
    if subset in OFFICIAL_SETS:
        return OFFICIAL_SETS[subset]
    raise ValueError(
        f"{root_or_hub}: the group of set {subset!r} is unknown; it is none of the 36 of MMEB, "
        f"so list it in {os.path.join(root_or_hub, 'sets.json')} as "
        '[{"name", "group", "domain"}]'
    )


def _read_index(root: str) -> dict[str, tuple[str, str]]:
    path = os.path.join(root, "sets.json")
    if not os.path.exists(path):
        return {}
    form = (
        f'expected a list of {{"name", "group" ({", ".join(GROUPS)}), '
        f'"domain" ({", ".join(DOMAINS)})}}'
    )
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {form}") from None
    index = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        fits = isinstance(entry, dict) and isinstance(entry.get("name"), str)
        if not fits or entry.get("group") not in GROUPS or entry.get("domain") not in DOMAINS:
            raise ValueError(f"{path}: entry {number} is {str(entry)[:80]}; {form}")
        index[entry["name"]] = (entry["group"], entry["domain"])
    return index


def text_column(table: ArrowTable, name: str) -> pa.Array:
    """A text column with "" for null and for a column that is not there."""
    return pc.fill_null(array_column(table, name, pa.string(), "texts"), "")


def array_column(table: ArrowTable, name: str, kind: pa.DataType, what: str) -> pa.Array:
    """A column as one Arrow array of ``kind``, string or list of strings; null if not there.

    Raises:
        ValueError: it holds something else.
    """
    if name not in table.columns:
        return pa.nulls(len(table), kind)
    column = table.arrow.column(name)
    inner, depth = column.type, 0
    while _is_list(inner):
        inner, depth = inner.value_type, depth + 1
    fits = depth == int(pa.types.is_list(kind)) and (_is_text(inner) or pa.types.is_null(inner))
    if not fits and not pa.types.is_null(column.type):
        raise ValueError(
            f"{table.where(0)}: column {name!r} must hold {what}, it holds {column.type}"
        )
    return column.cast(kind).combine_chunks()


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
