"""Two versions of the package, side by side on one machine: do they end with the same weights, bit for bit?

``python -m tests.compare --old a435367 --new HEAD`` runs every row of ``contract`` and ``spread`` with the package of
each commit, in processes of their own, and prints a line for each difference. It fails if there is one. ``.`` is the
working tree. Both sides run the tests' files as they are now: those that this takes use the public API alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_soo.integrations.checkpoints import write_manifest
from tests.compare.spread import place
from tests.ranks.cells import RESUME_AT, STEPS

Result = dict[str, torch.Tensor] | str  # weights by name, or the type and words of what was raised
Results = dict[str, Result]
PARTS = ("contract", "equality", "resume", "fixtures")
QUICK = (
    r"^contract/[^=]*/toy/float64$", r"^resume/loop/(mkor|kfac_expand|mkor_h-switching)$", "^fixtures/(single|ZeRO-2)",
    r"^equality/(single|FSDP2 x 2|ZeRO-[23] x 2)/(mkor|kfac_expand)/plain$",
)  # fmt: skip
UNREAD = {"training_args.bin", "zero_to_fp32.py", "zero_to_torch.py"}
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def refuse_uncommitted() -> None:
    """Say that HEAD is not what lies in the package's folder.

    Raises:
        SystemExit: the package has changes beside it.
    """
    if git("status", "--porcelain", "--", "hf_soo").strip():
        raise SystemExit("hf_soo has changes that are not committed: commit them, or compare the working tree by '.'.")


def resolved(version: str) -> str:
    """The commit of a name, in its short form; "." as it is."""
    return version if version == "." else git("rev-parse", "--short", f"{version}^{{commit}}").decode().strip()


def checkout(version: str, folder: Path) -> None:
    """Put the package of a commit, or of the working tree for ".", into a folder, and nothing else."""
    if version == ".":
        shutil.copytree(ROOT / "hf_soo", folder / "hf_soo", ignore=shutil.ignore_patterns("__pycache__"))
        return
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


@dataclass(frozen=True)
class Folder:
    """The packages of both sides, a copy of the tests as tools, and what they write; so no later edit gets mixed in."""

    path: Path
    names: Sequence[str]
    """Regular expressions on the rows."""

    @classmethod
    def of(cls, path: Path, versions: dict[str, str], names: Sequence[str]) -> Folder:
        """Fill it.

        Args:
            path: an empty folder.
            versions: side -> commit.
            names: regular expressions on the rows.
        """
        shutil.copytree(ROOT / "tests", path / "tools" / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        (path / "checkpoints").mkdir()
        for side, version in versions.items():
            checkout(version, path / side)
        return cls(path, names)

    def run(self, sides: Sequence[str], parts: Sequence[str], fixtures: Path | None = None) -> dict[str, Results]:
        """The rows of some parts, by each side at the same time.

        Args:
            sides: folders' names.
            parts: of ``PARTS``.
            fixtures: another place for them.

        Raises:
            SystemExit: a side failed.
        """
        tools = self.path / "tools"
        kept = fixtures or tools / "tests" / "fixtures" / "checkpoints"
        places = ["--checkpoints", str(self.path / "checkpoints"), "--fixtures", str(kept)]
        processes = {}
        for side in sides:
            package, out = self.path / side, self.path / f"{side}.pt"
            command = [sys.executable, "-m", "tests.compare.side", "--package", str(package), "--out", str(out)]
            command += [*places, "--only", *parts, "--", *self.names]
            with (self.path / f"{side}.log").open("w") as log:  # Trainer says a lot
                processes[side] = subprocess.Popen(
                    command, cwd=tools, env=environment(package, tools), stdout=log, stderr=subprocess.STDOUT
                )
        failed = [side for side, process in processes.items() if process.wait() != 0]
        if failed:
            said = [f"{side} failed:\n{(self.path / f'{side}.log').read_text()[-4000:]}" for side in failed]
            raise SystemExit("\n".join(said))
        return {side: torch.load(self.path / f"{side}.pt", weights_only=True) for side in sides}


def differences(old: Results, new: Results) -> dict[str, str]:
    """Row -> how its two results differ, for the older version's rows where they do."""
    found = {row: difference(result, new.get(row)) for row, result in old.items()}
    return {row: text for row, text in found.items() if text}


def difference(old: Result, new: Result | None) -> str:
    """Words for how two results differ, or "": the largest difference of a weight, and the first parameter."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        kinds = [r.partition(":")[0] if isinstance(r, str) else type(r).__name__ for r in (old, new)]
        refused = kinds[0] == kinds[1] and kinds[0] in ("ValueError", "NotImplementedError")  # in whatever words
        return "" if refused else " -> ".join(brief(result) for result in (old, new))
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


def write_fixtures(folder: Folder, fixtures: Path) -> None:
    """Write the old side's checkpoints, and beside each the weights that its run goes on to.

    Args:
        folder: with the old side alone.
        fixtures: where to; what is there already stays.
    """
    for row, weights in folder.run(("old",), ("fixtures",), fixtures)["old"].items():
        assert isinstance(weights, dict), f"{row}: {weights}"
        here = place(fixtures, *row.split("/")[1:])
        save_file({name: weight.clone() for name, weight in weights.items()}, here / "weights.safetensors")
        shutil.rmtree(here / f"checkpoint-{STEPS}")
        drop(here / f"checkpoint-{RESUME_AT}")


def drop(checkpoint: Path) -> None:
    """Take out of a checkpoint what no resume reads: paths of this machine, and scripts of DeepSpeed's.

    Args:
        checkpoint: its folder.
    """
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in UNREAD & manifest["files"].keys():
        del manifest["files"][name]
        (checkpoint / name).unlink()
    if "digest" in manifest:
        write_manifest(checkpoint, manifest["strategy"], manifest["step"], hashed="sha256" in manifest)
    else:  # written before there were hashes, and shall stay so
        (checkpoint / "manifest.json").write_text(json.dumps(manifest, indent=1))


def main() -> None:
    """Compare, print, and exit with 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--old", default="a435367", help="a commit; '.' is the working tree")
    parser.add_argument("--new", default="HEAD", help="a commit; '.' is the working tree")
    parser.add_argument("--json", type=Path, help="write the differences there")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, help="parts of the comparison")
    parser.add_argument("--quick", action="store_true", help="some rows of every kind, in a minute or two")
    parser.add_argument("--write-fixtures", type=Path, metavar="FOLDER", help="write --old's checkpoints, and no more")
    parser.add_argument("names", nargs="*", help="rows in whose names one of these regular expressions is found")
    options = parser.parse_args()
    if options.new == "HEAD":
        refuse_uncommitted()
    old, new = resolved(options.old), resolved(options.new)  # now: a branch may move while this runs
    with tempfile.TemporaryDirectory(prefix="hf_soo_compare_") as name:
        names = [*options.names, *(QUICK if options.quick else [])]
        if options.write_fixtures is not None:
            write_fixtures(Folder.of(Path(name), {"old": old}, names), options.write_fixtures.resolve())
            return
        folder = Folder.of(Path(name), {"old": old, "new": new}, names)
        both = [part for part in options.only if part != "resume"]
        sides = folder.run(("old", "new"), both) if both else {"old": {}, "new": {}}
        for side in ("old", "new") if "resume" in options.only else ():  # the new one reads what the old one wrote
            sides[side] |= folder.run((side,), ("resume",))[side]
    found = differences(sides["old"], sides["new"])
    for row, text in found.items():
        print(f"{row}: {text}")
    refused = sum(isinstance(result, str) for result in sides["old"].values())
    print(f"{len(found)} of {len(sides['old'])} rows differ ({refused} are refused by {old})")
    if options.json is not None:
        from hf_soo import machine  # of the working tree; each side has its own

        report = {
            "old": old, "new": new, "parts": list(options.only), "names": names, "device": machine.device_name(CPU),
            "versions": machine.versions(), "rows": len(sides["old"]), "refused": refused, "differences": found,
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
