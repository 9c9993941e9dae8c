"""The shape of the code: imports go down, packages have owners, names shadow nothing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, KERNELS = ROOT / "coma_ds", ROOT / "kernels"

# The floor of each part (design.md): a part imports from its own floor and from those below.
FLOORS = {
    "kernels": 0,
    **dict.fromkeys(("batch", "comm", "config", "effects", "entry", "rank_report", "versions"), 1),
    **dict.fromkeys(
        ("manifest", "ownership", "stopping", "guard", "stragglers", "hardware", "disk"), 1
    ),
    "screen": 1,
    **dict.fromkeys(("data", "model", "evaluation", "optim", "metrics"), 2),
    **dict.fromkeys(("inference", "embedder", "bulk", "displays", "assessment"), 2),
    **dict.fromkeys(("synthesis", "preparation"), 2),
    **dict.fromkeys(("bench", "torchrun"), 5),
    **dict.fromkeys(("engine", "mechanics", "checkpoint", "planning", "throughput"), 3),
    **dict.fromkeys(("step", "budget", "objectives", "verify", "assemble", "checks", "report"), 4),
    **dict.fromkeys(("run", "run_folder", "plan"), 4),
    **dict.fromkeys(("train", "commands"), 5),
    **dict.fromkeys(("recipes", "ds_configs", "recipe_files"), 0),
}
# Who may import a package; a name stands for a module, or a folder with everything in it.
OWNERS = {
    "deepspeed": ("engine", "mechanics"),
    "transformers": ("model", "data.processing", "commands.demo_base"),
    "triton": ("kernels",),
    "tensorboard": ("metrics",),
    "torch.utils.tensorboard": ("metrics",),
    "peft": ("model.adapters",),
    "datasets": ("data",),
    "tokenizers": ("commands.demo_base",),
    "pydantic": ("config",),
}


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of the package by its name below ``coma_ds``, parsed."""
    found = {}
    for folder in (PACKAGE, KERNELS, ROOT / "ds_configs"):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[1:] if folder == PACKAGE else parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(parts)] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module) -> list[str]:
    """Full names that a module imports, also inside functions; ``from a import b`` is ``a.b``."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def own_imports(name: str) -> set[str]:
    """Modules below ``coma_ds`` that the module ``name`` imports."""
    found = set()
    for target in imports(sources()[name]):
        head, _, rest = target.partition(".")
        if head == "coma_ds":
            while rest and rest not in sources():  # a.b.Class -> a.b
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found - {""}


def part(name: str) -> str:
    return name.partition(".")[0]


def test_every_part_has_a_floor() -> None:
    parts = {part(name) for name in sources()} - {""}
    assert parts == set(FLOORS), "a new part: give it a floor above, as low as it can be"


def test_imports_go_down_only() -> None:
    up = [
        f"{name} -> {target}"
        for name in sources()
        for target in own_imports(name)
        if part(name) and FLOORS[part(target)] > FLOORS[part(name)]
    ]
    assert not up


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """Nodes that stay when all that import nothing of the rest are taken away again and again."""
    edges = {name: set(targets) for name, targets in edges.items()}
    while free := {name for name, targets in edges.items() if not targets & edges.keys()}:
        edges = {name: targets for name, targets in edges.items() if name not in free}
    return sorted(edges)


def test_no_two_parts_import_each_other() -> None:
    """Model reads data (what processing is, for an export); data knows no model."""
    edges: dict[str, set[str]] = {}
    for name in sources():
        mine = edges.setdefault(part(name), set())
        mine |= {part(target) for target in own_imports(name)} - {part(name)}
    edges.pop("")  # the front door, which loads the embedder when it is asked for
    assert cycle(edges) == []
    assert "data" in edges["model"] and "model" not in edges["data"]


def test_no_two_modules_import_each_other() -> None:
    edges = {name: own_imports(name) - {name} for name in sources() if name}
    assert cycle(edges) == []


def test_the_checks_see_what_they_should() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == list("abcd")
    assert cycle({"a": {"b"}, "b": set()}) == []
    assert {"batch", "config", "model.attention"} <= own_imports("model.backbone")
    assert own_imports("model.pooling") == {"kernels.attention_pool"}
    assert "objectives.match" in sources() and "kernels.info_nce.reference" in sources()


def test_the_entry_is_imported_by_nobody() -> None:
    assert not [name for name in sources() if "train" in own_imports(name)]


@pytest.mark.parametrize("package", OWNERS)
def test_a_package_has_its_owners(package) -> None:
    users = {
        name
        for name, tree in sources().items()
        if any(f"{target}.".startswith(f"{package}.") for target in imports(tree))
    }
    strangers = [u for u in users if not any(f"{u}.".startswith(f"{o}.") for o in OWNERS[package])]
    assert not strangers
    if package not in ("triton", "tensorboard"):
        assert users  # the rule is about something


def test_no_file_shadows_another_package() -> None:
    """Run by path, ``train.py`` has its folder first on sys.path until it takes it off."""
    installed = set(packages_distributions()) - {"coma_ds"}
    taken = set(sys.stdlib_module_names) | installed
    top = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()}
    # the one that cannot be helped (ours by the layout), and what Python and tools leave behind
    names = {n for n in top if n not in ("kernels", "__init__", "__pycache__")}
    assert not names & taken
    assert {"torch", "deepspeed", "pytest", "json", "logging"} <= taken and "config" in names


def test_modules_of_one_folder_shadow_nothing_either() -> None:
    stems = {p.stem for p in PACKAGE.rglob("*.py")} | {p.stem for p in KERNELS.rglob("*.py")}
    assert not (stems - {"__init__"}) & set(sys.stdlib_module_names)


def code_files() -> list[Path]:
    folders = [PACKAGE, KERNELS, ROOT / "ds_configs", ROOT / "tests", ROOT / "benchmarks"]
    return [p for f in folders for p in sorted(f.rglob("*.py")) if "__pycache__" not in p.parts]


def text_files() -> list[Path]:
    """What is written by hand: code, recipes, configs, scripts and pages."""
    kinds = (".py", ".yaml", ".cfg", ".toml", ".txt", ".md", ".sh", ".sbatch", ".json", ".html")
    folders = ("coma_ds", "kernels", "ds_configs", "tests", "slurm", "docs", "benchmarks")
    found = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in kinds]
    found += [p for p in ROOT.iterdir() if p.is_file() and p.suffix in kinds]
    found += [p for p in (ROOT / "Makefile",) if p.is_file()]
    generated = ("models", "__pycache__", "licenses")
    return [p for p in sorted(found) if not set(generated) & set(p.relative_to(ROOT).parts)]


def test_no_file_is_longer_than_400_lines() -> None:
    long = {str(p): n for p in code_files() if (n := len(p.read_text().splitlines())) > 400}
    assert not long and len(code_files()) > 60


def test_text_is_ascii() -> None:
    """Data of the tests is written with escapes."""
    assert not [str(p) for p in text_files() if not p.read_bytes().isascii()]


def test_no_machine_is_named() -> None:
    """No path of a machine that somebody worked on."""
    places = re.compile("|".join(f"/{name}/" for name in ("work", "tmp/w", "root", "Users")))
    assert not [str(p) for p in text_files() if places.search(p.read_text())]


def test_nothing_is_printed() -> None:
    calls = [
        f"{name}:{node.lineno}"
        for name, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert not calls


def test_public_functions_have_docstrings() -> None:
    bare = []
    for name, tree in sources().items():
        bare += [name] if not ast.get_docstring(tree) else []
        for node in tree.body:
            defines = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if defines and not node.name.startswith("_") and not ast.get_docstring(node):
                bare.append(f"{name}.{node.name}")
    short = {"config.Section", "config.OptimConfig", "config.EvalConfig"}
    short |= {"config.CheckpointConfig", "config.LoggingConfig"}
    assert set(bare) <= short


STUB = '''
class Stub:
    """Stands for anything of Hugging Face's package, at import time."""
    def __call__(self, *args, **kwargs):
        return args[0] if args and isinstance(args[0], type) else self
    def __getattr__(self, name):
        return self
    def __or__(self, other):
        return self
    def __getitem__(self, key):
        return self

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Stub()

OF_HUGGING_FACE = True
'''
IMPORTING = """
import kernels, sys
assert kernels.OF_HUGGING_FACE, kernels.__file__
from transformers.utils.import_utils import is_kernels_available
assert is_kernels_available()
import transformers.integrations.hub_kernels
from transformers import Qwen2_5_VLForConditionalGeneration
from coma_ds.kernels.info_nce import info_nce
import coma_ds.model.backbone
assert kernels.OF_HUGGING_FACE and "kernels.info_nce" not in sys.modules
"""


def hugging_face_kernels(folder: Path) -> Path:
    """A stand-in for their distribution of that name, as pip would lay it out."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION as VERSION

    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(STUB)
    info = folder / f"kernels-{VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {VERSION}\n")
    (info / "RECORD").write_text(f"kernels/__init__.py,,\n{info.name}/METADATA,,\n")
    (info / "top_level.txt").write_text("kernels\n")
    return folder


def run(code: list[str], path: list[Path], cwd: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, *code], env=env, cwd=cwd, capture_output=True, text=True, timeout=300
    )


def test_the_folder_kernels_leaves_their_package_alone(tmp_path) -> None:
    """Worst case: the repository root stands before it on sys.path."""
    assert not (KERNELS / "__init__.py").exists()
    theirs = hugging_face_kernels(tmp_path)
    found = PathFinder.find_spec("kernels", [str(ROOT), str(theirs)])
    assert found.origin == str(theirs / "kernels" / "__init__.py")
    done = run(["-c", IMPORTING], [ROOT, theirs], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_with_an_init_it_would_not(tmp_path) -> None:
    """The check above can fail: a regular package of that name comes first."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    hugging_face_kernels(theirs)
    (tmp_path / "ours" / "kernels").mkdir(parents=True)
    (tmp_path / "ours" / "kernels" / "__init__.py").write_text("")
    done = run(["-c", IMPORTING], [tmp_path / "ours", theirs, ROOT], tmp_path)
    assert done.returncode != 0 and "OF_HUGGING_FACE" in done.stderr


def guard_of_the_entry() -> ast.Module:
    """``train.py`` up to the statement that takes its folder off sys.path."""
    body = ast.parse((PACKAGE / "train.py").read_text()).body
    end = next(i for i, node in enumerate(body) if isinstance(node, ast.If))
    before = [n for n in body[:end] if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in before if isinstance(n, ast.Import) for a in n.names}
    assert names == {"os", "sys"}  # loaded by Python itself before it looks at any path
    assert {n.module for n in before if isinstance(n, ast.ImportFrom)} <= {"__future__"}
    return ast.Module(body[: end + 1], [])


@pytest.mark.parametrize("spelled", ["{0}", "{0}/", "{0}/../coma_ds", "coma_ds", "link"])
def test_the_entry_takes_its_folder_off_the_path(spelled, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT if spelled == "coma_ds" else tmp_path)
    (tmp_path / "link").symlink_to(PACKAGE)
    others = [str(ROOT), "", str(KERNELS)]
    monkeypatch.setattr(sys, "path", [spelled.format(PACKAGE), *others])
    code = compile(guard_of_the_entry(), "train.py", "exec")
    exec(code, {"__name__": "__main__", "__file__": str(PACKAGE / "train.py")})
    assert sys.path == others
    sys.path.insert(0, str(PACKAGE))
    exec(code, {"__name__": "coma_ds.train", "__file__": str(PACKAGE / "train.py")})
    assert sys.path == [str(PACKAGE), *others]  # imported, it changes nothing


def test_the_entry_runs_beside_a_file_that_shadows(tmp_path) -> None:
    (tmp_path / "train.py").write_text((PACKAGE / "train.py").read_text())
    for name in ("argparse", "torch", "config", "kernels"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('shadowed')\n")
    done = run([str(tmp_path / "train.py"), "--help"], [ROOT], ROOT)
    assert done.returncode == 0 and "KEY=VALUE" in done.stdout, done.stderr[-2000:]
