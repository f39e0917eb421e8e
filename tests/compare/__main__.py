"""Two versions of the package, side by side on one machine: do they end with the same weights, bit for bit?

``python -m tests.compare --old a435367 --new HEAD`` runs every row of ``contract`` and ``spread`` with the package of
each commit, in processes of their own, and prints a line for each difference. It fails if there is one. ``.`` is the
working tree. Both sides run the files of this folder as they are now, which use the public API alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

Result = dict[str, torch.Tensor] | str  # weights by name, or the type and words of what was raised
PARTS = ("contract", "loop")
ROOT = Path(__file__).resolve().parents[2]


def checkout(version: str, folder: Path) -> None:
    """Put the package of a commit, or of the working tree for ".", into a folder, and nothing else.

    Args:
        version: what git knows, or ".".
        folder: where to.

    Raises:
        SystemExit: HEAD is asked for, and the package has changes beside it.
    """
    if version == ".":
        shutil.copytree(ROOT / "hf_soo", folder / "hf_soo", ignore=shutil.ignore_patterns("__pycache__"))
        return
    if version == "HEAD" and git("status", "--porcelain", "--", "hf_soo").strip():
        raise SystemExit("hf_soo has changes that are not committed: commit them, or compare the working tree by '.'.")
    folder.mkdir()
    archive = subprocess.run(["git", "archive", version, "hf_soo"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)


def git(*words: str) -> bytes:
    """What git prints."""
    return subprocess.run(["git", *words], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout


def environment(package: Path, tools: Path) -> dict[str, str]:
    """One thread, no network, and of all folders on the path only these two."""
    fixed = {
        "PYTHONPATH": f"{package}{os.pathsep}{tools}", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
        "TORCH_EXTENSIONS_DIR": str(package / "extensions"), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    return os.environ | fixed


def start_side(package: Path, tools: Path, words: list[str]) -> subprocess.Popen[bytes]:
    """The rows run with the package in a folder, and the results come beside it.

    Args:
        package: the folder in which hf_soo lies.
        tools: the folder in which this one's copy lies.
        words: more of the command line.
    """
    out = package.with_suffix(".pt")
    command = [sys.executable, "-m", "tests.compare.side", "--package", str(package), "--out", str(out), *words]
    return subprocess.Popen(command, cwd=tools, env=environment(package, tools))


def differences(old: dict[str, Result], new: dict[str, Result]) -> dict[str, str]:
    """Row -> how its two results differ, for the rows where they do."""
    found = {row: difference(old.get(row), new.get(row)) for row in old | new}
    return {row: text for row, text in found.items() if text}


def difference(old: Result | None, new: Result | None) -> str:
    """Words for how two results differ, or "": the largest difference of a weight, and the first parameter."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        kinds = [r.partition(":")[0] if isinstance(r, str) else type(r).__name__ for r in (old, new)]
        return "" if kinds[0] == kinds[1] else " -> ".join(brief(result) for result in (old, new))
    if old.keys() != new.keys():
        return f"parameters {sorted(old.keys() ^ new.keys())} are on one side alone"
    if any(old[name].dtype != new[name].dtype or old[name].shape != new[name].shape for name in old):
        return "other dtypes or shapes"
    first = next((name for name in old if not same(old[name], new[name])), None)
    if first is None:
        return ""
    largest = max(float((old[name].double() - new[name].double()).abs().max()) for name in old if old[name].numel())
    return f"|dW| = {largest:.1e}, first in {first}"


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, where NaN is equal to NaN."""
    return bool(torch.equal(a.view(torch.uint8), b.view(torch.uint8))) if a.dim() else torch.equal(a, b)


def brief(result: Result | None) -> str:
    """A result in words."""
    return "no such row" if result is None else result if isinstance(result, str) else "weights"


def main() -> None:
    """Compare, print, and exit with 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--old", default="a435367", help="a commit; '.' is the working tree")
    parser.add_argument("--new", default="HEAD", help="a commit; '.' is the working tree")
    parser.add_argument("--json", type=Path, help="write the differences there")
    parser.add_argument("--only", nargs="+", default=[], choices=PARTS, help="parts of the comparison")
    parser.add_argument("names", nargs="*", help="rows whose names have one of these in them")
    options = parser.parse_args()
    words = [*(["--only", *options.only] if options.only else []), "--", *options.names]
    with tempfile.TemporaryDirectory(prefix="hf_soo_compare_") as name:
        folder = Path(name)
        shutil.copytree(Path(__file__).parent, folder / "tools" / "tests" / "compare")
        (folder / "tools" / "tests" / "__init__.py").touch()
        for side, version in (("old", options.old), ("new", options.new)):
            checkout(version, folder / side)
        processes = {side: start_side(folder / side, folder / "tools", words) for side in ("old", "new")}
        failed = [side for side, process in processes.items() if process.wait() != 0]
        if failed:
            raise SystemExit(f"failed: {failed}")
        sides = [torch.load(folder / f"{side}.pt", weights_only=True) for side in processes]
    found = differences(*sides)
    report: dict[str, Any] = {"old": options.old, "new": options.new, "rows": len(sides[0]), "differences": found}
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    for row, text in found.items():
        print(f"{row}: {text}")
    print(f"{len(found)} of {len(sides[0])} rows differ")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
