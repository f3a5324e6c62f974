"""The import graph: rooms import downwards only, and no circle; imports inside functions count."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ngpt_jax"

# From top to bottom. A room is a folder, or a file beside the folders; those of one line may not
# import each other, but for a room itself.
ROOMS = (
    "__init__ __main__ main",  # the package itself offers ngpt_jax.load
    "tools",
    "study",
    "diagnose",
    "aot benchmark",
    "evaluation",
    "export",
    "inference",
    "training",
    "checkpoint",
    "decoding",
    "optim",
    "model",
    "data",
    "parallel",
    "config",
    "plots",
    "terminal",
    "files",
    "signals",
    "errors",
    "directions",
    "projection",
    "sphere",
)
RANK = {room: rank for rank, line in enumerate(ROOMS) for room in line.split()}


def modules():
    """Path of each module by its dotted name below the package; a package has its folder's."""
    out = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        out[".".join(parts[:-1] if parts[-1] == "__init__" and parts[1:] else parts)] = path
    return out


MODULES = modules()


def absolute(node, name):
    """The dotted name that an ``from ... import`` statement in a module starts from."""
    if not node.level:
        return node.module or ""
    package = ("ngpt_jax." + name).split(".")
    package = package if MODULES[name].name == "__init__.py" else package[:-1]
    package = package[: len(package) + 1 - node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def imports_of(name):
    """Modules of the package that a module imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            start = absolute(node, name)
            # `from a import b` may name the module a.b, or something in a
            names = [f"{start}.{alias.name}" for alias in node.names]
            names = [n if n.removeprefix("ngpt_jax.") in MODULES else start for n in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for full in names:
            if full.split(".")[0] == "ngpt_jax":
                found.add(full.removeprefix("ngpt_jax.") if "." in full else "__init__")
    return found - {name}


GRAPH = {name: imports_of(name) for name in MODULES}


def room(name):
    return name.split(".")[0]


def test_every_room_has_its_place():
    assert {room(name) for name in MODULES} == set(RANK)


def test_the_graph_is_that_of_the_package():
    assert "sphere" in GRAPH["projection"]  # a relative import
    assert "inference.loading" in GRAPH["__init__"]  # one inside a function


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downwards(name):
    for other in GRAPH[name]:
        assert other in MODULES, f"{name} imports {other}, which is no module"
        same = room(other) == room(name)
        assert same or RANK[room(other)] > RANK[room(name)], f"{name} imports {other}"


def test_there_is_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))


def test_no_file_is_long():
    lines = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: n for name, n in lines.items() if n > 400} == {}


def test_the_two_lowest_files_work_as_a_copy_in_another_package(tmp_path):
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("projection.py", "sphere.py"):
        (package / name).write_text((PACKAGE / name).read_text())
    code = """
import sys
import jax.numpy as jnp, optax
from theirs.projection import keep_params_on_sphere, project_params
params = project_params({"w": jnp.ones((4, 3))}, {"w": 0})
tx = optax.chain(optax.sgd(0.1), keep_params_on_sphere({"w": 0}))
updates, _ = tx.update({"w": jnp.ones((4, 3))}, tx.init(params), params)
assert jnp.allclose(jnp.linalg.norm(optax.apply_updates(params, updates)["w"], axis=0), 1)
assert not any(name.split(".")[0] in ("ngpt_jax", "flax") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
