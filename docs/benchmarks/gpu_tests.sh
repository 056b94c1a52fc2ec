#!/usr/bin/env bash
# The GPU tests of the kernels, a process for each file: compiling is most of it, and one core's work.
#   bash docs/benchmarks/gpu_tests.sh OUTPUT_FOLDER      # a log for each file, and the last line of each
out="${1:?usage: gpu_tests.sh OUTPUT_FOLDER}"
mkdir -p "$out"
# The most telling first; those that compile only need no GPU.
printf '%s\n' tests/kernels/test_triton_decode.py tests/kernels/test_append.py tests/kernels/test_triton_prefill.py \
    tests/kernels/test_triton_experts.py tests/kernels/test_triton_experts_{digits,slots,layers}.py \
    tests/kernels/test_*_gpu.py tests/kernels/test_triton_{latent,tiles,graphs,graphs_kept}.py |
    xargs -P 12 -I{} sh -c 'name=$(basename {} .py)
        python -m pytest -o addopts= -p no:cacheprovider -v -m gpu {} >"'"$out"'/$name.log" 2>&1
        echo "$name: $(tail -n 1 "'"$out"'/$name.log")"'
