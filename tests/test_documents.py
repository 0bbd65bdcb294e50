"""The documents: links lead somewhere, and every command that they show is one that parses."""

import pathlib
import re
import shlex
import sys

import pytest
from absl import flags
from ml_collections import config_flags

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SCRIPTS = [*sorted((ROOT / "configs").glob("*.py")), *sorted((ROOT / "examples").glob("*.py"))]
ENTRIES = ("dinosae", "python -m dinosae_jax.main", "launch/tpu_vm.sh run")


def commands(text):
    """The commands that start a job, from code blocks, tables and indented lines."""
    text = text.replace("\\\n", " ")
    for line in text.splitlines():
        for part in line.split("`") if "`" in line else [line]:
            found = re.search(rf"(?:^|[\s/])({'|'.join(ENTRIES)}) +(--config=configs/.*)", part)
            if found:
                yield found[2]


def cases():
    for path in (*PAGES, *SCRIPTS):
        for command in commands(path.read_text()):
            yield pytest.param(command, id=f"{path.name}: {command[:80]}")


def parse(command):
    """The config of a command as absl parses it; shell variables stand for whole flags."""
    words = [w for w in shlex.split(command, comments=True) if not w.startswith("$")]
    words = [w.replace("configs/", f"{ROOT}/configs/", 1) if "--config=" in w else w for w in words]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    sys.argv = ["run", *words]  # there the parser looks for overrides
    left = values(sys.argv)
    assert left == ["run"], f"more than flags: {left}"
    return values.config


@pytest.mark.parametrize("command", cases())
def test_a_command_of_the_documents_parses(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    assert parse(command).job


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = path.read_text()
    for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if "://" in target or target.startswith("../../actions"):
            continue
        page = (path.parent / target).resolve() if target else path
        assert page.exists(), link
        if anchor and page.suffix == ".md":
            assert anchor in anchors(page.read_text()), link


def anchors(text):
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_first_commands_of_the_readme_are_install_run_and_test():
    block = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    first, second = block.strip().splitlines()
    assert first.endswith("--config=configs/quickstart.py --workdir=runs/quickstart")
    assert second == ".venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest"


def test_the_reference_names_modules_that_exist():
    blocks = [
        name
        for page in sorted((ROOT / "docs" / "api").glob("*.md"))
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    ]
    assert len(blocks) > 30
    for name in blocks:
        path = ROOT / name.replace(".", "/")
        module = path.parent if name.rpartition(".")[2][0].isupper() else path
        assert module.with_suffix(".py").exists() or (module / "__init__.py").exists(), name
