#!/usr/bin/env bash
# Makes the rows of docs/ledger.json that are missing: `docs/ledger.sh [PATTERN]`, no hardware
# needed, one to ten minutes a row. PATTERN is a regular expression on the lines below.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
ledger=docs/ledger.json

# argument of configs/plan.py, target, fsdp, global batch, further fields of the stage; effort=...
# is the compiler's
rows() {
  cat <<'ROWS'
rfm_dit,cut v6e:2x4 8 1024 model.dit.remat=full
sae_stage1,cut v6e:2x4 1 256 accumulation=4
sample_dit,cut v6e:2x2 1 256
rfm_dit v6e:2x4 8 1024 model.dit.remat=full
sample_dit v6e:2x2 1 256
sae_stage2 v5e:4x4 1 256 accumulation=8
rfm_ddt v5p:2x2x4 16 1024
sae_stage1 v5e:4x4 1 256 accumulation=8
sae_stage3 v5e:4x4 1 256 accumulation=8
sae_stage4 v5e:4x4 1 256 accumulation=8
sample_ddt v6e:2x2 1 256
rfm_dit v5e:4x4 16 1024 model.dit.remat=full
rfm_dit v4:2x2x4 16 1024
rfm_dit v5p:2x2x4 16 1024
rfm_dit v6e:16x16 16 1024
rfm_ddt v6e:2x4 8 1024 model.dit.remat=full
rfm_ddt v5e:4x4 16 1024 model.dit.remat=full
rfm_ddt v4:2x2x4 16 1024
rfm_ddt v5p:4x4x4 16 1024
sae_stage1 v4:2x2x4 1 256
sae_stage2 v4:2x2x4 1 256
sae_stage2 v4:2x2x4 1 256 accumulation=2
sae_stage3 v4:2x2x4 1 256
sae_stage4 v4:2x2x4 1 256
sae_stage1 v5p:2x2x2 1 256
sae_stage2 v5p:2x2x2 1 256
sae_stage3 v5p:2x2x2 1 256
sae_stage4 v5p:2x2x2 1 256
sae_stage1 v6e:4x4 1 256
sae_stage2 v6e:4x4 1 256
sae_stage2 v6e:4x4 1 256 accumulation=2
sae_stage3 v6e:4x4 1 256
sae_stage4 v6e:4x4 1 256
sample_dit v4:2x2x1 1 256
sample_dit v5e:2x2 1 256
sample_dit v5p:2x2x1 1 256
sample_ddt v4:2x2x1 1 256
sample_ddt v5e:2x2 1 256
sample_ddt v5p:2x2x1 1 256
sae_stage1,dinov2_vitb14_reg v6e:4x4 1 256
sae_stage1,siglip2_vitb16 v6e:4x4 1 256
sae_stage1,mae_vitb16 v6e:4x4 1 256
sae_stage1,eupe_vitb16 v6e:4x4 1 256
rfm_dit h200:8 8 1024
rfm_ddt h200:8 8 1024
sae_stage1 h200:8 1 256
sae_stage2 h200:8 1 256
sae_stage3 h200:8 1 256
sae_stage4 h200:8 1 256
sample_dit h200:8 1 512
sample_ddt h200:8 1 512
sample_dit h200:8 1 512 effort=default
sample_ddt h200:8 1 512 effort=default
rfm_dit v6e:2x4 8 1024 model.dit.remat=full effort=default
rfm_dit v5p:2x2x4 16 1024 effort=default
rfm_dit h200:8 8 1024 effort=default
rfm_ddt v5p:2x2x4 16 1024 effort=default
rfm_ddt v6e:2x4 8 1024 model.dit.remat=full effort=default
rfm_ddt h200:8 8 1024 effort=default
sample_dit v6e:2x2 1 256 effort=default
sample_dit v5p:2x2x1 1 256 effort=default
sae_stage1 h200:8 1 256 effort=default
sae_stage2 h200:8 1 256 effort=default
sae_stage4 h200:8 1 256 effort=default
sae_stage1 v6e:4x4 1 256 effort=default
sae_stage1 v5p:2x2x2 1 256 effort=default
sae_stage2 v6e:4x4 1 256 accumulation=2 effort=default
sae_stage2 v5p:2x2x2 1 256 effort=default
sae_stage4 v6e:4x4 1 256 effort=default
sae_stage4 v5p:2x2x2 1 256 effort=default
ROWS
}

rows | grep -E -- "${1:-.}" | while read -r argument target fsdp batch fields; do
  stage="--config.stages.${argument%%,*}"
  flags=("--config=configs/plan.py:$argument" "--config.target=$target")
  flags+=("$stage.mesh.fsdp=$fsdp" "$stage.batch_size=$batch")
  for field in $fields; do
    case $field in
      effort=*) flags+=("--config.$field") ;;
      *) flags+=("$stage.$field") ;;
    esac
  done
  if grep -qF "dinosae_jax.main ${flags[*]}\"" "$ledger" 2>/dev/null; then continue; fi
  echo "${flags[*]}"
  "$python" -m dinosae_jax.main "${flags[@]}" --workdir="${TMPDIR:-/tmp}/plan" \
    --config.ledger="$ledger" </dev/null
done
