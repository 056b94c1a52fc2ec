"""The machine and the versions, without which a measured number means nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, accelerator and its driver, versions, and the commit where hfkv runs from a clone.

    Args:
        device: the device that holds the caches.
    """
    described: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": str(device),
        "accelerator": None,
        "driver": None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hfkv": version("hfkv"),
        "commit": _commit(Path(__file__).parents[2]),
    }
    if device.type != "cpu":
        described["accelerator"] = torch.get_device_module(device).get_device_name(device)
        described["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return described


def load() -> float | None:
    """How many processes wanted a core in the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit(folder: Path) -> str | None:
    """The commit of a clone, with a plus where files differ from it; None for an installed package."""
    if not (folder / ".git").exists():
        return None
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(folder), "status", "--porcelain")
    return f"{commit}+" if commit and changed else commit


def _output(*command: str) -> str | None:
    """The first line a command prints, or None where it prints nothing or is not there."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return lines[0] if lines else None
