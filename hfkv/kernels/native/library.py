"""The native kernels: compiled once by the machine's own C++ compiler, kept, and loaded."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger("hfkv")

# "0" switches the native kernels off; the folder that they are kept in; the compiler, and the instructions it may use.
SWITCH, FOLDER, COMPILER, ARCHITECTURE = "HFKV_NATIVE", "HFKV_CACHE", "CXX", "HFKV_NATIVE_ARCH"
COMPILERS = ("g++", "c++", "clang++")
SECONDS = 300

_HERE = Path(__file__).parent
# A fused product and sum is rounded once: attention may, and codes must be the bits that torch's operations give.
_SOURCES = {"attention.cpp": "fast", "append.cpp": "off", "experts.cpp": "fast"}
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-fno-math-errno", "-Wno-psabi")
_LINKED = ("-shared", "-pthread")
_is_forked = False


def _after_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def num_threads() -> int:
    """The threads that a kernel may take: as many as torch, and one in a process that was forked from another.

    A forked process has none of the threads that its parent had.
    """
    return 1 if _is_forked else torch.get_num_threads()


class NativeError(Exception):
    """Why there are no native kernels.

    Attributes:
        is_odd: whether something went wrong that should not; else there is nothing to compile them with, or for.
    """

    def __init__(self, reason: str, is_odd: bool = False) -> None:
        super().__init__(reason)
        self.is_odd = is_odd


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None; `why_not` says why."""
    found = _asked()
    return found if isinstance(found, ctypes.CDLL) else None


@functools.cache
def loaded() -> ctypes.CDLL:
    """The compiled kernels, for those that have been told that they are there; switched off later they stay."""
    found = library() or _found("", os.environ.get(ARCHITECTURE, "native"))
    assert isinstance(found, ctypes.CDLL), found
    return found


def why_not() -> str:
    """The reason why there are no native kernels; empty where there are."""
    found = _asked()
    return "" if isinstance(found, ctypes.CDLL) else str(found)


def _asked() -> ctypes.CDLL | NativeError:
    return _found(os.environ.get(SWITCH, ""), os.environ.get(ARCHITECTURE, "native"))


@functools.cache
def _found(switch: str, architecture: str) -> ctypes.CDLL | NativeError:
    if switch == "0":
        return NativeError(f"{SWITCH}=0 switches the native kernels off")
    try:
        return _load(_compiled(architecture))
    except (NativeError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        found = error if isinstance(error, NativeError) else NativeError(f"they could not be loaded: {error}", True)
        level = logging.WARNING if found.is_odd else logging.INFO
        logger.log(level, "no native kernels, torch's own operations do the work: %s", found)
        return found


def _compiled(architecture: str) -> Path:
    """The compiled library, from the folder that it is kept in or compiled now."""
    if sys.platform != "linux":
        raise NativeError(f"they are compiled on Linux only, not on {sys.platform}")
    compiler = find_compiler()
    if compiler is None:
        raise NativeError("there is no C++ compiler: install g++ (Debian and Ubuntu: apt install g++)")
    flags = (*_FLAGS, f"-march={architecture}")
    made_of = [platform.machine(), processor(), _version(compiler), *flags, *_LINKED, str(_SOURCES)]
    made_of += [path.read_text() for path in sorted(_HERE.glob("*.cpp")) + sorted(_HERE.glob("*.h"))]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:20]
    folder = private_folder()
    kept = folder / f"{digest}.so"
    if not kept.exists():
        logger.warning("compiling hfkv's native kernels, once on this machine: some seconds")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = _compile(compiler, flags, Path(work))
            os.replace(made, kept)  # whoever else compiles has made the same
    return kept


def _compile(compiler: str, flags: tuple[str, ...], work: Path) -> Path:
    running = [
        _start([compiler, *flags, f"-ffp-contract={contract}", "-c", str(_HERE / source), "-o", f"{source}.o"], work)
        for source, contract in _SOURCES.items()
    ]
    try:
        for process in running:
            _finish(process)
    finally:
        for process in running:  # the folder that they write to goes
            process.kill()
            process.wait()
    _finish(_start([compiler, *_LINKED, *(f"{source}.o" for source in _SOURCES), "-o", "native.so"], work))
    return work / "native.so"


def _start(command: list[str], work: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def _finish(process: subprocess.Popen[str]) -> None:
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise NativeError(f"the compiler took more than {SECONDS} s", True) from error
    if process.returncode:
        raise NativeError(f"the C++ compiler failed: {said.strip()[:500]}", True)


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    pointer = ctypes.c_void_p
    loaded.hfkv_append.argtypes = [pointer] * 8
    loaded.hfkv_append.restype = ctypes.c_int
    loaded.hfkv_attend.argtypes = [*[pointer] * 13, ctypes.c_float, ctypes.c_float, pointer, pointer]
    loaded.hfkv_attend.restype = ctypes.c_int
    loaded.hfkv_expert_linear.argtypes, loaded.hfkv_expert_linear.restype = [pointer] * 8, ctypes.c_int
    loaded.hfkv_threads.argtypes, loaded.hfkv_threads.restype = [pointer], None
    loaded.hfkv_threads(_region())
    loaded.hfkv_expert_numbers.argtypes, loaded.hfkv_expert_numbers.restype = [pointer] * 7, ctypes.c_int
    return loaded


def _region() -> int | None:
    """The address of the function by which torch's OpenMP begins a region; None where it has none that is known."""
    library = next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"), None)
    try:
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def find_compiler() -> str | None:
    """The C++ compiler: the one that ``CXX`` names, or the first of `COMPILERS` that is here."""
    named = os.environ.get(COMPILER)
    return next((path for name in (named, *COMPILERS) if name and (path := shutil.which(name))), None)


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False, timeout=60).stdout


@functools.cache
def processor() -> str:
    """What tells processors apart: homes are shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if re.match(r"(flags|Features|CPU part|model name)\s", line)}))


def private_folder() -> Path:
    """The folder that compiled kernels are kept in, which nobody else may write to: what lies there is run."""
    given = os.environ.get(FOLDER)
    try:
        base = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hfkv"
        folder = base / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError) as error:
        raise NativeError(f"no folder to keep them in: {error}; name one by {FOLDER}", True) from error
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NativeError(
            f"{folder} belongs to somebody else or others may write to it; name another by {FOLDER}", True
        )
    return folder
