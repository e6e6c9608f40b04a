#!/usr/bin/env bash
# Run programs on a machine with a GPU, in named parts of at most 10 minutes each.
#
#   benchmarks/gpu.sh                   list the parts
#   benchmarks/gpu.sh step routing      run two of them
#   benchmarks/gpu.sh --tiny step       try a part on a CPU in some seconds
#
# A part writes one JSON line a case to $OUT (default: benchmarks/results) and does not repeat a line that is there or
# in benchmarks/results; a stopped part continues. `tests` starts anew each time and writes gpu_tests.xml (JUnit).
# Results are at most 8 files of at most 16 MiB.
#
# The machine needs Python 3.11 or newer, torch, torchvision, timm (that of the wheels comes first), lightning, numpy, Pillow, PyYAML, safetensors,
# tabulate, portalocker and, for `tests`, pytest, pytest-timeout and hypothesis. Other packages come as wheels, because
# the machine has no network. Fetch the wheels on a machine with a network and copy the ignored folder wheels/; the parts
# put it on Python's path:
#
#   benchmarks/gpu.sh wheels            `pip wheel --no-deps` into wheels/ (some MB of pure Python)
#
# On the machine: `pip install --no-index --no-deps --target wheels/site wheels/*.whl`.
#
# `pretrain` and `pretrain_micro` read images of 180 classes from $DATA (train/ and val/, see tools/pretrain; the other
# classes stay unseen for transfer), keep their checkpoints in runs/ and put the weights into $WEIGHTS. In $OUT they come in
# files of 15 MiB: cat small.safetensors.* > small.safetensors
#
# `tasks` reads every task of $TASKS, a folder NAME or an archive NAME.tar.xz, and every backbone of $WEIGHTS,
# NAME.safetensors (or its pieces) with NAME.json. It works in runs/gpu_tasks_NAME and leaves the finished runs in
# $OUT/gpu_tasks_NAME.tar.gz; a fresh machine continues from that file in benchmarks/results. The path of $WEIGHTS belongs
# to the settings of a run: give the same one each time. The archive has the lines and tables of finished sweeps for
# benchmarks/results, where report.py reads them.
#
# git ignores wheels/, $DATA, $TASKS and $WEIGHTS, so name to whatever copies the tree those that the parts need, and
# never runs/ as a whole. All parts of a call share ten minutes. $ARGS is added to the command of a timing program, such as
# ARGS="--batches 1 8".
set -euo pipefail
cd "$(dirname "$0")/.."
WHEELS="fvcore==0.1.5.post20221221 iopath yacs termcolor jsonargparse>=4.51,<5 docstring-parser typeshed-client importlib-resources timm==1.0.31"
OUT="${OUT:-benchmarks/results}"
DATA="${DATA:-runs/tiny-imagenet-48}"
TASKS="${TASKS:-runs/tasks}"
WEIGHTS="${WEIGHTS:-runs/weights}"
tiny=""

list() {
  cat <<'TEXT'
benchmarks/gpu.sh [--tiny] PART...
  tests     the CUDA tests of the suite
  step      a training step in bf16 on ViT-B/16: LoRA with four exits against plain LoRA, time and memory
  routing   a routed batch in bf16 on ViT-B/16 against the static network, batches of 1, 8, 64 and 256
  compile   torch.compile by stage against eager routing
  pretrain  pre-train the ordinary backbone "small" for 7 minutes
  pretrain_micro  pre-train "micro_plain", which is micro without exits and token merging in its loss
  tasks     LoRA on every task and backbone, in three arms: static, static with token merging, and the default
  wheels    (with a network) fetch the packages that the machine lacks
TEXT
}

# Install the carried wheels beside the machine's own packages.
prepare() {
  mkdir -p "$OUT"
  export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
  if compgen -G "wheels/*.whl" > /dev/null; then
    local site="$PWD/wheels/site"
    if [ ! -e "$site.done" ]; then
      python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" wheels/*.whl
      touch "$site.done"
    fi
    export PYTHONPATH="$PYTHONPATH:$site"
  fi
  python3 -c "import sys, lightning, timm, torch; print(sys.version.split()[0], *(f'{m.__name__} {m.__version__}' for m in (torch, timm, lightning)))"
}

# Run a command for as long as the ten minutes of the call allow; 124 means that they are over.
limited() {
  local left=$((575 - SECONDS))
  [ "$left" -gt 5 ] || { echo "no time is left; call this part again" >&2; return 124; }
  timeout -k 15 "$left" "$@"
}

# Continue from the lines that an earlier run brought back.
resume() {
  if [ ! -e "$OUT/$1" ] && [ -e "benchmarks/results/$1" ]; then cp "benchmarks/results/$1" "$OUT/$1"; fi
}

# Run a timing program: its file, and the file of its lines.
timing() {
  resume "$2"
  if [ -n "$tiny" ]; then
    limited python3 "benchmarks/$1" --out "$OUT/$2" --device cpu --precision bf16 --tiny --rounds 2 --batches 2
  else
    limited python3 "benchmarks/$1" --out "$OUT/$2" --device cuda --precision bf16 ${ARGS:-}
  fi
}

# Run the CUDA tests in one process, or with --tiny the same on the CPU. Other files may need packages that the machine
# lacks, and its versions may warn of other things.
cuda_tests() {
  local chosen=(-m cuda $(grep -l mark.cuda tests/test_*.py))
  [ -z "$tiny" ] || chosen=(-k cpu tests/test_device.py)
  limited python3 -m pytest -q -o addopts= -p no:cacheprovider -W default --junitxml="$OUT/gpu_tests.xml" "${chosen[@]}"
}

# Pre-train in runs/gpu_NAME: a name, and options.
learn() {
  local name="$1" run="${tiny:+$OUT/}runs/gpu_$1"
  shift
  [ -z "$tiny" ] || set -- "$@" --epochs 1 --width 16 --heads 2 --depth 8 --classes 2 --batch 8 --device cpu
  limited python3 -m tools.pretrain --data "$DATA" --out "$run" --name "$name" "$@" --stop_after $((535 - SECONDS))
}

# Put the log and, once they are there, the weights of a pre-training where part `tasks` and the caller find them.
deliver() {
  local name="$1" run="${tiny:+$OUT/}runs/gpu_$1"
  [ ! -e "$run/log.jsonl" ] || cp "$run/log.jsonl" "$OUT/gpu_$name.jsonl"
  if [ -e "$run/$name.safetensors" ]; then
    mkdir -p "$WEIGHTS"
    cp "$run/$name.json" "$run/$name.safetensors" "$WEIGHTS"
    cp "$run/$name.json" "$run/$name.md" "$OUT"
    split -b 15m -d -a 1 "$run/$name.safetensors" "$OUT/$name.safetensors."
  fi
}

# The two commands of micro (tools/pretrain/README.md) without exits and token merging; the second starts with the first.
pretrain_micro() {
  local common=(--arch micro --classes 180 --augment light --patch_drop 0.6 --batch 128 --muon)
  local first="${tiny:+$OUT/}runs/gpu_micro_first/micro_first.safetensors"
  learn micro_first "${common[@]}" --epochs 10 --lr 1.5e-3
  [ -e "$first" ] || return 0 # stopped; the next call continues
  learn micro_plain "${common[@]}" --epochs 13 --lr 1.2e-3 --start "$first"
  deliver micro_plain
}

# Train the tasks on each backbone, as far as ten minutes go.
tasks() {
  local archive file name run status
  for archive in "$TASKS"/*.tar.xz; do
    name="$(basename "$archive" .tar.xz)"
    [ ! -e "$archive" ] || [ -e "$TASKS/$name/train800.txt" ] || python3 -m tarfile -e "$archive" "$TASKS"
  done
  for file in "$WEIGHTS"/*.json; do
    name="$(basename "$file" .json)" status=0
    run="${tiny:+$OUT/}runs/gpu_tasks_$name"
    [ -e "$WEIGHTS/$name.safetensors" ] || cat "$WEIGHTS/$name.safetensors".* > "$WEIGHTS/$name.safetensors"
    resume "gpu_tasks_$name.tar.gz"
    mkdir -p "$run"
    compgen -G "$run/*/results.jsonl" > /dev/null || [ ! -e "$OUT/gpu_tasks_$name.tar.gz" ] ||
      tar xzf "$OUT/gpu_tasks_$name.tar.gz" -C "$run"
    limited python3 benchmarks/gpu_tasks.py --data "$TASKS" --weights "$WEIGHTS/$name.safetensors" \
      --out "$run" ${tiny:+--tiny --processes 1} || status=$?
    find "$run" \( -name results.jsonl -o -name predictions.npz -o -name logits.npz -o -path "$run/*_$name.*" \) -printf '%P\0' |
      tar czf "$OUT/gpu_tasks_$name.tar.gz" -C "$run" --null -T -
    [ "$status" = 0 ] || [ "$status" = 124 ] || exit "$status" # 124: the time is over
  done
}

part() {
  case "$1" in
    tests) cuda_tests ;;
    step) timing training.py gpu_step.jsonl ;;
    routing) timing latency.py gpu_routing.jsonl ;;
    compile) timing stage_compile.py gpu_compile.jsonl ;;
    pretrain)
      local status=0
      learn small --arch small --classes 180 --minutes 7 || status=$?
      deliver small
      return "$status"
      ;;
    pretrain_micro) pretrain_micro ;;
    tasks) tasks ;;
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
