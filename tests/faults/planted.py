"""The faults: what is changed where, and the test files that find it; at least one in every room."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """One change of one file that makes the library wrong.

    Attributes:
        name: what is wrong then.
        file: the file, from the top of the repository.
        old: code that the file has exactly once.
        new: what takes its place.
        tests: the test files that should find it, from ``tests/``.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    Fault(
        "a window is one token short",
        "hfkv/policy/schedule.py",
        "max(0, *(min(seen, last) - size for first",
        "max(0, *(min(seen, last) - size + 1 for first",
        ("unit/test_span.py",),
    ),
    Fault(
        "an int8 scale is rounded after use",
        "hfkv/codecs/int8.py",
        "q = (x.float() / scale.float())",
        "q = (x.float() / (row_absmax(x) / 127).clamp_min(1e-30))",
        ("unit/test_codecs.py",),
    ),
    Fault(
        "an int8 code wraps",
        "hfkv/codecs/int8.py",
        ".clamp_(-127, 127)",
        "",
        ("unit/test_codecs.py",),
    ),
    Fault(
        "an fp8 scale brings rows beyond the largest code",
        "hfkv/codecs/fp8.py",
        "E4M3_MAX = 448.0",
        "E4M3_MAX = 480.0",
        ("unit/test_codecs.py",),
    ),
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
        "if (has_few && !few[r].empty()) multiply_few",
        "if (has_few && few[r].empty()) multiply_few",
        ("kernels/test_native_digits.py",),
    ),
    Fault(
        "a native value of zeros hides small weights",
        "hfkv/kernels/native/task.h",
        "scale[i] = low[i] = 0;",
        "break;",
        ("kernels/test_native_digits.py",),
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
        "views that somebody keeps are given to the next layer",
        "hfkv/cache/view.py",
        "    if not is_free or held.step is not step:",
        "    if held.step is not step:",
        ("unit/test_step_views.py",),
    ),
    Fault(
        "queries that see nothing get what all tokens come to",
        "hfkv/attention/rule.py",
        "rule.visible, rule.is_blind = rule.visible | is_blind, is_blind",
        "rule.visible = rule.visible | is_blind",
        ("unit/test_step_attention.py",),
    ),
    Fault(
        "a fingerprint ignores adapters",
        "hfkv/models/fingerprint.py",
        'adapters=", ".join(adapters) or "none"',
        'adapters="none"',
        ("unit/test_files_models.py",),
    ),
    Fault(
        "padding stays behind a crop into it",
        "hfkv/models/padding.py",
        "tuple(min(pad, left) for pad in self.known)",
        "tuple(self.known)",
        ("unit/test_span.py", "model/test_window_padding.py"),
    ),
    Fault(
        "a layer in another state follows the step of its group",
        "hfkv/cache/layers/following.py",
        "if step is None or step.state != state:",
        "if step is None:",
        ("unit/test_step.py",),
    ),
    Fault(
        "planes are lent that a copy still reads",
        "hfkv/stores/pages.py",
        "return self.stores > 0",
        "return False",
        ("kernels/test_triton_graphs_kept.py",),
    ),
    Fault(
        "a shared storage counts twice",
        "hfkv/measure/allocated.py",
        "{storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}",
        "dict(enumerate(tensor.untyped_storage() for tensor in tensors))",
        ("unit/test_allocated.py", "unit/test_memory.py"),
    ),
    Fault(
        "a shared page is written to",
        "hfkv/stores/paged.py",
        "                self._own(-1)\n",
        "                pass\n",
        ("unit/test_stores.py",),
    ),
    Fault(
        "a layer is given less of the budget than is left",
        "hfkv/stores/offload/budget.py",
        "        left -= share\n",
        "        left -= part\n",
        ("unit/test_budget.py",),
    ),
    Fault(
        "a kernel shows padding",
        "hfkv/kernels/visibility.py",
        "is_visible = (positions >= starts) & (positions <= t)",
        "is_visible = positions <= t",
        ("kernels/test_cpu_attention.py",),
    ),
    Fault(
        "weights have a digit less",
        "hfkv/kernels/cpu/int8_matmul.py",
        "QUERY_DIGITS, WEIGHT_DIGITS = 3, 4",
        "QUERY_DIGITS, WEIGHT_DIGITS = 3, 3",
        ("kernels/test_cpu_limits.py",),
    ),
    Fault(
        "a crop leaves a token",
        "hfkv/cache/layers/layer.py",
        "self.store.truncate(self.store.length - (seen - left))",
        "self.store.truncate(self.store.length - (seen - left) + 1)",
        ("unit/test_cache.py",),
    ),
    Fault(
        "an item of a view is set and lost",
        "hfkv/cache/read_only.py",
        '_refuse("__setitem__")',
        "self.plain()[index] = value",
        ("unit/test_view.py",),
    ),
    Fault(
        "values of heads that slide are those of others",
        "hfkv/cache/layers/head_groups.py",
        "part.update(key_states[:, index], value_states[:, index])",
        "part.update(key_states[:, index], value_states[:, index[::-1]])",
        ("model/test_window.py", "model/test_window_heads.py"),
    ),
    Fault(
        "heads come back in another order",
        "hfkv/attention/function.py",
        "torch.tensor(order, device=query.device).argsort()",
        "torch.tensor(order, device=query.device)",
        ("model/test_window.py", "model/test_window_heads.py"),
    ),
    Fault(
        "sinks are a position too far",
        "hfkv/attention/window_blocks.py",
        "gap = (bounds - self.starts - self.sinks).clamp_min(0)",
        "gap = (bounds - self.starts - self.sinks + 1).clamp_min(0)",
        ("model/test_window.py",),
    ),
    Fault(
        "a mask that hides with -1e4 is a bias",
        "hfkv/attention/masks.py",
        "_HIDDEN = -1e4",
        "_HIDDEN = -1e5",
        ("model/test_window_masks.py",),
    ),
    Fault(
        "a hook on a projection is not called",
        "hfkv/attention/latent/projection.py",
        "bool(module._forward_hooks or module._forward_pre_hooks)",
        "bool(module._forward_pre_hooks)",
        ("model/test_mla_modules.py",),
    ),
    Fault(
        "a header is not checked",
        "hfkv/sharing/files/header.py",
        'or given.get("format") != FORMAT:',
        "or False:",
        ("unit/test_files.py", "unit/test_files_damaged.py"),
    ),
    Fault(
        "a page is found whatever is before it",
        "hfkv/sharing/prefix_pool.py",
        "hashlib.blake2b(key + whole",
        "hashlib.blake2b(root + whole",
        ("unit/test_prefix_pool.py", "model/test_reuse.py"),
    ),
    Fault(
        "an expert is evicted while in use",
        "hfkv/experts/offload/slot_table.py",
        "return frozenset(self._place)",
        "return frozenset({expert})",
        ("unit/test_expert_trace.py",),
    ),
    Fault(
        "one length at which packing is faster is enough",
        "hfkv/kernels/experts/crossover.py",
        "packs = all(ours",
        "packs = any(ours",
        ("unit/test_crossover.py",),
    ),
    Fault(
        "native products of int4 lose the centre",
        "hfkv/kernels/native/experts.cpp",
        "numbers.high * its[0] + its[1]}",
        "numbers.high * its[0]}",
        ("kernels/test_native_experts.py",),
    ),
    Fault(
        "a checkpoint may lack a plane",
        "hfkv/experts/checkpoint.py",
        "                if missing:\n",
        "                if len(missing) > 1:\n",
        ("model/test_moe_checkpoints.py",),
    ),
    Fault(
        "factors written to unseen are old ones",
        "hfkv/experts/adapters.py",
        " or not torch.equal(copy.sample, sample):",
        ":",
        ("integration/test_expert_lora.py",),
    ),
    Fault(
        "a load-balancing loss counts padding",
        "hfkv/sparse_moe/losses.py",
        "kept.repeat_interleave(top_k))",
        "torch.ones_like(chosen.flatten(), dtype=kept.dtype))",
        ("unit/test_moe_losses.py",),
    ),
    Fault(
        "a plan forgets the staging buffers",
        "hfkv/planning/footprint.py",
        "min(offloaded.peak, kept + STAGING)",
        "min(offloaded.peak, kept)",
        ("unit/test_plan.py",),
    ),
    Fault(
        "a hook is not undone",
        "patches/generate.py",
        "undo.override(_get_candidate_generator, model",
        "Undo().override(_get_candidate_generator, model",
        ("model/test_patch.py",),
    ),
    Fault(
        "tokens that were not written down are made up",
        "patches/recording.py",
        "if before != record.length:",
        "if before < record.length:",
        ("model/test_recording.py",),
    ),
    Fault(
        "a rotation is that of before a cast",
        "patches/handle.py",
        "if self._rotary is None or self._frequencies != now:",
        "if self._rotary is None:",
        ("model/test_window_sinks.py",),
    ),
    Fault(
        "kl is the wrong way round",
        "hfkv/eval/divergence.py",
        "log_p, log_q = full.float().log_softmax(-1), other.float().log_softmax(-1)",
        "log_q, log_p = full.float().log_softmax(-1), other.float().log_softmax(-1)",
        ("unit/test_eval.py",),
    ),
    Fault(
        "a floor counts reading and bus one after the other",
        "hfkv/bench/runner.py",
        "return 1e3 * max(seconds)",
        "return 1e3 * sum(seconds)",
        ("unit/test_bench.py",),
    ),
    Fault(
        "what was left out is called wrong",
        "hfkv/bench/results.py",
        "if row.status == WRONG]",
        "if row.status != OK]",
        ("unit/test_bench_results.py",),
    ),
    Fault(
        "an option is dropped",
        "hfkv/cli/generate.py",
        "stream(loaded, tokenizer, text, kv, max_new_tokens, console, moe)",
        "stream(loaded, tokenizer, text, kv, max_new_tokens, console)",
        ("integration/test_cli.py",),
    ),
)
