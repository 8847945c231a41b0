#!/usr/bin/env bash
# The first ten minutes on a GPU, most telling part first. Each part has its limit; one that fails is named and stops no other.
#
#   OUT=FOLDER tests/gpu/first_ten_minutes.sh      from anywhere; FOLDER is made: log.txt, summary.txt, table.md and a JSON per bench
#
# WHEELS  a folder with the wheel of dacite, for a machine that cannot install it: pip download --no-deps -d .whl dacite
# PYTHON  the interpreter whose torch sees the GPU (python3)
# MOST    no part runs longer than so many seconds, to try the script itself
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
OUT=${OUT:-runs/first_ten_minutes} WHEELS=${WHEELS:-.whl} PYTHON=${PYTHON:-python3} MOST=${MOST:-600}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
: >"$OUT/log.txt"; : >"$OUT/summary.txt"
failed=0

tell() { echo "$*" | tee -a "$OUT/summary.txt"; }

part() { # part SECONDS NAME COMMAND...
  local limit=$1 name=$2 begun=$SECONDS rc
  shift 2
  [ "$limit" -le "$MOST" ] || limit=$MOST
  echo "=== $name: $*" >>"$OUT/log.txt"
  timeout -k 3 "$limit" "$@" >>"$OUT/log.txt" 2>&1
  rc=$?
  [ "$rc" = 0 ] || failed=$((failed + 1))
  tell "PART $name rc=$rc $((SECONDS - begun)) s of $limit$(case $rc in 124|137) echo ', out of time' ;; esac)"
}

tests() { # tests SECONDS NAME FILE [-k WORDS]; warnings are told at the end, and are no errors here
  local limit=$1 name=$2
  shift 2
  part "$limit" "$name" "$PYTHON" -m pytest -q -W default -p no:cacheprovider "$@"
}

bench() { # bench SECONDS NAME REPEATS
  part "$1" "bench $2" "$PYTHON" -m dist_defend bench "$2" --repeats "$3" --json "$OUT/$2.json"
}

# Only what is missing, without the network.
if ! "$PYTHON" -c "import dacite" 2>/dev/null && compgen -G "$WHEELS/dacite-*.whl" >/dev/null; then
  site=$(mktemp -d)
  timeout 15 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/dacite-*.whl
  export PYTHONPATH=$site:${PYTHONPATH:-}
fi
export PYTHONPATH=$PWD:${PYTHONPATH:-} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

tell "$(timeout 10 nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm --format=csv,noheader 2>&1)"
tell "$(timeout 20 "$PYTHON" -c 'import sys, torch, numpy; print("python", sys.version.split()[0], "torch", torch.__version__, "numpy", numpy.__version__, "GPUs", torch.cuda.device_count())' 2>&1)"

tests 90 "graphs equal eager steps: I-BAU, RNP" tests/gpu/test_graphs.py -k "equals_eager and (ibau or rnp)"
bench 100 graphs 3
tests 50 "no step waits" tests/gpu/test_graphs.py -k never_waits
tests 75 "graphs equal eager steps: the others" tests/gpu/test_graphs.py -k "(equals_eager and not ibau and not rnp) or resumes or shapes"
tests 70 "encoders and classifiers" tests/gpu/test_encoder_pipeline.py
bench 40 ibau 3
bench 50 zskt 1
tests 30 "two GPUs" tests/gpu/test_two_gpus.py
[ ! -f "$OUT/graphs.json" ] || timeout 10 "$PYTHON" -m tests.gpu.table "$OUT/graphs.json" >"$OUT/table.md"

grep -hE "^(FAILED|ERROR|E  )|: [0-9.]+x|passed|failed" "$OUT/log.txt" | tail -60
tell "$failed parts failed; $SECONDS s"
[ "$failed" = 0 ]
