"""The page of everything that was measured on a card: docs/cards.md, made of docs/cards.json."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from dinosae_jax import names
from dinosae_jax.runtime import files

Record = dict[str, Any]  # row, status, seconds, lines or error, card, date, commit, jax
SAME = ("card", "date", "commit", "row")  # a record replaces one that has these in common
HEAD = ("row", "quantity", "measured", "predicted", "card", "date", "commit")
INTRODUCTION = """# Measured on a card

One command measures this code on one H100 or H200, in at most eight minutes:

```bash
pip install -e '.[cuda]'
python -m dinosae_jax.main --config=configs/bench.py:card --workdir=runs/card \\
    --config.card.ledger=docs/cards.json
```

Each row runs in a process of its own, so one that fails costs that row alone. Run it again with the
same `--workdir`, and it measures the rows that are missing; compiled programs are kept there.
`--config.card.again=True` measures all rows again, `--config.card.rows="('rfm_dit',)"` picks some.
The workdir holds `card.json`, `card.md` (the table of this run) and `rows/`, a file for each row.
With `ledger` the rows are also entered here. `card,tiny` rehearses all of it on a CPU in some
minutes; its numbers mean nothing: do not enter them.

- `rfm_*`, `sae_*`: a training step with synthetic batches, `sample_*`: a sampler of 50 steps, from
  noise to images, `encode`: images to tokens. Time and memory are predicted from the program that
  the card's compiler made: time by its roofline (`configs/plan.py`), memory by the compiler's plan.
  Peaks: 989 TFLOP/s is the manufacturer's, 790 what large products of bfloat16 reach.
- `attention`: forward and backward pass, by XLA's own code and by cuDNN, beside the time at 989
  TFLOP/s.
- `heads`: relative error of float32 products against float64 by the precision that is asked for.
- `bias`: relative error of bias gradients of bfloat16 layers against float64.
- `repeat_*`: arrays of the state that differ in a bit between two runs of one step.
- `loader`: training batches from JPEGs, beside 230 images/s for each core.
"""


def enter(path: epath.Path, records: list[Record]) -> None:
    """Puts measured rows into a JSON file, and writes the Markdown page of the same name.

    Args:
      path: the JSON file, which need not exist.
      records: rows with status 'measured' are entered, others are not.
    """
    kept = json.loads(path.read_text()) if path.exists() else []
    new = [record for record in records if record["status"] == "measured"]
    keys = [_key(record) for record in new]
    kept = [record for record in kept if _key(record) not in keys] + new
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, kept)
    files.write_text(path.with_suffix(".md"), page(kept))


def page(records: list[Record]) -> str:
    """The whole page: how to run it, and every row that was ever measured."""
    absent = set(names.CARD_ROWS) - {record["row"] for record in records}
    missing = [_not_run(row) for row in names.CARD_ROWS if row in absent]
    return "\n".join([INTRODUCTION, table([*records, *missing])])


def table(records: list[Record]) -> str:
    """The lines of some rows as a Markdown table."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for record in records:
        about = [record.get(name, "") for name in ("card", "date")] + [record.get("commit", "")[:9]]
        for quantity, measured, predicted in _cells(record):
            cells = [record["row"], quantity, measured, predicted, *about]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(record: Record) -> list[tuple[str, str, str]]:
    if record["status"] != "measured":
        reason = f": {record['error']}" if record.get("error") else ""
        return [("", f"{record['status']}{reason}".replace("|", "/"), "")]
    return [
        (
            line["quantity"],
            _number(line["measured"], line["unit"]) or f"failed: {line['note']}".replace("|", "/"),
            _number(line["predicted"], line["unit"]),
        )
        for line in record["lines"]
    ]


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.4g} {unit}".strip()


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in SAME)


def _not_run(row: str) -> Record:
    return {"row": row, "status": "not run"}
