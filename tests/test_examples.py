"""The examples, the notebook and the Python of the documents, executed on tiny networks."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from PIL import Image

from dinosae_jax.data import photos
from tests.xla_flags import flags

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "tour.ipynb"
pytestmark = pytest.mark.slow


def run(folder, *arguments):
    """Standard output of `python ARGUMENTS` in a folder, on one CPU device."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "Agg",
        "XLA_FLAGS": flags(1),
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which runs/quickstart is the chain of four steps a stage."""
    root = tmp_path_factory.mktemp("examples")
    config = ROOT / "configs" / "quickstart.py"
    run(root, "-m", "dinosae_jax.main", f"--config={config}:tiny", "--workdir=runs/quickstart")
    stages = ("stage1", "stage2", "stage3", "stage4", "flow")
    assert all((root / "runs" / "quickstart" / stage / "DONE").is_file() for stage in stages)
    return root


def test_encode_decode(folder):
    output = run(folder, ROOT / "examples" / "encode_decode.py", "runs/quickstart/stage4")
    assert "latents (1024, 64)" in output
    assert len(re.findall(r"norms x \d.\d: PSNR \d+\.\d+ dB", output)) == 3
    assert Image.open(folder / "photo.png").size == (4 * 512, 512)


def test_sample(folder):
    script = ROOT / "examples" / "sample.py"
    flags = ("--labels", "2", "9", "--per_class=3", "--steps=2", "--sampler=dpm2m")
    output = run(folder, script, "runs/quickstart/flow", *flags)
    assert "coffee, flower" in output
    assert Image.open(folder / "samples.png").size == (3 * 64, 2 * 64)


def test_finetune_on_folder(folder):
    (folder / "photos").mkdir()
    for name in photos.FILES:
        photo = Image.open(photos.photo_path(name)).convert("RGB")
        photo.resize((160, 120)).save(folder / "photos" / f"{name}.jpg")
    script = ROOT / "examples" / "finetune_on_folder.py"
    flags = ("photos", "--workdir=runs/finetune", "--steps=20")
    output = run(folder, script, "runs/quickstart/stage4", *flags)
    before, after = map(float, re.findall(r"(\d+\.\d+) dB", output.splitlines()[-1]))
    assert after > before + 0.1


def test_the_notebook_has_no_outputs_and_runs(folder):
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in code)
    (folder / "tour.py").write_text("\n".join("".join(cell["source"]) for cell in code))
    output = run(folder, "tour.py")
    assert "(2, 256, 256, 3) -> (2, 256, 64) -> (2, 256, 256, 3)" in output


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_six_lines_run_as_they_stand(folder, page):
    lines = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[1]
    (folder / "six_lines.py").write_text(lines + "print(z.shape, photo.shape, samples.shape)\n")
    output = run(folder, "six_lines.py").splitlines()
    assert output[-1] == "(1, 1024, 64) (1, 512, 512, 3) (3, 64, 64, 3)"
