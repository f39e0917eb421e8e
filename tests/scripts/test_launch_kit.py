"""configs/accelerate, configs/deepspeed and configs/slurm: parsed by the programs that read them, and run on CPUs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import BertConfig
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

from hf_soo.bert.model import GatheredBertForPreTraining
from hf_soo.integrations.arguments import SecondOrderTrainingArguments
from tests.scripts.launch_runs import TINY, launcher_arguments, run_script, script_arguments
from tests.scripts.script_runs import ROOT, only_run, write_corpus

SHAPES = {  # distributed_type, machines, processes
    "cpu": ("MULTI_GPU", 1, 2),
    "single_gpu": ("NO", 1, 1),
    "ddp_8": ("MULTI_GPU", 1, 8),
    "fsdp2_8": ("FSDP", 1, 8),
    "zero1_8": ("DEEPSPEED", 1, 8),
    "zero2_8": ("DEEPSPEED", 1, 8),
    "zero3_8": ("DEEPSPEED", 1, 8),
    "multi_node_64": ("MULTI_GPU", 16, 64),
}
# Over configs/smoke/mkor.yaml. Its max_grad_norm of 0 stays: DeepSpeed clips after the preconditioner, Trainer before.
SETTINGS = [
    *TINY,
    *shlex.split("--max_steps 3 --logging_steps 1 --eval_steps 3 --base_optim adamw --learning_rate 0.001"),
    *shlex.split("--seq_length 24 --vocab_size 110 --eval_documents 0.25"),
]


def kit(name: str) -> Path:
    return ROOT / "configs" / "accelerate" / f"{name}.yaml"


def test_every_file_is_listed_here() -> None:
    assert {path.stem for path in kit("cpu").parent.iterdir()} == set(SHAPES)
    assert {path.stem for path in (ROOT / "configs" / "deepspeed").iterdir()} == {"zero1", "zero2", "zero3"}


@pytest.mark.parametrize("name", SHAPES)
def test_accelerate_reads_the_file(name: str) -> None:
    config = load_config_from_file(str(kit(name)))
    assert (config.distributed_type.value, config.num_machines, config.num_processes) == SHAPES[name]
    assert (config.use_cpu, config.mixed_precision) == (name == "cpu", "bf16" if name == "fsdp2_8" else None)
    assert config.gpu_ids == ("0" if name == "single_gpu" else None)
    zero = re.match(r"zero\d", name)  # any other key of DeepSpeed's is refused beside the file
    assert config.deepspeed_config == ({"deepspeed_config_file": f"configs/deepspeed/{zero[0]}.json"} if zero else {})
    assert (config.main_process_ip, config.machine_rank) == (None, 0)  # the launcher's flags say which


@pytest.mark.parametrize("name", SHAPES)
def test_header_has_hardware_and_what_is_tested_and_a_command_that_parses(name: str) -> None:
    header = re.match(r"(#.*\n)+", kit(name).read_text())
    assert header is not None and "Hardware:" in header[0] and "Tested:" in header[0]
    (command,) = re.findall(r"accelerate launch (--config_file .*)", header[0])
    words = shlex.split(command.replace(" R ", " 3 ").replace(" PORT ", " 29501 "))
    given = launcher_arguments(*words)
    assert words[1] == f"configs/accelerate/{name}.yaml" and (given.module, given.training_script) == (
        True,
        "hf_soo.pretrain",
    )
    assert (given.num_machines, given.num_processes) == SHAPES[name][1:]
    assert (given.use_deepspeed, given.use_fsdp) == (name.startswith("zero"), name.startswith("fsdp"))
    assert given.multi_gpu == (SHAPES[name][0] == "MULTI_GPU")
    *_, training = script_arguments(*given.training_script_args)
    assert training.bf16 == (name != "cpu") and (training.optim, training.resume_from_checkpoint) == ("mkor", None)
    assert training.base_optim == ("adamw" if name.startswith("zero") else None if name == "cpu" else "lamb")
    if name == "multi_node_64":
        assert (given.machine_rank, given.main_process_ip, given.main_process_port) == (3, "HOST", 29501)
        assert given.rdzv_backend == "static"  # the ranks of the machines are those they were given


def test_the_fsdp_plugin_that_accelerate_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = prepare_multi_gpu_env(launcher_arguments("--config_file", str(kit("fsdp2_8")), "script.py"))
    assert variables["ACCELERATE_USE_FSDP"] == "true"
    for key, value in variables.items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading
    plugin.set_mixed_precision(variables["ACCELERATE_MIXED_PRECISION"])
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16
    model = GatheredBertForPreTraining(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )
    plugin.set_auto_wrap_policy(model)
    wrapped = [name for name, module in model.named_modules() if plugin.auto_wrap_policy(module, False, 0)]
    assert wrapped == ["bert.encoder.layer.0", "bert.encoder.layer.1"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_transformers_fills_in_deepspeeds_auto_values(stage: int, tmp_path: Path) -> None:
    file = ROOT / "configs" / "deepspeed" / f"zero{stage}.json"
    assert not {"optimizer", "scheduler"} & set(json.loads(file.read_text()))
    args = SecondOrderTrainingArguments(
        output_dir=str(tmp_path), optim="mkor", per_device_train_batch_size=4, gradient_accumulation_steps=3,
        max_grad_norm=0.5, bf16=True, use_cpu=True, report_to="none",
    )  # fmt: skip
    try:
        config = HfTrainerDeepSpeedConfig(str(file))
        config.trainer_config_process(args)
        config.trainer_config_finalize(args, SimpleNamespace(config=BertConfig(hidden_size=1024)), 100)
    finally:
        unset_hf_deepspeed_config()  # or every model made after this one would be taken for a ZeRO-3 one
    sizes = {
        "reduce_bucket_size": 1024 * 1024,
        "stage3_prefetch_bucket_size": 943718,  # 0.9 x 1024 x 1024
        "stage3_param_persistence_threshold": 10240,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    assert config.config == {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **(sizes if stage == 3 else {})},
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text"))


def launch(
    name: str, corpus: Path, output: Path, *flags: str, processes: int, script: str = "scripts/pretrain_bert.py"
) -> dict[str, Any]:
    """`accelerate launch --config_file NAME.yaml ...` on CPUs; the run's JSON."""
    where = ["--corpus", str(corpus), "--output_dir", str(output)]
    launcher = ["--config_file", str(kit(name)), "--num_processes", str(processes)]
    run_script(script, "--config", "configs/smoke/mkor.yaml", *SETTINGS, *where, *flags, launcher=launcher)
    run = only_run(output / "runs")
    assert (run["name"], run["status"], run["steps"]) == ("mkor-adamw-lr0.001", "completed", 3)
    assert run["config"]["processes"] == processes
    return run


def losses(run: dict[str, Any]) -> list[float]:
    return [point["train_loss"] for point in run["curve"]] + [run["final"]["eval_loss"]]


@pytest.fixture(scope="module")
def two_processes(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """configs/accelerate/cpu.yaml as it is: the run that the others must repeat."""
    return launch("cpu", corpus, tmp_path_factory.mktemp("cpu"), "--use_cpu", "true", processes=2)


@pytest.mark.slow
def test_single_gpu_runs_one_process(corpus: Path, tmp_path: Path) -> None:
    launch("single_gpu", corpus, tmp_path, "--use_cpu", "true", processes=1)


@pytest.mark.slow
def test_ddp_runs_on_two_cpu_processes(two_processes: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    run = launch("ddp_8", corpus, tmp_path, "--use_cpu", "true", processes=2)
    assert losses(run) == losses(two_processes)


# Where weights or states are sharded, sums are taken in another order.
SHARDED = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_runs_on_two_cpu_processes(
    stage: int, two_processes: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    script = "tests/ranks/pretrain_on_gloo.py"
    run = launch(f"zero{stage}_8", corpus, tmp_path, "--ddp_backend", "gloo", processes=2, script=script)
    assert losses(run) == pytest.approx(losses(two_processes), rel=SHARDED)


@pytest.mark.slow
def test_fsdp_runs_on_two_cpu_processes(
    two_processes: dict[str, Any], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    flags = ["--ddp_backend", "gloo", "--save_strategy", "steps", "--save_steps", "3"]
    run = launch("fsdp2_8", corpus, tmp_path, *flags, processes=2, script="tests/ranks/pretrain_on_gloo.py")
    assert losses(run) == pytest.approx(losses(two_processes), rel=SHARDED)
    written = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert {"pytorch_model_fsdp.bin", "optimizer.bin", "model.safetensors"} < written  # whole, not in shards
