#!/usr/bin/env bash
# Measures on a borrowed GPU, on a machine that has torch, onnx and onnxruntime (CPU) but reaches no registry.
#   OUT=results benchmarks/measure_on_gpu.sh PACK      PACK: what benchmarks/gpu_wheel.py made
# Leaves in $OUT, each as soon as it is done: gpu.txt, latency.json, peers.json, limits.json, quality.json, steps.txt
# (what each step took and how it ended) and log.txt (what they said).  fp32 and fp16 at 720p, 1080p and 4K.
# LIMIT_S (290): what no longer fits into so many seconds is left out.  NETWORKS ("shipped"): for peers.py; with
# "shipped models/quality.safetensors" LIMIT_S=570 is needed.  BUNDLE: another bundle than the shipped one.
# The rehearsal on a CPU, which leaves out what only CUDA has:
#   OUT=/tmp/out PROVIDER=cpu QUICK=1 benchmarks/measure_on_gpu.sh PACK
set -euo pipefail
shopt -s nullglob
pack=$(realpath "${1:?usage: benchmarks/measure_on_gpu.sh PACK}")
out=$(realpath "${OUT:?OUT names the folder for results}")
provider=${PROVIDER:-cuda} limit=${LIMIT_S:-290}
read -ra networks <<<"${NETWORKS:-shipped}"
cd "$(dirname "$0")/.."
mkdir -p "$out"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

if [ "$provider" = cuda ]; then
  cat "$pack"/onnxruntime_gpu.whl.part* >"$site/onnxruntime_gpu.whl"
  (cd "$site" && sha256sum --quiet --check "$pack/onnxruntime_gpu.whl.sha256")
  python3 -m zipfile -e "$site/onnxruntime_gpu.whl" "$site"
  rm "$site/onnxruntime_gpu.whl"
  # CUDA and cuDNN are torch's own; onnxruntime looks for them beside itself, where they are not.
  libraries=$(python3 - <<'PY'
import glob, importlib.util, os
spec = importlib.util.find_spec("nvidia")
roots = list(spec.submodule_search_locations or []) if spec else []
print(":".join(path for root in roots for path in sorted(glob.glob(os.path.join(root, "*", "lib")))))
PY
)
  export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  peers=("GPU eager fp16" "GPU compile fp16")
else
  peers=("eager fp32" "eager fp32 channels_last")
fi
for wheel in "$pack"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$site"; done
# In front of what is installed, so that its onnxruntime (CPU) is not found.
export PYTHONPATH=$site:$PWD PYTHONUNBUFFERED=1
nvidia-smi >"$out/gpu.txt" 2>&1 || echo "no NVIDIA GPU" >"$out/gpu.txt"
: >"$out/steps.txt" >"$out/log.txt"

failed=0
step() {  # step NAME COMMAND...: within the time that is left
  local name=$1 begin=$SECONDS status=0
  shift
  if [ $((limit - begin)) -lt 10 ]; then
    status="left out, no time"
  else
    echo "== $name" >>"$out/log.txt"
    timeout $((limit - begin)) "$@" >>"$out/log.txt" 2>&1 || status=$?
  fi
  [ "$status" = 0 ] || failed=1
  echo "$name: $((SECONDS - begin)) s, status $status" | tee -a "$out/steps.txt"
}

common=(--out "$out" --providers "$provider" --variants fp32 fp16 ${QUICK:+--quick} ${BUNDLE:+--model "$BUNDLE"})
sizes=(1280x720 1920x1080 3840x2160)
if [ "$provider" != cuda ] && [ -n "${QUICK:-}" ]; then sizes=(160x96 320x192); fi
step engine python3 -c "from deblur_deploy import DeblurEngine; print(DeblurEngine(provider='$provider').receipt)"
step tests python3 -m pytest -q -p no:cacheprovider -m cuda $(grep -l 'mark\.cuda' tests/test_*.py)
step latency python3 benchmarks/latency.py "${common[@]}" --sizes "${sizes[@]}" --passes 1 --budget-s 20
step peers python3 benchmarks/peers.py "${common[@]}" --sizes "${sizes[@]}" --only "${peers[@]}" --no-quality \
  --networks "${networks[@]}" --budget-s 30
step limits python3 benchmarks/limits.py "${common[@]}" --rows "$out/latency.json"
step quality python3 benchmarks/quality.py "${common[@]}"
exit $failed
