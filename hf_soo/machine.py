"""What a run JSON says about the machine and the code: device, versions, commit, digest, peak memory."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import resource
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

import hf_soo

_NUMERICAL = ("engine", "optimizers", "preconditioners")  # what decides the numbers of a run
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy")


def device_name(device: torch.device) -> str:
    """The CUDA name of a GPU, or the model of the CPU with the threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{_cpu_model()}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):  # /proc is Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The version of Python, of this package and of each of `PACKAGES` that is installed."""
    found = {"python": platform.python_version(), "hf-soo": hf_soo.__version__}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str | None:
    """The git commit this package is run from ("-dirty" when tracked files differ); None outside a checkout of it."""
    root = Path(__file__).resolve().parents[1]
    # An installed package may lie inside someone else's repository: only a checkout of this project counts.
    if _git(root, "rev-parse", "--show-toplevel") != str(root):
        return None
    head = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if head and changed else head


@cache
def code() -> str:
    """A digest of the numerical packages, file names and contents: 12 hex digits, equal where numbers can be."""
    root, digest = Path(hf_soo.__file__).parent, hashlib.sha256()
    files = {path.relative_to(root).as_posix(): path for part in _NUMERICAL for path in (root / part).rglob("*.py")}
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak, so that the second run of a process does not report the first one's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # Linux only; elsewhere the peak stays that of the process
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory: allocated by torch on a GPU, resident for the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # follows reset_peak_memory, ru_maxrss does not
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
