"""What works on this machine: ``hf-soo doctor``. Each answer is that of a small step that was really taken.

A try is a process of its own, or two that train together, so that one which crashes or hangs ends no other.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from torch import Tensor, nn

import hf_soo
from hf_soo import machine
from hf_soo.optimizers.polar import WORTHWHILE, product_seconds
from hf_soo.progress import Progress

_LIMIT = 120.0  # seconds of a try, on a busy machine
_KERNEL = "deepspeed_shm_comm"  # of DeepSpeed on CPUs, which goes without it as well
_EXTRAS = {
    "": "every command", "deepspeed": "ZeRO", "eval": "scores of GLUE", "vision": "images", "hdf5": "HDF5 shards",
    "lora": "adapters", "clients": "TRL and sentence-transformers", "search": "hf-soo search", "report": "pictures",
    "tracking": "experiment trackers",
}  # fmt: skip
"""What is in an extra is for this; "": what is in none."""


@dataclass(frozen=True)
class _Try:
    """A step, where it is taken, and what it lacks here, so that it is not."""

    title: str
    step: Callable[[str], None]  # called with ``where``
    where: str = "cpu"  # device, or folder
    processes: int = 1
    backend: str = ""  # of their group
    lacks: str = ""


def examine(folder: Path) -> dict[str, Any]:
    """Try everything.

    Args:
        folder: where runs shall write.

    Returns:
        The report, as its JSON has it.
    """
    (here, missing), seconds = _packages(), product_seconds()
    bar: Iterable[_Try] = Progress(iterable=list(_tries(folder)), desc="doctor", unit="try", leave=False)
    return {
        "kind": "doctor",
        "platform": platform.platform(),
        "versions": here | machine.versions(),
        "commit": machine.commit(),
        "missing": missing,
        "device": machine.device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "memory_bytes": _memory("SC_PHYS_PAGES"),
        "free_memory_bytes": _memory("SC_AVPHYS_PAGES"),
        "bf16_speed": seconds["float32"] / seconds["bfloat16"],
        "tries": {each.title: each.lacks or _answer(each) for each in bar},
    }


def text(report: Mapping[str, Any]) -> str:
    """A report to read.

    Args:
        report: what `examine` returned.
    """
    versions = dict(report["versions"])
    commit = f" at commit {report['commit']}" if report["commit"] else ""
    lines = [
        f"hf_soo {versions.pop('hf-soo')}{commit}, Python {versions.pop('python')}, {report['platform']}",
        ", ".join(f"{package} {version}" for package, version in versions.items()),
    ]
    for extra, names in report["missing"].items():
        name = f"hf-soo[{extra}]" if extra else "hf-soo"
        lines.append(f"not here: {', '.join(names)}, for {_EXTRAS[extra]} (pip install '{name}')")
    lines.append(f"{report['device']} of {report['cores']} cores; GPUs: {', '.join(report['gpus']) or 'none'}")
    memory = [report[key] for key in ("free_memory_bytes", "memory_bytes")]
    lines += [] if None in memory else ["memory: {:.1f} of {:.1f} GB are free".format(*(each / 1e9 for each in memory))]
    fast, times = report["bf16_speed"] > WORTHWHILE, 1 / report["bf16_speed"]
    lines.append(
        f"bf16 is {'fast' if fast else 'not fast'} on this CPU: a product takes {times:.2g} of its time in fp32"
        + ("" if fast else "; leave --bf16 out here")
    )
    lines += [f"no     {title}: {why}" if why else f"works  {title}" for title, why in report["tries"].items()]
    return "".join(f"{line}\n" for line in lines)


def _memory(pages: str) -> int | None:
    known = pages in os.sysconf_names  # a Mac does not say what is free
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if known else None


def _packages() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Package -> its version; and extra -> its packages that are not there, or not in a version that is allowed."""
    here: dict[str, str] = {}
    missing: dict[str, list[str]] = {}
    try:
        requirements = [Requirement(line) for line in metadata.requires("hf-soo") or []]
    except metadata.PackageNotFoundError:  # nobody has installed it: a clone on the path
        return here, missing
    for each in requirements:
        wanted = [extra for extra in _EXTRAS if each.marker is None or each.marker.evaluate({"extra": extra})]
        if not wanted:
            continue
        try:
            here[each.name] = metadata.version(each.name)
        except metadata.PackageNotFoundError:
            missing.setdefault(wanted[0], []).append(each.name)
        else:
            if not each.specifier.contains(here[each.name], prereleases=True):
                missing.setdefault(wanted[0], []).append(f"{each.name}{each.specifier} (here {here[each.name]})")
    return here, missing


def _tries(folder: Path) -> Iterator[_Try]:
    gpus = torch.cuda.device_count()
    for device in ("cpu", "cuda")[: 1 + bool(gpus)]:
        yield _Try(f"fp32 on {device}", _alone, device)
        for name, half in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            yield _Try(f"{name} autocast on {device}", partial(_alone, half=half), device)
    yield _Try("DDP over gloo", _ddp, "cpu", 2, "gloo")
    lacks = "torch sees no GPU" if not gpus else "" if dist.is_nccl_available() else "torch is built without NCCL"
    over_nccl = ("cuda", min(2, max(gpus, 1)), "nccl")
    yield _Try("DDP over nccl", _ddp, *over_nccl, lacks)
    where = ("cpu", 2, "gloo") if lacks else over_nccl
    yield _Try(f"FSDP2 over {where[2]}", _fsdp2, *where)
    lacks = "" if find_spec("deepspeed") else "DeepSpeed is not installed; pip install 'hf-soo[deepspeed]'"
    yield _Try(f"ZeRO-2 over {where[2]}", _zero, *where, lacks)
    yield _Try("writing in this folder", _write, str(folder))
    yield _Try("locks in it, which keep a second run out of an output_dir", _lock, str(folder))


def _answer(each: _Try) -> str:
    """Take the step: why it failed, or "" where it did not."""
    context = multiprocessing.get_context("forkserver")  # which imports once for all
    context.set_forkserver_preload(["hf_soo.doctor", "torch.distributed.fsdp"])
    with tempfile.TemporaryDirectory() as folder:
        given = [(rank, each, folder) for rank in range(each.processes)]
        ranks = [context.Process(target=_rank, args=args, daemon=True) for args in given]
        usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is started here ignores a Ctrl-C, and ends with us
        for process in ranks:
            process.start()
        signal.signal(signal.SIGINT, usual)
        end = time.monotonic() + _LIMIT
        for process in ranks:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
            process.join()
        said = [file.read_text(encoding="utf-8") for file in sorted(Path(folder).glob("said_*"))]
    if any(said) or len(said) == each.processes:
        return next(filter(None, said), "")
    if None in codes:
        return f"no answer after {_LIMIT:.0f} s"
    return f"the process ended with {next(filter(None, codes), 0)}"


def _rank(rank: int, each: _Try, folder: str) -> None:
    """One of a try's processes; what libraries print meanwhile is no part of the answer."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    logging.disable()
    torch.set_num_threads(1)
    try:
        if each.backend:
            _join(rank, each, folder)
        each.step(each.where)
        why = ""
    except Exception as error:  # whatever it is, it is the answer
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    Path(folder, f"said_{rank}").write_text(why, encoding="utf-8")
    os._exit(0)  # and all that a library has started


def _join(rank: int, each: _Try, folder: str) -> None:
    """Join the group of a try's processes, as a launcher's would."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{each.processes}"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # DeepSpeed wants to see them
    if each.where == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        each.backend, f"file://{folder}/group", timedelta(seconds=_LIMIT / 2), rank=rank, world_size=each.processes
    )


def _toy(device: str) -> tuple[Any, Tensor]:
    """A model of two layers, the same on every rank, and a batch."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(device), torch.randn(4, 8, device=device)


def _shares(model: Any) -> list[Tensor]:
    """A copy of this process's weights."""
    return [getattr(each, "to_local", lambda each=each: each)().detach().clone() for each in model.parameters()]


def _check(before: list[Tensor], after: list[Tensor]) -> None:
    if not all(each.isfinite().all() for each in after):
        raise ArithmeticError("the step makes weights that are not finite.")
    if all(map(torch.equal, before, after)):
        raise ArithmeticError("the step moves no weight.")


def _train(model: Any, batch: Tensor, half: torch.dtype | None = None) -> None:
    """A step of MKOR, with a scaled loss in fp16."""
    device, before = batch.device.type, _shares(model)
    optimizer = hf_soo.build_optimizer("mkor", model, lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=half == torch.float16)
    optimizer.loss_scale = scaler.get_scale
    with torch.autocast(device, half, enabled=half is not None):
        loss = model(batch).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    _check(before, _shares(model))


def _alone(device: str, half: torch.dtype | None = None) -> None:
    _train(*_toy(device), half)


def _ddp(device: str) -> None:
    model, batch = _toy(device)
    _train(nn.parallel.DistributedDataParallel(model), batch)


def _fsdp2(device: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    (model, batch), mesh = _toy(device), init_device_mesh(device, (dist.get_world_size(),))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    _train(model, batch)


def _zero(device: str) -> None:
    import deepspeed
    from torch.utils.cpp_extension import get_cxx_compiler, verify_ninja_availability

    from hf_soo.integrations.deepspeed import attach

    if device == "cpu" and deepspeed.ops.__compatible_ops__.pop(_KERNEL, False):
        # A first run compiles it: for a minute, and behind a lock that stays where it is killed. So only what it needs.
        verify_ninja_availability()
        compiler = str(get_cxx_compiler())  # type: ignore[no-untyped-call]
        if shutil.which(compiler) is None:
            raise OSError(f"DeepSpeed compiles a kernel in its first run, and there is no {compiler}; install it.")
    model, batch = _toy(device)
    before, optimizer = _shares(model), hf_soo.build_optimizer("mkor", model, lr=0.1)
    config = {
        "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    attach(engine, optimizer)
    engine.backward(engine(batch).square().mean())
    engine.step()
    _check(before, _shares(engine.module))


def _write(folder: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".hf_soo_") as place:
        Path(place, "file").write_bytes(bytes(1 << 20))


def _lock(folder: str) -> None:
    """Another process must not get the lock of an output_dir that this one has."""
    from hf_soo.integrations.saving import hold

    with tempfile.TemporaryDirectory(dir=folder, prefix=".hf_soo_") as place:
        if hold(Path(place)) is None:
            raise OSError("there are none; see to it that no two runs have one output_dir.")
        if (other := os.fork()) == 0:
            code = 0
            try:
                hold(Path(place))
            except ValueError:
                code = 1
            finally:
                os._exit(code)
        if os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) != 1:
            raise OSError("two processes get the same one; see to it that no two runs have one output_dir.")
