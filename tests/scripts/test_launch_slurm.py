"""configs/slurm: the batch script against stubs of Slurm; what it starts, when it requeues, and that it resumes."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.scripts.launch_runs import TINY, environment, launcher_arguments, script_arguments
from tests.scripts.script_runs import ROOT, only_run, prepare_corpus

SBATCH = ROOT / "configs" / "slurm" / "pretrain_64gpu.sbatch"
STUB = """#!{python}
import json, os, signal, subprocess, sys
name, argv = os.path.basename(sys.argv[0]), sys.argv[1:]
kept = {{key: os.environ.get(key) for key in ("SLURM_NODEID", "OMP_NUM_THREADS")}}
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([name, argv, kept]) + "\\n")
if name == "scontrol" and argv[0] == "show":
    print(os.environ["HOSTS"].replace(" ", "\\n"))
if name == "srun":
    command = argv[argv.index("bash") :]
    nodes = [subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": n}}) for n in os.environ["RUN_NODES"].split()]
    signal.signal(signal.SIGTERM, lambda *_: [node.terminate() for node in nodes])
    sys.exit(max(abs(node.wait()) for node in nodes))
if name == "accelerate":
    sys.exit(int(os.environ["ACCELERATE_EXIT"]))
"""


class Cluster:
    """A Slurm of stubs: srun runs its command for RUN_NODES on this machine, and every call is written down."""

    def __init__(self, folder: Path, data: Path, **job: str) -> None:
        self.folder, self.calls_file = folder, folder / "calls"
        for name in ("srun", "scontrol", "accelerate"):
            self.stub(name, STUB.format(python=sys.executable))
        mine = {
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "ACCELERATE_EXIT": "0",
        }
        mine |= {"DATA_DIR": str(data), "OUTPUT_DIR": str(folder / "out"), "SLURM_JOB_NODELIST": "node[00-15]"}
        self.environment = environment(**mine, **job)

    def stub(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def submit(self, *flags: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(SBATCH), *flags],
            cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def calls(self, name: str) -> list[tuple[list[str], dict[str, str]]]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.is_file() else []
        return [(argv, kept) for called, argv, kept in map(json.loads, lines) if called == name]


@pytest.fixture
def sixteen_nodes(tmp_path: Path) -> Cluster:
    """64 GPUs; the first and the last node run the stub of accelerate."""
    (tmp_path / "data").mkdir()
    hosts = " ".join(f"node{node:02}" for node in range(16))
    job = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NUM_NODES": "16", "SLURM_CPUS_PER_TASK": "32"}
    return Cluster(tmp_path, tmp_path / "data", HOSTS=hosts, RUN_NODES="0 15", **job)


def test_sbatch_asks_for_64_gpus_and_a_warning() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", SBATCH.read_text(), re.MULTILINE))
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("16", "1", "4")
    assert (asked["signal"], asked["requeue"], asked["open-mode"]) == ("B:USR1@120", "", "append")


def test_sbatch_starts_one_launcher_a_node(sixteen_nodes: Cluster) -> None:
    job = sixteen_nodes.submit("--learning_rate", "0.004")
    assert job.wait(timeout=60) == 0, job.stdout.read()
    ((srun, _),) = sixteen_nodes.calls("srun")
    assert {"--nodes=16", "--ntasks=16", "--ntasks-per-node=1", "--cpus-per-task=32", "--kill-on-bad-exit=1"} < set(
        srun
    )
    assert f"--output={sixteen_nodes.folder}/out/logs/job-%j-node-%n.log" in srun
    first, last = sorted(sixteen_nodes.calls("accelerate"), key=lambda call: int(call[1]["SLURM_NODEID"]))
    for (command, *words), kept in (first, last):
        given = launcher_arguments(*words)
        assert (command, kept["OMP_NUM_THREADS"], given.training_script) == ("launch", "8", "hf_soo.pretrain")
        assert str(given.machine_rank) == kept["SLURM_NODEID"]
        assert (given.num_machines, given.num_processes) == (16, 64)
        assert (given.main_process_ip, given.main_process_port) == ("node00", 14242)
    assert (first[1]["SLURM_NODEID"], last[1]["SLURM_NODEID"]) == ("0", "15")
    _, data, run, training = script_arguments(*given.training_script_args)
    assert data.data_dir == str(sixteen_nodes.folder / "data")
    # a requeued job is the same command: an output folder without the job's number, and no flag that begins anew
    assert training.output_dir == str(sixteen_nodes.folder / "out")
    assert (training.resume_from_checkpoint, run.restart, run.results_dir) == (
        None,
        False,
        f"{training.output_dir}/runs",
    )
    assert (training.save_strategy, training.save_steps, training.save_total_limit) == ("steps", 100, 2)
    assert (training.ddp_timeout, training.bf16, training.learning_rate) == (1800, True, 0.004)
    assert [argv for argv, _ in sixteen_nodes.calls("scontrol")] == [["show", "hostnames", "node[00-15]"]]


def test_a_failed_job_ends_and_a_job_without_data_does_not_start(sixteen_nodes: Cluster) -> None:
    sixteen_nodes.environment["ACCELERATE_EXIT"] = "3"
    assert sixteen_nodes.submit().wait(timeout=60) == 3
    assert [argv[0] for argv, _ in sixteen_nodes.calls("scontrol")] == ["show"]  # not requeued
    sixteen_nodes.environment["DATA_DIR"] = "absent"
    job = sixteen_nodes.submit()
    assert job.wait(timeout=60) == 1
    assert "error: no absent in" in job.stdout.read()
    assert len(sixteen_nodes.calls("srun")) == 1


def free_port_of_a_job() -> int:
    """A free port among those that the script gives to jobs."""
    for port in random.SystemRandom().sample(range(10000, 30000), 50):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no free port among 50 tried")


@pytest.mark.slow
def test_sbatch_requeues_before_the_time_limit_and_the_same_command_resumes(tmp_path: Path) -> None:
    """Two nodes of one process, both on this machine: configs/accelerate/multi_node_64.yaml with two real launchers."""
    data, job_id = prepare_corpus(tmp_path), str(free_port_of_a_job() - 10000)
    size = {"SLURM_JOB_NUM_NODES": "2", "GPUS_PER_NODE": "1", "SAVE_STEPS": "10"}
    cluster = Cluster(tmp_path, data, HOSTS="127.0.0.1", RUN_NODES="0 1", SLURM_JOB_ID=job_id, **size)
    cluster.stub("accelerate", f'#!/bin/sh\nexec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n')
    steps = "--max_steps 60 --logging_steps 10 --eval_steps 60 --global_batch_size 8 --dataloader_num_workers 0"
    flags = [*TINY, *shlex.split(f"{steps} --use_cpu true --bf16 false")]
    output, began = tmp_path / "out", time.monotonic()
    job = cluster.submit(*flags)
    while not (output / "checkpoint-10" / "trainer_state.json").is_file() and job.poll() is None:
        assert time.monotonic() - began < 300, "no checkpoint in 5 minutes"
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    printed, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and f"requeueing job {job_id}" in printed, printed[-6000:]
    assert cluster.calls("scontrol")[-1][0] == ["requeue", job_id]
    assert not (output / "checkpoint-60").exists()

    job = cluster.submit(*flags)
    printed, _ = job.communicate(timeout=300)
    assert job.returncode == 0, printed[-6000:]
    resumed = re.search(r"Resuming from \S+/checkpoint-(\d+);", printed)
    assert resumed is not None and 10 <= int(resumed[1]) < 60
    run = only_run(output / "runs")
    assert (run["status"], run["steps"], run["config"]["processes"]) == ("completed", 60, 2)
    assert [point["step"] for point in run["curve"]] == list(range(10, 61, 10))  # with what was before the restart
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-50", "checkpoint-60"}
