#!/usr/bin/env bash
# Trains on a borrowed GPU, on a machine that has torch but reaches no registry.
#   benchmarks/on_gpu.sh PACK      PACK: what benchmarks/gpu_pack.py made
# Leaves in $OUT: last.safetensors (written every minute), log.csv, gpu.txt.
# MINUTES (8) of training after a probe of the pace; STEPS overrides them, as in the rehearsal on a CPU:
#   OUT=/tmp/out STEPS=20 PATCHES=2 WORKERS=1 benchmarks/on_gpu.sh runs/gpu
set -euo pipefail
pack=${1:?usage: benchmarks/on_gpu.sh PACK}
out=${OUT:?OUT names the folder for results}
patches=${PATCHES:-32} side=${SIDE:-192} workers=${WORKERS:-14} rate=${RATE:-1e-3} loss=${LOSS:-l1=1,psnr=0.02}
cd "$(dirname "$0")/.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for wheel in "$pack"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$site"; done
export PYTHONPATH=$site:$PWD
nvidia-smi >"$out/gpu.txt" 2>&1 || echo "no NVIDIA GPU" >"$out/gpu.txt"

train() {  # train FOLDER STEPS
  python3 -m deblur_deploy.cli.train "$pack/photos" "$pack/pairs"=0.4 --frames "$pack/frames"=0.12 \
    --video "$pack"/pairs/*/sharp --init "$pack/init.safetensors" --out "$1" --steps "$2" --force \
    --stages "1:${patches}x${side}" --workers "$workers" --learning-rate "$rate" --loss "$loss" \
    --log-every 20 --validate-every 1000000 --save-every-s 60 --cache-gb 24 --bank-gb 0.1
}

steps=${STEPS:-}
if [ -z "$steps" ]; then
  probe=$(mktemp -d)/run
  train "$probe" 120 || [ -f "$probe/log.csv" ]
  # Images a second of the last line, which has no start-up in it.
  steps=$(python3 - "$probe/log.csv" "$patches" "${MINUTES:-8}" <<'PY'
import csv, sys
pace = float(list(csv.DictReader(open(sys.argv[1])))[-1]["images_per_s"]) / int(sys.argv[2])
print(int(0.93 * 60 * float(sys.argv[3]) * pace))
PY
)
fi
echo "training for $steps steps"
# Where matplotlib is missing, only the drawings at the end are.
train "$out/run" "$steps" || [ -f "$out/run/last.safetensors" ]
cp "$out/run/last.safetensors" "$out/run/log.csv" "$out/"
