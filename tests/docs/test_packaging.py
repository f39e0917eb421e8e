"""What is installed, and what importing it costs."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_soo

ROOT = Path(__file__).resolve().parents[2]


ALONE = """
import sys
import torch
before = set(sys.modules)
import hf_soo
slow = {"torch.distributed.tensor", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy", "scipy"}
print("slow", sorted(slow & (set(sys.modules) - before)))
from hf_soo.cli import main

heavy = {"transformers", "accelerate", "datasets", "deepspeed", "matplotlib", "pandas"}
print("imported", sorted(heavy & set(sys.modules)))
sys.modules |= dict.fromkeys(heavy)  # from here on an import of theirs fails
main(["list"])
model = torch.nn.Linear(3, 2)
optimizer = hf_soo.build_optimizer("mkor", model, lr=1e-2)
model(torch.ones(4, 3)).sum().backward()
optimizer.step()
print("stepped", optimizer.steps)
"""


def test_import_list_and_step_need_torch_alone() -> None:
    answer = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, check=True)
    slow, heavy, *listed, last = answer.stdout.splitlines()
    assert (slow, heavy, last) == ("slow []", "imported []", "stepped 1")
    assert len(listed) >= len(hf_soo.available())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    (path,) = builder.build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    return zipfile.ZipFile(path)


def test_wheel_holds_the_package_and_the_recipes_alone(wheel: zipfile.ZipFile) -> None:
    roots = {name.split("/")[0] for name in wheel.namelist()}
    assert roots == {"hf_soo", f"hf_soo-{hf_soo.__version__}.dist-info"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_soo").rglob("*.py")}
    recipes = {
        f"hf_soo/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*") if path.is_file()
    }
    held = {name for name in wheel.namelist() if name.startswith("hf_soo/")}
    assert sources | recipes | {"hf_soo/py.typed"} == held


def test_the_image_copies_what_the_wheel_is_built_from() -> None:
    """Docker is not run here."""
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(" ".join(copied).split()) == ["LICENSE", "README.md", "configs", "hf_soo", "pyproject.toml"]


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    folder = f"hf_soo-{hf_soo.__version__}.dist-info"
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert f"Name: hf-soo\nVersion: {hf_soo.__version__}\n" in metadata
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.10", "Requires-Dist: torch<3,>=2.9"):
        assert line in metadata.splitlines()
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", metadata, re.MULTILINE))
    assert extras > {"all", "deepspeed", "test", "docs", "dev"}
    wanted = {extra: set[str]() for extra in extras}
    for requirement, extra in re.findall(r"^Requires-Dist: (.+) extra == '(\w+)'$", metadata, re.MULTILINE):
        wanted[extra].add(requirement)
    users = extras - {"all", "deepspeed", "test", "docs", "dev"}  # DeepSpeed has no wheel
    assert wanted["all"] == set[str]().union(*(wanted[extra] for extra in users))
    assert "tensorboard" in str(wanted["tracking"]) and "tensorboard" not in str(wanted["report"])
    assert "Author: The hf_soo maintainers" in metadata and "Project-URL: Paper of MKOR, https://" in metadata
    assert "hf-soo = hf_soo.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    assert f"version: {hf_soo.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{hf_soo.__version__}] - 2" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert b"Apache License" in wheel.read(f"{folder}/licenses/LICENSE")
