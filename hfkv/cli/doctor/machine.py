"""What is installed here, and what is not: the first table of ``hfkv doctor``."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

# The releases the tests run on; the lower one is what the package requires.
TRANSFORMERS = ("5.17", "5.23")
# package -> (what it is for, how it comes)
OPTIONAL = {
    "peft": ("LoRA adapters", 'pip install "hfkv[lora]"'),
    "bitsandbytes": ("8-bit and 4-bit weights", 'pip install "hfkv[bnb]"'),
    "matplotlib": ("--plot", 'pip install "hfkv[plot]"'),
    "triton": ("kernels on NVIDIA GPUs", "pip install triton"),
}


@dataclass(frozen=True)
class Item:
    """A thing that is here, or could be.

    Attributes:
        name: what it is called.
        found: its version, or what else there is to say; None where it is missing.
        note: what it is for, or the remedy; may be empty.
        is_odd: whether the reader should look twice.
    """

    name: str
    found: str | None
    note: str = ""
    is_odd: bool = False


def describe_installation() -> list[Item]:
    """Packages, the compiler, the processor and the GPUs. Nothing optional is missed."""
    import torch

    from hfkv.measure.machine import describe_machine

    machine = describe_machine(torch.device("cpu"))
    optional = [_optional(name, *about) for name, about in OPTIONAL.items()]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    commit = machine["commit"] or ""
    changed = " and changes" if commit.endswith("+") else ""
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    return [
        Item("Python", machine["python"], machine["platform"]),
        Item("hfkv", machine["hfkv"], f"commit {commit[:12]}{changed}" if commit else ""),
        _torch(machine["instructions"]),
        _transformers(machine["transformers"]),
        Item("accelerate", _version("accelerate")),
        *optional,
        _compiler(),
        _native(),
        *_experts(),
        Item("CPU", machine["processor"], f"{machine['cores']} cores, {threads}, {memory}"),
        *_gpus(),
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _optional(name: str, purpose: str, remedy: str) -> Item:
    found = _version(name)
    return Item(name, found, f"for {purpose}" if found else f"for {purpose}: {remedy}")


def _torch(instructions: str) -> Item:
    import torch

    if torch.version.hip is not None:
        build = f"ROCm {torch.version.hip}"
    else:
        build = "CPU build" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    return Item("torch", str(torch.__version__), f"{build}, {instructions}")


def _transformers(found: str) -> Item:
    from packaging.version import Version

    lowest, highest = map(Version, TRANSFORMERS)
    is_supported = lowest <= Version(found) and Version(found).release[:2] <= highest.release
    note = f"hfkv is tested on {' to '.join(TRANSFORMERS)}"
    return Item(
        "transformers", found, note if is_supported else f"{note}, and this is not among them", not is_supported
    )


def _compiler() -> Item:
    from hfkv.kernels.native.library import find_compiler

    found = find_compiler()
    purpose = "for hfkv's native kernels, and for torch.compile on a CPU"
    return Item("C++ compiler", found, purpose if found else f"{purpose}: install g++ or clang++, or set CXX")


def _native() -> Item:
    from hfkv.kernels.native.library import why_not

    reason = why_not()
    if reason:
        return Item("native kernels", None, f"torch's own operations do their work on a CPU: {reason}")
    return Item("native kernels", "compiled", "in C++, for this processor: attention of few queries, encoding, experts")


def _experts() -> list[Item]:
    """The products of experts' matrices on this CPU, measured now where that was not done yet."""
    import torch

    from hfkv.kernels.experts.crossover import SWITCH, crossover

    items = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found = crossover(dtype)
        how = "measured" if found.is_measured else f"by table, {SWITCH}=0"
        if found.gains:
            how += f" ({min(found.gains):.2f} to {max(found.gains):.2f} x plain ones)"
        items.append(Item(f"experts, {name}", "packed" if found.packs else "plain", f"{how}: {found}"))
    return items


def _gpus() -> list[Item]:
    import torch

    if not torch.cuda.is_available():
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is not None:
            return [Item("GPU", str(accelerator), "not an NVIDIA GPU: hfkv's kernels for GPUs do not run on it")]
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            return [Item("GPU", None, "nvidia-smi is here, but this torch is built for CPUs: see pytorch.org", True)]
        return [Item("GPU", None, "none that torch sees")]
    items = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        capability = f"compute capability {properties.major}.{properties.minor}"
        items.append(Item(f"GPU {index}", properties.name, f"{memory}, {capability}"))
    return items
