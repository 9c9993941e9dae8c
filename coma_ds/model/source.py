"""Where a model is read from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def resolve_model(path: str, key: str = "model.path") -> str:
    """A folder or hub name; ``builtin:NAME`` is a model shipped in the package.

    ``key`` is where the name stands in the config, for messages.  Raises ``ValueError`` for a name
    that is not shipped, or a path-like name that is no folder.
    """
    if path.startswith("builtin:"):
        folder = Path(str(resources.files("coma_ds.data"))) / "models" / path[len("builtin:") :]
        if not (folder / "config.json").is_file():
            raise ValueError(f"{key} {path!r}: no such model in the package")
        return str(folder)
    folder = Path(path)
    if folder.is_dir():
        if (folder / "model" / "config.json").is_file():  # a finished run
            return str(folder / "model")
        is_model = (folder / "config.json").is_file()
        if (folder / "config.yaml").is_file() and not is_model:
            raise ValueError(
                f"{key} {path!r}: the run is not finished, it has no model/ "
                "(coma-ds export writes it from the newest checkpoint)"
            )
        if not is_model and key == "init_from":
            raise ValueError(
                f"{key} {path!r}: the folder holds no finished run: run that stage first, or start "
                "from model.path (init_from=null)"
            )
        if not is_model:
            raise ValueError(f"{key} {path!r}: the folder has no config.json")
        return path
    if key == "init_from":
        raise ValueError(
            f"{key} {path!r}: no such folder; it names a finished run: run that stage first, or "
            "start from model.path (init_from=null)"
        )
    here = path.startswith((".", "/", "~")) or folder.parent.is_dir()
    if here or path.count("/") != 1:
        raise ValueError(f"{key} {path!r}: no such folder (a hub name is OWNER/NAME)")
    return path
