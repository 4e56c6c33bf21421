"""The house rules, held against what the files import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cellfate

PACKAGE = Path(cellfate.__file__).parent

FLOORS = {
    **dict.fromkeys(["errors", "_keys", "_runtime"], 0),
    **dict.fromkeys(["trees", "places"], 1),
    "kernels": 2,
    **dict.fromkeys(["engines", "cells"], 3),
    "model": 4,
    **dict.fromkeys(["inference", "io"], 5),
    **dict.fromkeys(["distributed", "pp", "get", "datasets"], 6),
    **dict.fromkeys(["tl", "pl"], 7),
    "cli": 8,
}
ABOVE_IO = {"io", "pp", "tl", "get", "pl", "datasets"}
# Outside package: the rooms, or the one file, that may import it. What is not listed may be imported anywhere.
WALLS = {
    "anndata": ABOVE_IO,
    "treedata": ABOVE_IO,
    "scanpy": ABOVE_IO,
    "matplotlib": {"pl"},
    "networkx": {"trees/convert.py"},
    "treeswift": {"trees/convert.py"},
    "dask": {"distributed"},
    "distributed": {"distributed"},
    "pandas": ABOVE_IO,
    "formulaic": {"io", "model"},
}
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
FILES += sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)


def room_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(source: str) -> list[str]:
    """Dotted names of all that is imported when the code runs, in functions too; names for type checkers are not."""
    found: list[str] = []
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif is_type_checking(node):
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
    return found


def broken_rules(file: str, source: str) -> list[str]:
    room, broken = room_of(file), []
    for name in imports(source):
        top, *rest = name.split(".")
        if top == "cellfate":
            other = rest[0] if rest else "the package itself"
            if room == "cli" or other in (room, "__version__"):
                continue
            if other not in FLOORS:
                broken.append(f"{file} imports {other}, which no floor has")
            elif FLOORS[other] > FLOORS[room] or (FLOORS[other] == FLOORS[room] > 0):
                broken.append(f"{file} (floor {FLOORS[room]}) imports {name} (floor {FLOORS[other]})")
        elif top in WALLS and not {room, file} & WALLS[top]:
            broken.append(f"{file} imports {top}, which is for {sorted(WALLS[top])}")
    return broken


def test_every_room_has_a_floor():
    assert {room_of(file) for file in FILES} <= set(FLOORS)


@pytest.mark.parametrize("file", FILES)
def test_imports_point_down(file):
    assert broken_rules(file, (PACKAGE / file).read_text()) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kernels/base.py", "from cellfate.model.families import Family"),
        ("kernels/base.py", "def f():\n    import pandas as pd"),
        ("engines/dense.py", "from cellfate.cells import Cells"),
        ("model/glmm.py", "import matplotlib.pyplot as plt"),
        ("trees/forest.py", "import networkx as nx"),
        ("io/store.py", "from cellfate import tl"),
        ("pl/effects.py", "import cellfate as cf"),
    ],
)
def test_the_rules_bite(file, source):
    assert len(broken_rules(file, source)) == 1


def test_importing_cellfate_is_light():
    heavy = ["torch", "scanpy", "anndata", "matplotlib", "pandas", "numba", "networkx", "scipy", "formulaic"]
    code = f"import sys, cellfate; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_face_is_there():
    for name in cellfate.__all__:
        assert getattr(cellfate, name) is not None
    assert set(cellfate.__all__) <= set(dir(cellfate))
    with pytest.raises(AttributeError, match="no attribute 'glm'"):
        _ = cellfate.glm


@pytest.mark.parametrize("face", ["datasets", "get", "pl", "pp", "tl"])
def test_a_face_shows_functions_only(face):
    module = getattr(cellfate, face)
    assert dir(module) == sorted(module.__all__)
    assert all(callable(getattr(module, name)) for name in dir(module))
