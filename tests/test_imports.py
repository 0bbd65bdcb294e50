"""The floors of ARCHITECTURE.md, and that nothing pulls in torch or TensorFlow."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "dinosae_jax"
# From the ground up: a part imports itself and the floors below it, nothing beside or above it.
FLOORS = (
    {"names", "sizes", "licences", "spelling"},
    {"encoders"},
    {"rules", "latent_convention", "flow", "losses"},
    {"config", "config_files", "runtime"},
    {"preflight", "data", "models", "weights"},
    {"inference"},
    {"eval"},
    {"report"},
    {"train"},
    {"perf"},
    {"jobs"},
    {"main"},
    {"__main__"},
)
FLOOR_OF = {part: height for height, floor in enumerate(FLOORS) for part in floor}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), path


def imported(path):
    """Modules that a file imports anywhere in it, and names that it takes out of them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(target):
    """The part of the package that `dinosae_jax.part...` names; None for the package itself."""
    part = target.split(".")[1]
    return part if part in FLOOR_OF else None


def test_every_part_has_a_floor():
    parts = {name.split(".")[0] for name, _ in modules()}
    assert parts == set(FLOOR_OF)


@pytest.mark.parametrize(("name", "path"), modules(), ids=str)
def test_imports_go_down(name, path):
    ours = name.split(".")[0]
    for target in imported(path):
        top = target.split(".")[0]
        assert top not in ("torch", "tensorflow", "weights_conversion", "configs"), target
        theirs = part_of(target) if top == "dinosae_jax" else None
        if theirs and theirs != ours:
            assert FLOOR_OF[theirs] < FLOOR_OF[ours], f"{name} imports {target}"


def test_a_job_imports_no_other_job():
    for name, path in modules():
        if name.startswith("jobs."):
            assert not [t for t in imported(path) if t.startswith("dinosae_jax.jobs")], name


def test_importing_everything_pulls_in_neither_torch_nor_tensorflow():
    names = [f"dinosae_jax.{name}" for name, _ in modules()]
    code = (
        f"import importlib, sys\nfor n in {names!r}: importlib.import_module(n)\n"
        "assert not {'torch', 'tensorflow'} & set(sys.modules), 'a heavy framework was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_configs_import_only_configs():
    for path in (ROOT / "configs").glob("*.py"):
        for target in imported(path):
            top = target.split(".")[0]
            assert top in {"__future__", "configs", "ml_collections", "dinosae_jax"}, (
                f"{path.name}: {target}"
            )
            if top == "dinosae_jax":
                assert part_of(target) in {"config", "names", "sizes"}, f"{path.name}: {target}"
