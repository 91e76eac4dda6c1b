#!/usr/bin/env bash
# What a GPU has to show: every method on a block of LLaMA-7B's shape, checked against the CPU's
# masks, and the cost of learning rates. Needs torch, transformers and safetensors; no installation
# of besa, no compiler, no network. Leaves gpu.json and allocation-DEVICE.json in $OUT.
#
#     benchmarks/gpu.sh
#     benchmarks/gpu.sh --tiny --device cpu    # only that it runs
set -euo pipefail
cd "$(dirname "$0")/.."

device=cuda
tiny=()
while (($#)); do
    case $1 in
        --device) device=$2; shift 2 ;;
        --tiny) tiny=(--tiny); shift ;;
        *) echo "gpu.sh: unknown option $1 (--device cuda|cpu, --tiny)" >&2; exit 2 ;;
    esac
done

out=${OUT:-benchmarks/results}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=. HF_HUB_OFFLINE=1 DO_NOT_TRACK=1

# The second has its say even if a check of the first fails.
failed=0
"$python" benchmarks/gpu.py --device "$device" --json "$out/gpu.json" "${tiny[@]}" || failed=1
"$python" benchmarks/allocation.py --device "$device" --json "$out/allocation-$device.json" \
    "${tiny[@]}" || failed=1
exit $failed
