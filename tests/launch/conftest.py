"""A sandbox for the launch scripts: recording stubs in front of PATH, and two canary secrets."""

import pathlib
import subprocess
import sys

import pytest

FAKES = ("gcloud", "kubectl", "xpk", "sbatch", "scancel", "scontrol", "sky", "tail")
# The second one looks different where it is quoted for a shell or in JSON.
CANARIES = {"WANDB_API_KEY": "canary-4f1c9a7e-wandb", "HF_TOKEN": """hf_canary'8d"2b6c"""}
RECORDER = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" >"$RECORD/$EPOCHREALTIME.$$.argv"
cat >"$RECORD/$EPOCHREALTIME.$$.stdin"
"""


class Sandbox:
    """A folder of fake tools in front of PATH, an empty home, and the record of what was called."""

    canaries = CANARIES
    recorder = RECORDER

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.fakes = folder / "bin"
        self.record = folder / "record"
        self.fakes.mkdir()
        self.record.mkdir()
        for name in FAKES:
            self.fake(name, RECORDER)

    def fake(self, name: str, text: str) -> None:
        (self.fakes / name).write_text(text)
        (self.fakes / name).chmod(0o755)

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        return {
            "PATH": f"{self.fakes}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.folder),
            "RECORD": str(self.record),
            **CANARIES,
            **variables,
        }

    def bash(self, *words: str | pathlib.Path, **variables: str) -> subprocess.CompletedProcess:
        """Runs bash with these arguments; no secret may come out of it or reach a tool."""
        done = subprocess.run(
            ["bash", *map(str, words)],
            env=self.environment(variables),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            timeout=60,
        )
        seen = done.stdout + done.stderr + str(self.calls()) + self.stdin()
        assert "canary" not in seen
        return done

    def start(self, *words: str | pathlib.Path, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", *map(str, words)],
            env=self.environment(variables),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def calls(self) -> list[list[str]]:
        files = sorted(self.record.glob("*.argv"))
        return [file.read_text().removesuffix("\0").split("\0") for file in files]

    def stdin(self) -> str:
        return "".join(file.read_text() for file in sorted(self.record.glob("*.stdin")))

    def clear(self) -> None:
        for file in self.record.iterdir():
            file.unlink()


@pytest.fixture
def sandbox(tmp_path: pathlib.Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.fixture
def local(sandbox: Sandbox) -> Sandbox:
    """A sandbox where `python` is this interpreter, started without site packages to be quick."""
    sandbox.fake("python", f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')
    return sandbox
