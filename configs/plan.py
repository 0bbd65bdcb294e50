"""Does a training step or a sampler fit a pod? Compiles it ahead of time, on any machine.

    python -m dinosae_jax.main --config=configs/plan.py:sae_stage2 \
        --config.target=v5e:4x4 --config.stages.sae_stage2.mesh.fsdp=16

The argument names a training config or a sampler (sample_dit, sample_ddt) and its variants, joined
by commas; `tiny` alone is stage 2, tiny, on eight CPU devices, which needs no extra. `cut` keeps
two layers of every transformer: the collectives and shardings of the real step, compiled faster.
TPU targets need the `plan` extra.
"""

from __future__ import annotations

import ml_collections

from configs import bench

SAMPLERS = {"sample_dit": "rfm_dit", "sample_ddt": "rfm_ddt"}
CUT = {"model.vit.depth": 2}
CUT_FLOWS = {
    "rfm_dit": {**CUT, "model.dit.depth": 2},
    "rfm_ddt": {**CUT, "model.dit.depth": (2, 2)},
}


def get_config(argument=None):
    """Stage 2 at the paper's size on v5e:4x4 unless the argument says otherwise."""
    names = [name for name in (argument or "").split(",") if name]
    known = (*bench.ROWS, *SAMPLERS)
    rows = [name for name in names if name in known] or ["sae_stage2"]
    variants = [name for name in names if name not in known]
    stages = {}
    for row in rows:
        own = ",".join(name for name in variants if name != "cut")
        source = SAMPLERS.get(row, row)
        stages[row] = bench.ROWS[source].get_config(own)
        if "cut" in variants:
            stages[row].update_from_flattened_dict(CUT_FLOWS.get(source, CUT))
        if row in SAMPLERS:
            stages[row].update(dict(samples=True, name=row, batch_size=64))
    config = ml_collections.ConfigDict(
        dict(
            job="plan",
            chain=tuple(rows),
            stages=stages,
            target="cpu:8" if "tiny" in variants else "v5e:4x4",
            # How long the compiler looks for speed, O0 (least) to O3, or `default` as a run does.
            # Least takes a fifth of the time or less; memory and the number of collectives were the
            # same, gathers may move float32 for bfloat16. For the predicted time take `default`.
            effort="O0",
            top=0,  # how many of the costliest instructions are printed
            ledger="",  # a JSON file that the row is entered into
            compile_cache="",
        )
    )
    return config
