#!/usr/bin/env bash
# What a GPU has to show, in under eight minutes: the kernels against F.linear, whole models against
# dense ones in transformers with their memory, the time of every pruning method on a block of
# LLaMA-7B's shape, BESA's allocation against the obvious way, and all checks. Needs torch,
# transformers and safetensors; no installation of besa, no network, and no compiler but the C
# compiler that torch.compile asks for (without it blocks run as they are). Each part leaves a JSON
# file in $OUT (benchmarks/results/gpu); the tables come last, and the bars after them.
#
#     benchmarks/gpu.sh
#     benchmarks/gpu.sh --half 1; benchmarks/gpu.sh --half 2    # under four minutes each
#     benchmarks/gpu.sh --parts prune,allocation                # of kernels,decode,prune,allocation
#     benchmarks/gpu.sh --tiny --device cpu                     # only that it runs
#
# A part whose file says that it was finished is not run again, and the kernels go on where they were
# cut off; --again begins anew. Exit code 1: a check failed, or a part was cut off.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    echo "gpu.sh: $1 (--device cuda|cpu, --tiny, --half 1|2, --again," \
        "--parts kernels,decode,prune,allocation)" >&2
    exit 2
}

device=cuda half= parts=kernels,decode,prune,allocation again=
tiny=()
while (($#)); do
    case $1 in
        --device | --half | --parts) (($# > 1)) || usage "$1 needs a value" ;;&
        --device) device=$2; shift 2 ;;
        --half) half=$2; shift 2 ;;
        --parts) parts=$2; shift 2 ;;
        --tiny) tiny=(--tiny); shift ;;
        --again) again=yes; shift ;;
        *) usage "unknown option $1" ;;
    esac
done
[[ $half =~ ^[12]?$ ]] || usage "unknown half $half"
[[ $parts =~ ^(kernels|decode|prune|allocation)(,(kernels|decode|prune|allocation))*$ ]] ||
    usage "unknown part in $parts"

out=${OUT:-benchmarks/results/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=. HF_HUB_OFFLINE=1 DO_NOT_TRACK=1

finished() {
    "$python" -c 'import json, sys; sys.exit(not json.load(open(sys.argv[1])).get("finished"))' \
        "$1" 2>/dev/null
}

# run HALF PART FILE SECONDS SCRIPT ARGUMENTS...: the other parts have their say even if this fails.
failed=0
run() {
    local in_half=$1 part=$2 json=$out/$3.json seconds=$4
    shift 4
    [[ -z $half || $half == "$in_half" ]] && [[ ,$parts, == *,$part,* ]] || return 0
    [[ -z $again ]] || rm -f "$json"
    if finished "$json"; then
        echo "== $json is there (--again measures it again)"
        return
    fi
    echo "== $json"
    local code=0
    timeout "$seconds" "$python" "benchmarks/$1" "${@:2}" --device "$device" --json "$json" \
        "${tiny[@]}" || code=$?
    ((code != 124)) || echo "gpu.sh: $json was cut off after $seconds s" >&2
    ((code == 0)) || failed=1
}

# Each script begins no case after --seconds; the seconds before its name are the end of it. Those
# of a half add up to four minutes. A CPU is only to show that it runs, at leisure.
at_most=1 model=llama-7b
[[ $device == cuda ]] || at_most=10
[[ -z ${tiny:-} ]] || model=tiny
run 1 kernels kernels $((155 * at_most)) gpu_kernels.py --seconds $((140 * at_most))
[[ $model == tiny ]] || run 1 decode decode-llama-3-8b $((85 * at_most)) gpu_decode.py \
    --seconds $((70 * at_most)) --shape llama-3-8b --batches 1
run 2 decode "decode-$model" $((150 * at_most)) gpu_decode.py --seconds $((135 * at_most)) \
    --shape "$model"
run 2 prune pruning $((55 * at_most)) gpu.py --seconds $((35 * at_most)) --samples 8
run 2 allocation "allocation-$device" $((35 * at_most)) allocation.py --shapes llama-7b \
    --dtypes bfloat16

echo
"$python" benchmarks/gpu_report.py "$out"
exit $failed
