"""The wheel alone, in an empty folder: README's smoke job and the commands of the quickstart's "Without a clone"."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import hf_soo
from tests.docs.test_packaging import ROOT

QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
SMALL = shlex.split(
    "--max_steps 3 --eval_steps 3 --logging_steps 1 --hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 "
    "--vocab_size 400 --max_eval_samples 8 --per_device_train_batch_size 4 --seq_length 32"
)
ACCELERATE = "#!{python}\nimport sys\nfrom accelerate.commands.accelerate_cli import main\nsys.exit(main())\n"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel of this folder, and that of the source distribution alone."""
    sdist, wheel = pytest.importorskip("hatchling.builders.sdist"), pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("built")
    (source,) = sdist.SdistBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / Path(source).name.removesuffix(".tar.gz")
    here, there = (
        Path(next(wheel.WheelBuilder(str(root)).build(directory=str(folder / name), versions=["standard"])))
        for root, name in ((ROOT, "of_the_folder"), (unpacked, "of_the_sdist"))
    )
    return here, there


def contents(wheel: Path) -> Mapping[str, int]:
    return {info.filename: info.CRC for info in zipfile.ZipFile(wheel).infolist()}


def test_the_source_distribution_makes_the_same_wheel(wheels: tuple[Path, Path]) -> None:
    here, there = map(contents, wheels)
    assert here == there and f"hf_soo-{hf_soo.__version__}.dist-info/METADATA" in here


@pytest.fixture(scope="module")
def installed(wheels: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The wheel in an environment of its own, which sees the other packages of this one; the variables to use it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python, (site,) = folder / "bin" / "python", folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    install = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([sys.executable, "-m", "pip", *install, str(wheels[1])], check=True)
    (folder / "bin" / "accelerate").write_text(ACCELERATE.format(python=python))
    (folder / "bin" / "accelerate").chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.timeout(300)
def test_the_quickstart_runs_in_an_empty_folder(installed: dict[str, str], tmp_path: Path) -> None:
    section = QUICKSTART.partition("## Without a clone")[2].partition("```bash\n")[2].partition("```")[0]
    said = {}
    for line in section.splitlines():
        words = shlex.split(line) + (SMALL if "hf_soo.pretrain" in line else [])
        done = subprocess.run(words, cwd=tmp_path, env=installed, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, f"{line}\n{done.stderr[-4000:]}"
        said[re.sub(r"\S+ launch -m hf_soo.|hf-soo ", "", line).split()[0]] = done.stdout
    runs = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out/smoke/runs").glob("*.json")}
    assert sorted(run["optimizer"] for run in runs.values()) == ["lamb", "mkor"]
    for run in runs.values():  # a wheel is of no commit; which one it is says its version
        assert (run["status"], run["steps"], run["commit"]) == ("completed", 3, None)
        assert run["versions"]["hf-soo"] == hf_soo.__version__
    assert (tmp_path / "out/smoke/comparison.png").read_bytes().startswith(b"\x89PNG")
    assert said["report"] in said["pretrain"] and "| mkor | lamb |" in said["report"]
    assert (
        "mkor" in said["list"]
        and "64" in said["plan"]
        and re.search("pretrain/bert_large_phase2 +BERT-Large", said["recipes"])
    )
    assert len(said["reproduce"].splitlines()) == 21
    assert "--config configs/pretrain/bert_mini_phase2.yaml --config configs/pretrain/mkor.yaml" in said["reproduce"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
