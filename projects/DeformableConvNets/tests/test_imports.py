# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Imports go one way, scripts -> modeling -> layers -> ops, and in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

# What each room of dcn_d2 may import of dcn_d2, besides itself. A room is a folder or file next to __init__.py.
ALLOWED: dict[str, set[str]] = {
    "ops": set(),
    "layers": {"ops"},
    "config": set(),
    "command_line": set(),
    "files": set(),
    "checkpoint": {"files"},
    "modeling": {"ops", "layers", "config"},
    "visualizer": {"ops", "layers"},
    "data": {"config", "outputs"},
    "evaluation": {"config", "data"},
    "report": {"config", "files", "outputs", "quiet"},
    "engine": {
        "checkpoint",
        "command_line",
        "config",
        "data",
        "evaluation",
        "files",
        "outputs",
        "report",
        "visualizer",
    },
    "prediction": {"checkpoint", "config", "data", "engine", "export", "files", "model_zoo", "outputs"},
    "batch": {"engine", "export", "model_zoo"},
    "export": {
        "checkpoint",
        "command_line",
        "config",
        "data",
        "engine",
        "files",
        "model_zoo",
        "modeling",
        "ops",
        "outputs",
    },
    "info": {"ops"},
    "model_zoo": set(),
    "outputs": {"files"},
    "quiet": set(),
    "": set(),  # dcn_d2/__init__.py, which must stay light
}
# What they may import besides, in functions that are called after all modules have been imported.
ALLOWED_IN_FUNCTIONS: dict[str, set[str]] = {
    "": {"config"},
    "config": {"checkpoint", "data", "modeling"},  # registers them with Detectron2, and asks its registries
    "model_zoo": {"checkpoint", "config"},
    "report": {"info", "model_zoo"},
}


class Import(NamedTuple):
    """An import of a module of the same project."""

    module: str
    line: int
    in_function: bool


Graph = Mapping[str, list[Import]]


def read_graph(root: Path, folder: str) -> Graph:
    """Reads what every module below `root / folder` imports of the modules and scripts below `root`."""
    files = {_name(path.relative_to(root)): path for path in sorted((root / folder).rglob("*.py"))}
    known = {*files, *(path.stem for path in root.iterdir())}
    return {
        module: list(_imports(ast.parse(path.read_text()), module, path.name == "__init__.py", known))
        for module, path in files.items()
    }


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.AST, module: str, is_package: bool, known: set[str]) -> Iterator[Import]:
    package = module if is_package else module.rpartition(".")[0]

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from .ops import sampling` imports a module, `from .ops import deform_conv2d` a function of one.
            candidates = [f"{base}.{alias.name}" for alias in node.names]
            names = sorted({candidate if candidate in known else base for candidate in candidates})
        for name in names:
            beside = f"{package}.{name}"  # scripts of one folder may import each other by their bare names
            found = beside if beside in known and name not in known else name
            while found and found not in known:
                found = found.rpartition(".")[0]
            if found:
                yield Import(found, node.lineno, in_function)  # type: ignore[attr-defined]
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children: list[ast.AST] = [*node.orelse]
        else:
            children = [*ast.iter_child_nodes(node)]
        inner = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in children:
            yield from visit(child, inner)

    return visit(tree, False)


def find_circle(graph: Graph, in_functions: bool = False) -> list[str]:
    """Gives modules that import each other, the first one again at the end; [] if none do.

    Args:
        graph: what `read_graph` gives.
        in_functions: count imports in functions too, which do no harm while modules are imported.
    """
    arrows: dict[str, set[str]] = {}
    for module, found in graph.items():
        imported = {i.module for i in found if in_functions or not i.in_function}
        # Python imports the packages around a module first, if it is not inside of them already.
        around = {".".join(name.split(".")[:depth]) for name in imported for depth in range(1, name.count(".") + 1)}
        arrows[module] = imported | {package for package in around if not f"{module}.".startswith(f"{package}.")}
        arrows[module].discard(module)
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def room_of(module: str) -> str:
    """Gives the room of a module of dcn_d2: the package or module right below dcn_d2."""
    return (module.split(".") + [""])[1]


def find_wrong_arrows(graph: Graph, allowed: Mapping[str, set[str]], in_functions: Mapping[str, set[str]]) -> list[str]:
    """Names the imports that the tables do not allow."""
    wrong = []
    for module, found in graph.items():
        room = room_of(module)
        for imported, line, in_function in found:
            inside = imported.split(".")[0] == "dcn_d2"
            target = room_of(imported) if inside else imported
            may = allowed[room] | (in_functions.get(room, set()) if in_function else set()) | {room, ""}
            if not inside or target not in may:
                wrong.append(f"{module}, line {line}: {room or 'dcn_d2'} may not import {imported}")
    return wrong


@pytest.fixture(scope="module")
def graph(project: Path) -> Graph:
    return read_graph(project, "dcn_d2")


def test_every_room_says_what_it_may_import(graph: Graph) -> None:
    assert {room_of(module) for module in graph} == set(ALLOWED)


def test_arrows_go_one_way(graph: Graph) -> None:
    assert find_wrong_arrows(graph, ALLOWED, ALLOWED_IN_FUNCTIONS) == []
    # A checker that sees no imports would be content too.
    assert "dcn_d2.ops.sampling" in {i.module for i in graph["dcn_d2.ops.reference"]}
    assert "dcn_d2.layers" in {i.module for i in graph["dcn_d2.modeling.poolers"]}


@pytest.mark.parametrize(("folder", "in_functions"), [("dcn_d2", False), ("dev", False), ("benchmarks", True)])
def test_no_import_goes_in_a_circle(project: Path, folder: str, in_functions: bool) -> None:
    assert find_circle(read_graph(project, folder), in_functions) == []


SMALL = {
    "train_net.py": "import dcn_d2\n",
    "dcn_d2/__init__.py": "",
    "dcn_d2/ops/__init__.py": "from .conv import conv\n",
    "dcn_d2/ops/conv.py": "import torch\n",
    "dcn_d2/layers/__init__.py": "from ..ops import conv\n",
    "dcn_d2/config/checks.py": "def check():\n    from ..modeling import backbone\n",
    "dcn_d2/modeling/__init__.py": "from . import backbone\n",
    "dcn_d2/modeling/backbone.py": "from ..layers import Conv\nfrom ..config.checks import check\n",
}
SMALL_ALLOWED = {room: ALLOWED[room] for room in ("", "ops", "layers", "config", "modeling")}


def check_small(tmp_path: Path, **changes: str) -> tuple[list[str], list[str]]:
    for name, text in (SMALL | {name.replace("__", "/") + ".py": text for name, text in changes.items()}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = read_graph(tmp_path, "dcn_d2")
    return find_wrong_arrows(graph, SMALL_ALLOWED, ALLOWED_IN_FUNCTIONS), find_circle(graph)


def test_the_checker_is_content_with_arrows_that_go_one_way(tmp_path: Path) -> None:
    assert check_small(tmp_path) == ([], [])


@pytest.mark.parametrize(
    "statement",
    [
        "from ..layers import Conv",
        "from .. import layers",
        "import dcn_d2.layers",
        "from dcn_d2.layers import Conv",
        "def late():\n    from ..layers import Conv",
    ],
)
def test_the_checker_notices_ops_that_import_layers(tmp_path: Path, statement: str) -> None:
    wrong, _ = check_small(tmp_path, dcn_d2__ops__conv=statement + "\n")
    line = statement.count("\n") + 1
    assert wrong == [f"dcn_d2.ops.conv, line {line}: ops may not import dcn_d2.layers"]


def test_the_checker_notices_other_wrong_arrows(tmp_path: Path) -> None:
    assert check_small(tmp_path, dcn_d2__layers__x="from ..modeling.backbone import Block\n")[0] == [
        "dcn_d2.layers.x, line 1: layers may not import dcn_d2.modeling.backbone"
    ]
    assert check_small(tmp_path, dcn_d2__layers__x="import train_net\n")[0] == [
        "dcn_d2.layers.x, line 1: layers may not import train_net"
    ]
    # What is allowed in functions is not allowed at the top.
    wrong, circle = check_small(tmp_path, dcn_d2__config__checks="from ..modeling import backbone\n")
    assert wrong[0] == "dcn_d2.config.checks, line 1: config may not import dcn_d2.modeling.backbone"
    assert sorted(circle[1:]) == ["dcn_d2.config.checks", "dcn_d2.modeling.backbone"]


CIRCLE = {"dcn_d2__ops__a": "from .b import x\n", "dcn_d2__ops__b": "from . import c\n"}


def test_the_checker_notices_circles(tmp_path: Path) -> None:
    _, found = check_small(tmp_path, **CIRCLE, dcn_d2__ops__c="from .a import y\n")
    assert found[0] == found[-1] and set(found) == {f"dcn_d2.ops.{name}" for name in "abc"}
    # What only type checkers read makes none, nor what is imported later, unless that is asked for.
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import y\n"
    assert check_small(tmp_path, **CIRCLE, dcn_d2__ops__c=text)[1] == []
    assert check_small(tmp_path, **CIRCLE, dcn_d2__ops__c="def f():\n    from .a import y\n")[1] == []
    ops = {name: found for name, found in read_graph(tmp_path, "dcn_d2").items() if name.startswith("dcn_d2.ops.")}
    assert find_circle(ops) == [] and set(find_circle(ops, in_functions=True)) == {f"dcn_d2.ops.{x}" for x in "abc"}


def test_the_checker_notices_circles_through_packages_and_bare_names(tmp_path: Path) -> None:
    package = {"dcn_d2__draw__x": "from ..ops.conv import conv\n", "dcn_d2__ops____init__": "from ..draw import x\n"}
    for name, text in package.items():
        path = tmp_path / f"{name.replace('__', '/', 2)}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "dcn_d2" / "ops" / "conv.py").write_text("")
    assert set(find_circle(read_graph(tmp_path, "dcn_d2"))) == {"dcn_d2.ops", "dcn_d2.draw.x"}
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "goals.py").write_text("def f():\n    import goals_cuda\n")
    (tmp_path / "bench" / "goals_cuda.py").write_text("from goals import f\n")
    assert set(find_circle(read_graph(tmp_path, "bench"), True)) == {"bench.goals", "bench.goals_cuda"}
