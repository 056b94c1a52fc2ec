#!/usr/bin/env bash
# What to run on a GPU that is lent for minutes, the most telling first; from a clone with torch, triton, transformers
# and pytest installed, of which nothing is changed:
#   bash docs/benchmarks/gpu.sh OUTPUT_FOLDER [PART]     # PART: 1, 2 or 3; all of them where none is named
#   bash docs/benchmarks/gpu.sh --dry                    # anywhere: that all commands are good and fit into memory
# 1, 4 minutes: are the kernels right, and attention to 8 x 32k tokens. 2, 4 minutes: whole steps. 3: all else.
# Each command has its own limit, and writes its log and its JSON when it ends; none stops the others.
set -uo pipefail
cd "$(dirname "$0")/../.."
usage="usage: gpu.sh OUTPUT_FOLDER [1|2|3], or gpu.sh --dry"
out="${1:?$usage}"
wanted="${2:-1 2 3}"
dry=""
case "$wanted" in 1 | 2 | 3 | "1 2 3") ;; *) echo "$usage" >&2 && exit 2 ;; esac
part=0
here=docs/benchmarks
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

run() { # name, seconds, command ...
    local name="$1" limit="$2"
    shift 2
    if [ -n "$dry" ]; then
        printf '%s %s %s %s\n' "$part" "$name" "$limit" "$(printf '%q ' "$@")"
        return
    fi
    [[ " $wanted " == *" $part "* ]] || return 0
    local begin=$SECONDS
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
    printf '%s %s: exit %s, %s s\n' "$part" "$name" "$?" "$((SECONDS - begin))" | tee -a "$out/summary.txt"
}
bench() { # name, seconds, arguments ...
    local name="$1" limit="$2"
    shift 2
    run "$name" "$limit" hfkv bench "$@" --device cuda --json "$out/$name.json"
}
check() { # whatever has been measured by now
    local results=()
    for result in "$out"/{attention,step,offload,moe,mla}*.json; do
        [ -e "$result" ] && results+=(--from "$result")
    done
    [ "${#results[@]}" = 0 ] || run "check-$part" 30 hfkv bench --check $here/targets-gpu.toml "${results[@]}"
}
all() {
    part=1
    run selftest 55 python $here/selftest.py cuda "$out/selftest.json"
    bench attention 50 attention --shape llama-8b --batch 8 --context 32768 --seconds 5 --peers DynamicCache \
        --kv none --kv int8 --kv int4
    bench attention-paged 45 attention --shape llama-8b --batch 8 --context 32768 --seconds 5 --peers DynamicCache \
        --kv paged --kv int8+paged --kv int4+paged
    run tests 65 bash $here/gpu_tests.sh "$out/tests"

    part=2
    bench step-1x2k 90 step --shape llama-8b --layers 32 --context 2048 --seconds 6 --peers DynamicCache \
        --kv none --kv int8 --kv none+graphs --kv int8+graphs
    bench step-8x32k 120 step --shape llama-8b --layers 32 --batch 8 --context 32768 --seconds 6 \
        --peers DynamicCache --kv int8 --kv int8+graphs
    check

    part=3
    bench attention-fp8 90 attention --shape llama-8b --batch 8 --context 32768 --seconds 5 \
        --peers DynamicCache,QuantizedCache:fp8,StaticCache+compile --kv int8 --kv fp8 --kv window:1024
    bench attention-bits 90 attention --shape llama-8b --batch 8 --context 32768 --seconds 5 --peers DynamicCache \
        --kv int4 --kv int3 --kv int2 --kv int3+paged
    bench step-8x32k-more 200 step --shape llama-8b --layers 32 --batch 8 --context 32768 --peers DynamicCache \
        --kv none --kv none+graphs --kv int4+graphs --kv int8+paged+graphs
    bench moe 200 moe --shape qwen3-30b-a3b
    bench mla-8x32k 240 mla --shape deepseek-v3 --batch 8 --tokens 32768 --part decode,step
    bench prefill 200 prefill --shape llama-8b --layers 8 --ragged 8192,4096,2048,1024 --peers DynamicCache
    bench host 60 host --peers DynamicCache
    bench offload-1x32k 200 step --shape llama-8b --layers 32 --context 32768 --peers DynamicCache+offload \
        --kv none+offload --kv int8+offload --kv int4+offload --kv int8+offload+device_budget:1GiB
    bench mla-prompts 200 mla --shape deepseek-v3 --part prefill,crossover --kv none --kv int8
    bench memory 100 memory --shape llama-8b --context 32768
    bench reuse 200 reuse --shape llama-8b --layers 8 --context 32768 --peers DynamicCache --steps 3 \
        --kv none --kv none+reuse:16GiB --kv int8 --kv int8+reuse:16GiB
    bench moe-mixtral 150 moe --shape mixtral-8x7b
    run doctor 100 hfkv doctor --device cuda --json "$out/doctor.json"
    run all-tests 400 python -m pytest -o addopts= -v -m gpu tests
    check
}

if [ "$out" = --dry ]; then
    out=$(mktemp -d) dry=yes
    trap 'rm -rf "$out"' EXIT
    all | python $here/gpu_dry.py
else
    mkdir -p "$out"
    # Without dependencies: nothing but hfkv itself is installed.
    (cd / && python -c 'import hfkv.patches') 2>/dev/null ||
        timeout 25 python -m pip install -q --no-deps --no-build-isolation -e . 2>&1 | tee "$out/install.log"
    all
    cat "$out/summary.txt"
fi
