"""Fixtures of the whole suite."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported, by ranks too
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is on the hub: without it a name is asked for six times
if "TORCH_EXTENSIONS_DIR" not in os.environ:
    # DeepSpeed compiles a kernel behind a lock file, and a killed run leaves its lock: a folder for each session.
    os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(prefix="hf_soo_extensions_")
    atexit.register(shutil.rmtree, os.environ["TORCH_EXTENSIONS_DIR"], ignore_errors=True)

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # the tests' tensors are small: more threads only wait for each other


LONGEST = (
    "ranks/test_equality.py", "scripts/test_launch_kit.py", "ranks/test_fsdp.py", "ranks/test_reshard.py",
    "ranks/test_adapters.py", "scripts/test_launch_slurm.py", "ranks/test_faults.py", "trainer/test_trainer.py",
    "scripts/test_plan_dry_run.py",
    "ranks/test_distributed.py", "scripts/test_pretrain_script.py", "methods/test_contract_settings.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """xdist would start with the files of the most tests; here the longest come first, so that none is left alone."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest, then the others as they come."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get("/".join(item.path.parts[-2:]), len(LONGEST)))


def pytest_collection_finish() -> None:
    """The imported libraries are no garbage: each `Trainer.train` collects, and would go through all of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for each test, whichever tests ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="module", autouse=True)
def own_environment() -> Iterator[None]:
    """What a file's trainers leave in the environment for accelerate ends with it: scripts that tests start read it."""
    before = dict(os.environ)
    yield
    for name in [name for name in {*os.environ, *before} if name.startswith(("ACCELERATE_", "FSDP_"))]:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small products: threads cost more than they save, and far more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_ignored_signals() -> Iterator[None]:
    """For tests that stop a process of theirs: it would ignore what the suite ignores, in a background job or nohup."""
    usual = {
        signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL,
    }  # fmt: skip
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator of its own, for tests in numpy."""
    return np.random.default_rng(0)
