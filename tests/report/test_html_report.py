"""The report of finished, half-finished and empty runs."""

import html.parser
import json

import numpy as np
import pytest

from dinosae_jax.data import png
from dinosae_jax.report import curves, html_report, pictures, run_files

NOTE = "The frozen ViT is randomly initialised (random_frozen_ok), so alignment means little."


def write_stage(folder, psnr, finished=True, seed=0):
    """Leaves the files of a stage of 200 steps behind."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    metrics = []
    for step in range(2, 201, 2):
        loss = 0.3 * np.exp(-step / 60) + 0.05 + 0.01 * generator.normal()
        row = {"step": step, "train/loss": loss, "train/l1": loss * 0.8, "train/cosine": loss * 0.2}
        metrics.append({**row, "train/psnr": psnr - 1 - 20 * loss, "train/learning_rate": 3e-3})
    metrics += [{"step": step, "eval/psnr": psnr - 400 / step} for step in (50, 100, 200)]
    timing = [{"step": step, "seconds": step / 9, "images_per_second": 144.0} for step in (20, 200)]
    images = generator.uniform(size=(4, 32, 48, 3)).astype(np.float32)
    png.write_png(folder / "reconstructions.png", pictures.pairs(images, images, 2))
    config = {"batch_size": 16, "optimizer": {"betas": [0.9, 0.999]}, "init_from": ""}
    for name, rows in (("metrics.jsonl", metrics), ("timing.jsonl", timing)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, value in (
        ("config.json", config),
        ("notes.json", [NOTE]),
        ("baselines.json", {"block_means_psnr": 20.5, "mean_colour_psnr": 16.6}),
    ):
        (folder / name).write_text(json.dumps(value))
    (folder / "parameters.txt").write_text("stem/conv_0/kernel  (3, 3, 3, 16)  <432>\n")
    if finished:
        done = {"step": 200, "seconds": 71.4, "peak_memory_bytes": 2**31}
        (folder / "DONE").write_text(json.dumps(done))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A chain of which one stage has finished, one is under way and one has not begun."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    write_stage(folder / "stage1", 21.6)
    write_stage(folder / "stage4", 21.1, finished=False, seed=1)
    angles = [{"angle_degrees": angle, "psnr": 21.1 - angle / 5} for angle in (0, 5, 10, 20)]
    (folder / "stage4" / "robustness.json").write_text(json.dumps(angles))
    with (folder / "stage4" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 202, "train/lo')  # killed while it wrote
    chain = {"stages": ["stage1", "stage4", "flow"]}
    (folder / "chain.json").write_text(json.dumps(chain))
    (folder / "notes.json").write_text(json.dumps(["The flow memorises the ten photographs."]))
    html_report.write_report(folder)
    return folder


class Checker(html.parser.HTMLParser):
    """Collects the text and the addresses of a document, and holds that tags are balanced."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.text.append(data.strip())


def parse(path):
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    assert not checker.open
    return checker


def test_notes_are_the_first_lines(chain):
    text = parse(chain / "report.html").text
    body = text[1:]  # after <title>
    assert body[:2] == ["The flow memorises the ten photographs.", f"stage1, stage4: {NOTE}"]


def test_overview_sets_psnr_beside_both_baselines(chain):
    text = parse(chain / "report.html").text
    row = text[text.index("stage1") :][:9]
    assert row[:5] == ["stage1", "finished, 200 steps", "19.60", "20.50", "16.60"]
    assert row[5:8] == ["144.0", "1 min 11 s", "2.00 GiB"]
    assert "at step 200" in text
    assert "not started" in text


def test_nothing_is_loaded_from_elsewhere(chain):
    addresses = parse(chain / "report.html").addresses
    assert sum(address.startswith("data:image/png;base64,") for address in addresses) == 6
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    content = (chain / "report.html").read_text(encoding="utf-8")
    assert "<script" not in content
    assert "url(" not in content


def test_configuration_and_parameters_are_shown(chain):
    content = (chain / "report.html").read_text(encoding="utf-8")
    assert "optimizer.betas = [0.9, 0.999]" in content
    assert "stem/conv_0/kernel  (3, 3, 3, 16)  &lt;432&gt;" in content


def test_chain_gathers_pictures_curves_and_metrics(chain):
    one = png.decode_png((chain / "stage1" / "reconstructions.png").read_bytes())
    both = png.decode_png((chain / "reconstructions.png").read_bytes())
    assert both.shape[0] > 2 * one.shape[0]
    assert png.decode_png((chain / "curves.png").read_bytes()).shape[1] > 1000
    assert not (chain / "samples.png").exists()
    rows = [json.loads(line) for line in (chain / "metrics.jsonl").read_text().splitlines()]
    assert [rows[0]["stage"], rows[-1]["stage"]] == ["stage1", "stage4"]
    assert len(rows) == 2 * 103


def test_single_stage_of_any_state(tmp_path):
    write_stage(tmp_path / "run", 21.0)
    text = parse(html_report.write_report(tmp_path / "run")).text
    assert text[1] == NOTE
    (tmp_path / "empty").mkdir()
    assert "not started" in parse(html_report.write_report(tmp_path / "empty")).text


def test_convergence_shows_psnr_of_every_stage_and_kid_of_the_flow(tmp_path):
    for name in ("stage1", "stage4", "flow"):
        (tmp_path / name).mkdir()
    rows = {
        "stage1": [{"step": 10, "eval/psnr": 15.0}, {"step": 20, "eval/psnr": 20.0}],
        "stage4": [{"step": 5, "eval/psnr": 21.0}],
        "flow": [{"step": 100, "eval/kid_encoder": 0.5}, {"step": 200, "eval/kid_encoder": 0.012}],
    }
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    stages = [run_files.read_stage(tmp_path / name) for name in rows]
    whole = png.decode_png(curves.convergence_png(stages))
    alone = png.decode_png(curves.convergence_png(stages[2:]))
    assert whole.shape == alone.shape and (whole != alone).any()
    (tmp_path / "chain.json").write_text(json.dumps({"stages": list(rows)}))
    text = parse(html_report.write_report(tmp_path)).text
    assert "Convergence" in text and "KID, encoder features" in text
    assert text[text.index("flow") :].index("0.012") < 10  # in its row of the overview
    (tmp_path / "empty").mkdir()
    assert curves.convergence_png([run_files.read_stage(tmp_path / "empty")]) is None


def test_report_can_be_written_again(chain):
    before = (chain / "report.html").read_bytes()
    assert html_report.write_report(chain).read_bytes() == before


def test_values_that_are_not_finite_are_left_out_of_series():
    rows = [{"step": 1, "a": 1.0}, {"step": 2, "a": float("nan")}, {"step": 3, "a": None}]
    assert run_files.series(rows, "a") == ([1], [1.0])
    assert run_files.last_value(rows, "c") is None


def test_missing_workdir_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        html_report.write_report(tmp_path / "nowhere")
