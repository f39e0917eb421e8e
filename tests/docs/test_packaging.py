"""What is installed, and what importing it costs."""

from __future__ import annotations

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


def test_wheel_holds_the_package_alone(wheel: zipfile.ZipFile) -> None:
    roots = {name.split("/")[0] for name in wheel.namelist()}
    assert roots == {"hf_soo", f"hf_soo-{hf_soo.__version__}.dist-info"}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_soo").rglob("*.py")}
    assert sources | {"hf_soo/py.typed"} == {name for name in wheel.namelist() if name.startswith("hf_soo/")}


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    folder = f"hf_soo-{hf_soo.__version__}.dist-info"
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert f"Name: hf-soo\nVersion: {hf_soo.__version__}\n" in metadata
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.10", "Requires-Dist: torch<3,>=2.9"):
        assert line in metadata.splitlines()
    for extra in ("deepspeed", "eval", "vision", "lora", "report", "tracking", "test", "dev"):
        assert f"Provides-Extra: {extra}" in metadata.splitlines()
    assert "hf-soo = hf_soo.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    assert b"Apache License" in wheel.read(f"{folder}/licenses/LICENSE")
