#!/usr/bin/env bash
# Everything there is to run on a GPU, from a clone with torch, triton and transformers installed:
#   bash docs/benchmarks/gpu.sh OUTPUT_FOLDER
# Tests first, then the demo and the benchmarks; each writes its log or JSON and none stops the others.
set -uo pipefail
cd "$(dirname "$0")/../.."
out="${1:?usage: gpu.sh OUTPUT_FOLDER}"
mkdir -p "$out"
pip install -q --no-deps --no-build-isolation -e .

note() { printf '%s: %s (%ss)\n' "$1" "$2" "$SECONDS" | tee -a "$out/summary.txt"; }
run() { # name, seconds, command ...
    local name="$1" limit="$2"
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    note "$name" "exit $?"
}
bench() { # name, seconds, arguments ...
    local name="$1" limit="$2"
    shift 2
    run "$name" "$limit" hfkv bench "$@" --device cuda --json "$out/$name.json"
}

run doctor 300 hfkv doctor --device cuda --json "$out/doctor.json"
run tests 600 python -m pytest -o addopts= -q -m gpu tests
bench host 120 host --peers DynamicCache
bench attention 400 attention --shape llama-8b --batch 8 --context 32768
bench step-8x32k 500 step --shape llama-8b --layers 32 --batch 8 --context 32768 --peers DynamicCache \
    --kv none --kv int8 --kv int8+graphs --kv int8+paged+graphs
bench step-1x2k 300 step --shape llama-8b --layers 32 --context 2048 --peers DynamicCache \
    --kv none --kv int8 --kv none+graphs --kv int8+graphs
bench offload-1x32k 400 step --shape llama-8b --layers 32 --context 32768 --peers DynamicCache+offload \
    --kv none+offload --kv int8+offload --kv int4+offload --kv int8+offload+device_budget:1GiB
bench memory 200 memory --shape llama-8b --context 32768
bench prefill 300 prefill --shape llama-8b --layers 8 --ragged 8192,4096,2048,1024 --peers DynamicCache
bench reuse 300 reuse --shape llama-8b --layers 8 --context 32768 --peers DynamicCache --steps 3 \
    --kv none --kv none+reuse:16GiB --kv int8 --kv int8+reuse:16GiB
bench moe 400 moe --shape qwen3-30b-a3b
bench moe-mixtral 300 moe --shape mixtral-8x7b
bench mla-8x32k 500 mla --shape deepseek-v3 --batch 8 --tokens 32768 --part decode,step
bench mla-prompts 400 mla --shape deepseek-v3 --part prefill,crossover --kv none --kv int8
run check 60 hfkv bench --check docs/benchmarks/targets-gpu.toml --from "$out/attention.json" \
    --from "$out/step-8x32k.json" --from "$out/step-1x2k.json" --from "$out/offload-1x32k.json" \
    --from "$out/moe.json" --from "$out/mla-8x32k.json" --from "$out/mla-prompts.json"
cat "$out/summary.txt"
