"""One dialect of error message, docstring and shape, in every file of the package."""

import ast
import io
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Parts of the package that follow already; `data`, `weights` and `weights_conversion` come next.
PARTS = ("eval", "flow", "inference", "jobs", "losses", "models", "perf", "report", "runtime")
PARTS += ("train",)
PACKAGE = ROOT / "dinosae_jax"
FILES = sorted(
    [*PACKAGE.glob("*.py"), *(f for part in PARTS for f in (PACKAGE / part).rglob("*.py"))]
)
SHAPE = re.compile(r"\[[\w.*+/' -]+,[\w.*'(-]")
SECTION = re.compile(r"^( *)(Args|Attributes|Raises|Returns|Yields):\n( +)", re.MULTILINE)
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef


def trees():
    return pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def raised(tree):
    """Text of each message of a raised ValueError, with {} for what is filled in."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Raise)
            and isinstance(node.exc, ast.Call)
            and ast.unparse(node.exc.func) == "ValueError"
        ):
            message = node.exc.args[0]
            parts = message.values if isinstance(message, ast.JoinedStr) else [message]
            yield "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in parts)


def docstrings(tree):
    nodes = (node for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def comments(source):
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


@trees()
def test_messages_are_rule_got_way_out(path):
    for message in raised(ast.parse(path.read_text())):
        assert "; got " in message, message
        assert ", got " not in message, message
        assert not message.removesuffix("...").endswith("."), message


@trees()
def test_docstrings_and_comments(path):
    source = path.read_text()
    tree = ast.parse(source)
    for text in [*docstrings(tree), *comments(source), *raised(tree)]:
        assert not SHAPE.search(text), f"a shape has spaces, [b, n, d]: {text}"
        assert "reference/" not in text, f"name the paper or the upstream file: {text}"
    for text in docstrings(tree):
        for indent, name, inner in SECTION.findall(text):
            assert len(inner) == len(indent) + 2, f"{name} is indented by 2: {text}"


@trees()
def test_annotations_are_not_evaluated(path):
    body = ast.parse(path.read_text()).body
    if any(not isinstance(node, ast.Expr) for node in body):
        names = [n.module for n in body if isinstance(n, ast.ImportFrom)]
        assert "__future__" in names
