"""One dialect of error message, docstring and shape, in every file of the package."""

import ast
import functools
import io
import pathlib
import re
import tokenize

ROOT = pathlib.Path(__file__).parent.parent
PARTS = ("data", "eval", "flow", "inference", "jobs", "losses", "models", "perf", "report")
PARTS += ("runtime", "train", "weights")
FOLDERS = ("configs", "weights_conversion", *(f"dinosae_jax/{part}" for part in PARTS))
FILES = sorted((ROOT / "dinosae_jax").glob("*.py"))
FILES += sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

SHAPE_WITHOUT_SPACES = re.compile(r"\[[\w.*+/' -]+,[\w.*'(-]")
SECTION = re.compile(r"^( *)(Args|Attributes|Raises|Returns|Yields):\n( +)", re.MULTILINE)
# Names of notes that no reader has; the source is a paper or an upstream file.
NOTES = re.compile(r"reference/|(generation|autoencoder|metrics|weights|recipes)\.md|the sheet's")


@functools.cache
def read(path):
    """(source, tree) of a file."""
    source = path.read_text()
    return source, ast.parse(source)


def messages(tree):
    """Text of each message of a raised ValueError, with {} for what is filled in."""
    for node in ast.walk(tree):
        error = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(error, ast.Call) and ast.unparse(error.func) == "ValueError":
            parts = getattr(error.args[0], "values", [error.args[0]])
            if any(isinstance(part, ast.Constant) for part in parts):
                yield "".join(
                    part.value if isinstance(part, ast.Constant) else "{}" for part in parts
                )


def docstrings(tree):
    nodes = (
        n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
    )
    return [text for node in nodes if (text := ast.get_docstring(node))]


def comments(source):
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def test_messages_are_rule_got_way_out():
    for path in FILES:
        for message in messages(read(path)[1]):
            assert "; got " in message, (path, message)
            assert ", got " not in message, (path, message)
            assert not message.removesuffix("...").endswith("."), (path, message)


def test_shapes_have_spaces():
    for path in FILES:
        source, tree = read(path)
        for text in (*docstrings(tree), *comments(source), *messages(tree)):
            assert not SHAPE_WITHOUT_SPACES.search(text), (path, text)


def test_sections_of_docstrings_are_indented_by_two():
    for path in FILES:
        for text in docstrings(read(path)[1]):
            for outer, name, inner in SECTION.findall(text):
                assert len(inner) == len(outer) + 2, (path, name, text)


def test_annotations_are_not_evaluated():
    for path in FILES:
        body = read(path)[1].body
        if any(not isinstance(node, ast.Expr) for node in body):
            assert any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in body), (
                path
            )


def test_sources_are_papers_and_upstream_files():
    for path in (*FILES, *TESTS):
        source, tree = read(path)
        for text in (*docstrings(tree), *comments(source)):
            assert not NOTES.search(text), (path, text)
