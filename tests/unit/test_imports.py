"""Imports point down one list of layers, and a start imports nothing that it does not need."""

import ast
import json
import os
import subprocess
import sys
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest

import tokenmill

LAYERS = (
    ("cli", "__init__"),
    ("loadgen",),
    ("server",),
    ("cluster",),
    ("ledger",),
    ("engine",),
    ("kv",),
    ("sampling",),
    ("models",),
    ("capture",),
    ("backends",),
    ("passes",),
    ("collectives",),
    ("perf",),
    ("ir",),
    ("config",),
    ("svg",),
    ("errors",),
    ("fingerprint",),
)
"""Top first. Passes lie below backends, because a backend chooses and runs its own."""

LOADER = "tokenmill.models.loader"
"""The one module of `models` that joins a model to a backend."""

TORCH = "tokenmill.collectives.torch"
"""What meets torch where that is installed; nothing else may import it at the start."""

PACKAGE = Path(tokenmill.__file__).parent
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imported_names(tree: ast.AST) -> set[str]:
    """Every module of ours that is imported, inside functions and for type checking too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            # `from tokenmill.models import llama` imports a module too.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "tokenmill"}


def layer_of(module: str) -> str:
    """`models` of tokenmill.models.gguf.reader.GgufFile; the package itself is its `__init__`."""
    part = [*module.split("."), "__init__"][1]
    return part if part in RANKS else "__init__"


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def test_every_module_has_a_layer():
    assert {name.split(".")[1] for name in MODULES} <= RANKS.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    imports = imported_names(ast.parse(MODULES[module].read_text()))
    own = layer_of(module)
    upwards = {
        name
        for name in imports
        if layer_of(name) != own and RANKS[layer_of(name)] <= RANKS[own] and not is_version(name)
    }
    assert not upwards


def is_version(name: str) -> bool:
    """The version is the one thing that the package itself gives to all layers."""
    return name in ("tokenmill", "tokenmill.__version__")


@pytest.mark.parametrize("module", [m for m in MODULES if layer_of(m) == "models" and m != LOADER])
def test_models_know_no_backend(module):
    imports = imported_names(ast.parse(MODULES[module].read_text()))
    assert not {name for name in imports if layer_of(name) == "backends"}


@pytest.mark.parametrize("layer", ["passes", "ir"])
def test_there_is_no_other_way_down(layer):
    """Graphs, and what changes them, stand on numpy alone."""
    for module, path in MODULES.items():
        if layer_of(module) == layer:
            lower = {layer_of(name) for name in imported_names(ast.parse(path.read_text()))}
            assert lower <= {layer, "ir", "errors"}


def test_the_list_is_the_one_in_the_document():
    document = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    places = [document.find(f"    {names[0]}") for names in LAYERS]
    assert -1 not in places
    assert all(above < below for above, below in pairwise(places))


# -- what a start costs


HEAVY = ("torch", "numpy", "llvmlite", "gguf", "huggingface_hub", "tokenizers", "tqdm", "jinja2")


def modules_after(code: str) -> set[str]:
    """What is imported when the code has run, in a Python of its own."""
    report = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", report],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},  # not another one that is installed
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_itself_imports_nothing():
    assert not modules_after("import tokenmill").intersection(HEAVY)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["run", "--help"]])
def test_help_and_version_import_nothing_heavy(arguments):
    code = f"""
from tokenmill.cli.main import main
try:
    main({arguments!r})
except SystemExit as exit:
    assert exit.code == 0
"""
    assert not modules_after(code).intersection(HEAVY)


def test_the_whole_product_runs_without_torch():
    every = "\n".join(
        f"import {module}"
        for module in MODULES
        if not module.endswith("__main__") and not module.startswith(TORCH)
    )
    assert "torch" not in modules_after(every.replace("tokenmill.__init__", "tokenmill"))


def test_a_plain_install_has_no_torch():
    required = metadata.requires("tokenmill")
    assert required is not None
    plain = [name for name in required if "extra ==" not in name]
    assert not [name for name in plain if name.startswith(("torch", "transformers", "triton"))]
    assert [name for name in plain if name.startswith("llvmlite")]
