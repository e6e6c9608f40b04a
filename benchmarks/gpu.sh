#!/usr/bin/env bash
# Run programs on a machine with a GPU, in named parts of at most 10 minutes each.
#
#   benchmarks/gpu.sh                   list the parts
#   benchmarks/gpu.sh step routing      run two of them
#   benchmarks/gpu.sh --tiny step       try a part on a CPU in some seconds
#
# A part writes one JSON line a case to $OUT (default: benchmarks/results) and does not repeat a line that is there or
# in benchmarks/results; a stopped part continues. Results are at most 8 files of at most 16 MiB.
#
# The machine needs Python 3.11 or newer, torch, torchvision, timm, lightning, numpy, Pillow, PyYAML, safetensors,
# tabulate, portalocker and, for `tests`, pytest, pytest-timeout and hypothesis. Other packages come as wheels, because
# the machine has no network. Fetch the wheels on a machine with a network and copy the ignored folder wheels/; the parts
# put it on Python's path:
#
#   benchmarks/gpu.sh wheels            `pip wheel --no-deps` into wheels/ (about 1 MB of pure Python)
#
# On the machine: `pip install --no-index --no-deps --target wheels/site wheels/*.whl`.
#
# Part `pretrain` reads images of 180 classes from $DATA (train/ and val/, see tools/pretrain; the other classes stay unseen
# for transfer) and keeps its checkpoint in runs/gpu_pretrain, so it continues as long as the machine keeps that folder. The
# weights come in files of 15 MiB: cat small.safetensors.* > small.safetensors
set -euo pipefail
cd "$(dirname "$0")/.."
WHEELS="fvcore==0.1.5.post20221221 iopath yacs termcolor jsonargparse>=4.42,<5 docstring-parser typeshed-client importlib-resources rich"
OUT="${OUT:-benchmarks/results}"
DATA="${DATA:-shared/data/source/tiny-imagenet-48}"
tiny=""

list() {
  cat <<'TEXT'
benchmarks/gpu.sh [--tiny] PART...
  tests     the CUDA tests of the suite
  step      a training step in bf16 on ViT-B/16: LoRA with four exits against plain LoRA, time and memory
  routing   a routed batch in bf16 on ViT-B/16 against the static network, batches of 1, 8, 64 and 256
  compile   torch.compile by stage against eager routing
  pretrain  pre-train the ordinary backbone "small" for up to 8 minutes
  wheels    (with a network) fetch the packages that the machine lacks
TEXT
}

# Install the carried wheels beside the machine's own packages.
prepare() {
  mkdir -p "$OUT"
  export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
  if compgen -G "wheels/*.whl" > /dev/null; then
    local site="$PWD/wheels/site"
    [ -d "$site" ] || python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" wheels/*.whl
    export PYTHONPATH="$PYTHONPATH:$site"
  fi
}

# Continue from the lines that an earlier run brought back.
resume() {
  if [ ! -e "$OUT/$1" ] && [ -e "benchmarks/results/$1" ]; then cp "benchmarks/results/$1" "$OUT/$1"; fi
}

# Run a timing program: its file, and the file of its lines.
timing() {
  resume "$2"
  if [ -n "$tiny" ]; then
    timeout 570 python3 "benchmarks/$1" --out "$OUT/$2" --device cpu --precision bf16 --tiny --rounds 2 --batches 2
  else
    timeout 570 python3 "benchmarks/$1" --out "$OUT/$2" --device cuda --precision bf16
  fi
}

pretrain() {
  local run="runs/gpu_pretrain" more=(--minutes 7.5 --stop_after 500 --classes 180)
  if [ -n "$tiny" ]; then
    run="$OUT/gpu_pretrain"
    more=(--epochs 1 --width 16 --heads 2 --depth 2 --classes 2 --batch 8 --device cpu --stop_after 60)
  fi
  timeout 570 python3 -m tools.pretrain --data "$DATA" --arch small --out "$run" "${more[@]}"
  cp "$run/log.jsonl" "$OUT/gpu_pretrain.jsonl"
  if [ -e "$run/small.safetensors" ]; then
    split -b 15m -d -a 1 "$run/small.safetensors" "$OUT/small.safetensors."
    cp "$run/small.json" "$OUT"
  fi
}

part() {
  case "$1" in
    tests) resume gpu_tests.jsonl; timeout 570 python3 benchmarks/gpu_tests.py --out "$OUT/gpu_tests.jsonl" ${tiny:+--device cpu} ;;
    step) timing training.py gpu_step.jsonl ;;
    routing) timing latency.py gpu_routing.jsonl ;;
    compile) timing stage_compile.py gpu_compile.jsonl ;;
    pretrain) pretrain ;;
    wheels) rm -rf wheels; python3 -m pip wheel -q --no-deps -w wheels $WHEELS ;;
    *) echo "no part is named '$1'; the parts are:" >&2; list >&2; exit 2 ;;
  esac
}

[ "${1:-}" != "--tiny" ] || { tiny=1; shift; }
[ $# -gt 0 ] || { list; exit 0; }
prepare
for name in "$@"; do
  echo "== $name"
  part "$name"
done
