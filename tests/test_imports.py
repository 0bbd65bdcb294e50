"""The import directions of ARCHITECTURE.md, and that nothing pulls in torch or TensorFlow."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "dinosae_jax"
# Folder or module -> what it may import of this project, longest match first.
ALLOWED = {
    "main": {"rules", "config", "train.distributed", "train.stopping", "jobs"},
    "config": {"rules"},
    "rules": set(),
    "weights": set(),
    "models": {"models"},
    "flow": {"flow"},
    "losses": {"losses"},
    "data": {"data"},
    "eval": {"eval", "models"},
    "eval.robustness": {"eval", "flow"},
    "eval.sphere_picture": {"eval", "flow"},
    "eval.features": {"eval", "models", "train.sharding"},
    "train.state": set(),
    "train.optim": set(),
    "train.sharding": {"models.placement"},
    "train.compile": set(),
    "train.accumulate": set(),
    "train.hardware": set(),
    "train.step_flops": {"models", "train"},
    "train.distributed": set(),
    "train.roles": set(),
    "train.logging": {"train.hardware"},
    "train.profile": {"rules"},
    "train.stopping": {"train.sharding"},
    "train.checkpoint": {"train.compile"},
    "train.loop": {"train.state", "train.checkpoint", "train.sharding", "train.logging"}
    | {"train.profile", "train.stopping"},
    "train.initialise": {"config", "weights", "flow.convention", "train.checkpoint", "train.roles"},
    "train.gan": {"models", "losses"},
    "train.sae_step": {"models", "losses", "train", "eval.image_quality"},
    "train.rfm_step": {"models", "losses", "flow", "train"},
    "jobs": {
        "config",
        "rules",
        "weights",
        "train",
        "models",
        "flow",
        "eval",
        "data",
        "jobs",
        "losses",
    }
    | {"generator", "autoencoder"},
    "generator": {"config", "rules", "train", "models", "flow", "data"},
    "autoencoder": {"config", "train", "models", "flow"},
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts)
        if path.name != "__init__.py":
            yield name, path


def imported(path):
    """Modules of this package that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module.startswith("dinosae_jax"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_module(name):
    path = PACKAGE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def rule_for(name):
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in ALLOWED:
            return ALLOWED[".".join(parts[:length])]
    raise AssertionError(f"ARCHITECTURE.md and this test do not know {name}")


@pytest.mark.parametrize(("name", "path"), modules(), ids=str)
def test_import_directions(name, path):
    allowed = rule_for(name)
    for target in imported(path):
        assert not target.startswith(("torch", "tensorflow.")), target
        assert target not in ("tensorflow", "weights_conversion"), target
        if not target.startswith("dinosae_jax."):
            continue
        inner = target.removeprefix("dinosae_jax.")
        if not is_module(inner):  # a name inside a module, which is checked by itself
            continue
        prefixes = {inner, *(inner.rsplit(".", n)[0] for n in range(1, inner.count(".") + 1))}
        # A bare `from dinosae_jax.train import x` names the folder as well as x.
        if (PACKAGE / inner.replace(".", "/")).is_dir():
            continue
        assert prefixes & allowed, f"{name} imports {inner}"


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
            assert top in {"configs", "ml_collections", "dinosae_jax"}, f"{path.name}: {target}"
            if top == "dinosae_jax":
                assert target in {"dinosae_jax", "dinosae_jax.config"}, f"{path.name}: {target}"
