"""The page of measured rows, and what single rows measure in small."""

import json
import pathlib

import jax
import numpy as np
import pytest

from configs import bench as bench_config
from dinosae_jax import names, rules
from dinosae_jax.jobs import card
from dinosae_jax.perf import card_rows, cards
from dinosae_jax.weights import integrity

DOCS = pathlib.Path(__file__).parents[2] / "docs"
LINE = {"quantity": "speed", "measured": 612.34, "predicted": 600.0, "unit": "images/s", "note": ""}
ABOUT = {"card": "NVIDIA H200", "date": "2026-11-28", "commit": "0123456789ab", "jax": "0.10.2"}
MEASURED = {"row": "rfm_dit", "status": "measured", "seconds": 3.0, "lines": [LINE], **ABOUT}


@pytest.fixture
def tiny_card():
    return bench_config.get_config("card,tiny")


def test_the_page_of_the_documents_holds_the_records_beside_it():
    records = json.loads((DOCS / "cards.json").read_text())
    assert (DOCS / "cards.md").read_text() == cards.page(records)
    for record in records:
        assert set(ABOUT) | {"row", "lines"} <= set(record)


def test_the_page_names_every_row_measured_or_not(tmp_path):
    page = cards.page([MEASURED])
    assert "| rfm_dit | speed | 612.3 images/s | 600 images/s | NVIDIA H200 |" in page
    assert "| 2026-11-28 | 012345678 |" in page
    for row in set(names.CARD_ROWS) - {"rfm_dit"}:
        assert f"| {row} |  | not run |" in page


def test_records_are_entered_once_for_each_card_date_and_commit(tmp_path):
    path = tmp_path / "cards.json"
    failed = {**MEASURED, "row": "bias", "status": "failed", "error": "out of memory"}
    cards.enter(path, [MEASURED, failed])
    again = {**MEASURED, "lines": [{**LINE, "measured": 1.0}]}
    other = {**MEASURED, "card": "NVIDIA H100 80GB HBM3"}
    cards.enter(path, [again, other])
    found = json.loads(path.read_text())
    assert [(r["card"], r["lines"][0]["measured"]) for r in found] == [
        ("NVIDIA H200", 1.0),
        ("NVIDIA H100 80GB HBM3", 612.34),
    ]
    assert path.with_suffix(".md").read_text() == cards.page(found)


def test_a_failed_row_and_a_failed_line_say_why():
    failed = {"row": "bias", "status": "failed", "error": "a | b", **ABOUT}
    assert "| bias |  | failed: a / b |" in cards.table([failed])
    line = {**LINE, "measured": None, "predicted": None, "note": "cuDNN needs 8"}
    table = cards.table([{**MEASURED, "lines": [line]}])
    assert "| speed | failed: cuDNN needs 8 |  |" in table


def test_configs_are_valid(tiny_card):
    rules.validate(tiny_card)
    rules.validate(bench_config.get_config("card"))
    tiny_card.card.rows = ("rfm_dti",)
    with pytest.raises(ValueError, match="did you mean 'rfm_dit'"):
        rules.validate(tiny_card)


def test_another_machine_is_refused(tiny_card):
    tiny_card.card.device = "NVIDIA H"
    found = {"lines": {"card": "cpu", "devices": 1}}
    with pytest.raises(ValueError, match=r"measures one NVIDIA H; got 1 x cpu; .*:card,tiny"):
        card._check_card(tiny_card, found)
    with pytest.raises(ValueError, match="got 8 x NVIDIA H200"):
        card._check_card(tiny_card, {"lines": {"card": "NVIDIA H200", "devices": 8}})
    card._check_card(tiny_card, {"lines": {"card": "NVIDIA H200", "devices": 1}})


def test_small_rows(tiny_card):
    lines = card_rows.heads(tiny_card) + card_rows.bias(tiny_card)
    assert all(np.isfinite(line.measured) for line in lines)
    errors = {line.quantity: line.measured for line in lines if line.unit == ""}
    assert errors["output_head [32, 64, 16], float32"] < 1e-6
    assert errors["output_head [32, 64, 16], bfloat16"] > 1e-4
    assert 0 <= errors["3x3 convolution [2, 16, 16, 8]"] < 1e-3


def test_a_variant_of_attention_that_is_not_there_costs_one_line(tiny_card):
    tiny_card.card.attention.variants = ("xla", "cudnn")
    lines = card_rows.attention(tiny_card)
    assert len(lines) == 2 * len(tiny_card.card.attention.shapes)
    done = [line.measured is not None for line in lines]
    assert done == [True, False] * len(tiny_card.card.attention.shapes)
    assert all(line.note for line in lines)


def test_a_checksum_tells_one_bit():
    arrays = [
        np.arange(6.0, dtype=np.float32),
        np.array([True, False]),
        np.arange(3, dtype=np.int8),
    ]
    checksums = lambda: integrity.checksums([jax.numpy.asarray(a) for a in arrays])  # noqa: E731
    ours = checksums()
    arrays[0][3] = np.nextafter(arrays[0][3], 9, dtype=np.float32)
    theirs = checksums()
    assert [int(ours[name] == theirs[name]) for name in ours] == [0, 1, 1]


@pytest.mark.slow
def test_rows_run_in_processes_and_a_second_run_measures_what_is_missing(
    tiny_card, tmp_path, monkeypatch
):
    monkeypatch.delenv("XLA_FLAGS")  # the tests' eight devices; the job measures one
    tiny_card.card.rows = ("bias", "rfm_dit")
    tiny_card.card.ledger = str(tmp_path / "cards.json")
    tiny_card.card.compilers = 0
    tiny_card.stages.rfm_dit.model.dit.hidden_size = 7  # no multiple of the heads
    card.run(tiny_card, tmp_path)
    rows = {row["row"]: row for row in json.loads((tmp_path / "card.json").read_text())}
    assert rows["bias"]["status"] == "measured"
    assert rows["rfm_dit"]["status"] == "failed" and rows["rfm_dit"]["error"]
    assert "| rfm_dit |  | failed: " in (tmp_path / "card.md").read_text()
    assert [r["row"] for r in json.loads((tmp_path / "cards.json").read_text())] == ["bias"]
    written = (tmp_path / "rows" / "bias.json").stat().st_mtime_ns
    tiny_card.card.rows = ("bias",)
    card.run(tiny_card, tmp_path)
    assert (tmp_path / "rows" / "bias.json").stat().st_mtime_ns == written
    tiny_card.card.again, tiny_card.card.seconds = True, 1e-9
    card.run(tiny_card, tmp_path)
    (row,) = json.loads((tmp_path / "card.json").read_text())
    assert (row["status"], row["error"]) == ("not run", "the time was up")


def test_a_process_that_takes_too_long_is_ended(tiny_card, tmp_path):
    (tmp_path / "rows").mkdir()
    record = card._measure("bias", tiny_card, tmp_path, 0.05)
    assert record["status"] == "failed"
    assert record["error"] == "took more than 0 s"
