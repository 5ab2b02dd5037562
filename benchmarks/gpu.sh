#!/usr/bin/env bash
# Every benchmark on a CUDA machine, in under ten minutes: correctness first, then JSON and the printed tables into $OUT.
#
#     bash benchmarks/gpu.sh                 # OUT=benchmarks/out by default
#     TOY=1 bash benchmarks/gpu.sh           # the same commands at toy size, on any machine
#
# A step that fails or takes too long is reported and the others go on; the exit status says whether any did.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/out}
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
failed=()

# step NAME SECONDS COMMAND...: its output goes to the screen and to NAME.txt, the last line of that to NAME.json where it is JSON.
step() {
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    echo "=== $name: $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.txt"
    status=${PIPESTATUS[0]}
    grep '^{' "$OUT/$name.txt" | tail -n 1 >"$OUT/$name.json" || true
    [ -s "$OUT/$name.json" ] || rm -f "$OUT/$name.json"
    if [ "$status" -ne 0 ]; then
        failed+=("$name")
        [ "$status" -eq 124 ] && echo "--- $name: stopped after $limit s" || echo "--- $name: failed with status $status"
    fi
    echo "--- $name: $((SECONDS - began)) s"
}

if [ -n "${TOY:-}" ]; then
    toy=(--toy)
    shape=(--toy)
    train=(--toy)
else
    toy=()
    shape=(--preset 1b)
    train=(--preset 1b --warmup 10 --steps 12)  # fewer than by default, to stay within the ten minutes
    # On CUDA the tests' Triton kernels are compiled, not interpreted.
    step tests 90 env TRITON_INTERPRET=0 "$PYTHON" -m pytest -q tests/test_cuda.py tests/test_quantized.py tests/test_offload.py tests/test_choices.py -k cuda
fi
step train_step 250 "$PYTHON" benchmarks/train_step.py "${train[@]}"
step loss 60 "$PYTHON" benchmarks/loss.py "${toy[@]}"
step muon 30 "$PYTHON" benchmarks/muon.py "${toy[@]}"
step decode 100 "$PYTHON" benchmarks/decode.py "${shape[@]}"
step beam 60 "$PYTHON" benchmarks/beam.py "${toy[@]}"
step mmlu 90 "$PYTHON" benchmarks/mmlu.py "${shape[@]}"
for name in layers low_rank decode_attention; do
    [ -f "benchmarks/$name.py" ] && step "$name" 20 "$PYTHON" "benchmarks/$name.py" "${toy[@]}"
done
if [ -f "$OUT/train_step.json" ] && [ -f "$OUT/decode.json" ]; then
    step study 10 "$PYTHON" benchmarks/study.py --extrapolate --train_step "$OUT/train_step.json" --decode "$OUT/decode.json"
else
    echo "--- study: skipped, it needs the results of train_step and decode"
    failed+=(study)
fi

echo "=== $SECONDS s in all, results in $OUT"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
