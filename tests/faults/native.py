"""The faults of the native kernels."""

from __future__ import annotations

from tests.faults.fault import Fault

NATIVE = (
    Fault(
        "a native query sees the token after its own",
        "hfkv/kernels/native/sight.h",
        "j >= pads && j <= t &&",
        "j >= pads && j <= t + 1 &&",
        ("kernels/test_cpu_attention.py",),
    ),
    Fault(
        "a native query's lowest digits are left out",
        "hfkv/kernels/native/products.h",
        "if (has_few && !its.empty()) multiply_few",
        "if (has_few && its.empty()) multiply_few",
        ("kernels/test_native_digits.py",),
    ),
    Fault(
        "a native value of zeros hides small weights",
        "hfkv/kernels/native/stored.h",
        "scale[i] = 0;",
        "break;",
        ("kernels/test_native_digits.py",),
    ),
    Fault(
        "native scores of latents leave the rotary keys out",
        "hfkv/kernels/native/task.h",
        "parts = call.is_latent() ? 2 : 1,",
        "parts = 1,",
        ("kernels/test_cpu_latent.py",),
    ),
    Fault(
        "native rotary keys are read by the codec of the latents",
        "hfkv/kernels/native/task.h",
        "keys[1] = keys_of(call.value_codec,",
        "keys[1] = keys_of(call.key_codec,",
        ("kernels/test_pairs.py",),
    ),
    Fault(
        "the mean of native keys is turned the wrong way",
        "hfkv/kernels/native/key_mean.h",
        "c * cosine + s * sine, s * cosine - c * sine",
        "c * cosine - s * sine, s * cosine + c * sine",
        ("kernels/test_key_mean.py",),
    ),
    Fault(
        "the mean of native keys in slots is turned as if they stood behind them",
        "hfkv/kernels/native/call.h",
        "return i < num_slots() ? i : i + shift(row);",
        "return i + shift(row);",
        ("kernels/test_key_mean.py",),
    ),
    Fault(
        "what no rotation turns of the mean of native keys is left out",
        "hfkv/kernels/native/key_mean.h",
        "rest[tile * rows + r] = float(sum * scale);",
        "rest[tile * rows + r] = 0;",
        ("kernels/test_key_mean.py",),
    ),
    Fault(
        "a native value that nobody sees is multiplied by nothing",
        "hfkv/kernels/native/halves.h",
        "bool has_first = is_seen[t],",
        "bool has_first = true,",
        ("kernels/test_native_digits.py", "kernels/test_cpu_latent.py"),
    ),
    Fault(
        "a native code is cut off where it should be rounded",
        "hfkv/kernels/native/append.cpp",
        "(x + 12582912.0f) - 12582912.0f",
        "x",
        ("kernels/test_append.py",),
    ),
    Fault(
        "scales stay where they were when a window's sinks move",
        "hfkv/kernels/native/append.cpp",
        "if (!part.scales) return;",
        "return;",
        ("kernels/test_native_steps.py",),
    ),
    Fault(
        "native products of int4 lose the centre",
        "hfkv/kernels/native/experts.cpp",
        "numbers.high * its[0] + its[1]}",
        "numbers.high * its[0]}",
        ("kernels/test_native_experts.py",),
    ),
)
