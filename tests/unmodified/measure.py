"""transformers' own example scripts, unmodified, with eight optimizers: what docs/guides/your_own_trainer.md shows.

    python -m tests.unmodified.measure EXAMPLES --commit COMMIT --work FOLDER

EXAMPLES is examples/pytorch of a checkout of transformers (COMMIT), FOLDER an empty folder for tiny models, data, runs,
and stand-ins for `evaluate` and `nltk`. Each script is run by `hf-soo run` in a process of its own, which is forked
when the libraries are imported: with every optimizer to its end with an evaluation, and once more from the checkpoint
in its middle; with transformers' AdamW by `hf-soo run` and by Python alone; and on two processes, over gloo. The
differences are the largest between two models' weights. results/unmodified_scripts/runs.json is written after each
optimizer; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import runpy
import socket
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.unmodified.runs import difference, weights
from tests.unmodified.toys import write_data, write_models, write_stand_ins

RESULTS = Path(__file__).resolve().parents[2] / "results" / "unmodified_scripts" / "runs.json"
STEPS, MIDDLE, GLOBAL_BATCH = 6, 3, 8
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Script:
    """A script, by its path under EXAMPLES; the model it is given; flags with FOLDER/data for {data}; what it imports.

    ``layer`` is what FSDP2 shards by itself; "" for BART, whose shared embedding accelerate tears apart there.
    ``spread``: the optimizers that run on two processes as well; none where each process draws masks of its own.
    """

    path: str
    model: str
    layer: str
    flags: str
    beside: tuple[str, ...] = ()
    spread: tuple[str, ...] = ("mkor",)

    @property
    def strategies(self) -> list[str]:
        return STRATEGIES if self.layer else STRATEGIES[:2]


PERIODS = "warmup_updates=2,update_period=2"
MUON = "rest_lr=1e-3,rest_eps=1e-4,ns_dtype=float32,ns_coefficients=polar_express,ns_steps=6"
# LAMB's ε bounds what it makes of a gradient that is rounding alone: of the last LayerNorm's bias in run_qa.py.
OPTIMIZERS = {
    "mkor": f"--optim mkor --base_optim lamb --base_optim_args eps=1e-4 --optim_args {PERIODS}",
    "mkor_h": f"--optim mkor_h --base_optim lamb --optim_args {PERIODS},patience=1,min_steps=3,rate_fraction=1e-3",
    "eva": "--optim eva",
    "kfac_expand": f"--optim kfac_expand --optim_args {PERIODS},inverse_period=4,damping=0.3",
    "foof": f"--optim foof --optim_args {PERIODS},inverse_period=4,damping=0.3",
    "lamb": "--optim lamb",
    "muon": f"--optim muon --optim_args {MUON}",
    "rf_rmsprop": "--optim rf_rmsprop --optim_args factor_lr=0.5 --max_grad_norm 0",
}
PAIRS = "--train_file {data}/train_%s --validation_file {data}/validation_%s"
SCRIPTS = [
    Script(
        "text-classification/run_glue.py", "bert", "BertLayer",
        PAIRS % (2 * ("pairs.csv",)) + " --max_seq_length 16", spread=tuple(OPTIMIZERS),
    ),
    Script(
        "question-answering/run_qa.py", "bert", "BertLayer",
        PAIRS % (2 * ("questions.json",)) + " --max_seq_length 24 --doc_stride 8",
        ("trainer_qa.py", "utils_qa.py"),
    ),
    Script(  # the epoch ends in the middle: in the midst of one transformers draws other masks when it goes on
        "language-modeling/run_mlm.py", "bert", "BertLayer",
        PAIRS % (2 * ("lines.txt",)) + f" --max_seq_length 16 --max_train_samples {MIDDLE * GLOBAL_BATCH}", spread=(),
    ),
    Script("language-modeling/run_clm.py", "gpt2", "GPT2Block", PAIRS % (2 * ("lines.txt",)) + " --block_size 16"),
    Script(
        "summarization/run_summarization.py", "bart", "",
        PAIRS % (2 * ("summaries.json",)) + " --max_source_length 16 --max_target_length 8 --predict_with_generate",
    ),
]  # fmt: skip

STOCK = "--optim adamw_torch --adam_epsilon 1e-4"
STRATEGIES = ["DDP x 2", "ZeRO-2 x 2", "FSDP2 x 2"]


@dataclass
class Bench:
    """Where runs go, and how they are started."""

    examples: Path
    work: Path

    def prepare(self) -> None:
        (self.work / "runs").mkdir(parents=True, exist_ok=True)
        write_stand_ins(self.work / "stand_ins")
        write_data(self.work / "data")
        write_models(self.work / "models")
        auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        zero = dict.fromkeys(auto, "auto") | {"zero_optimization": {"stage": 2}}
        (self.work / "zero2.json").write_text(json.dumps(zero))

    def run(self, script: Script, flags: str, *, strategy: str | None = None, plain: bool = False) -> Path:
        """One run to its end; its folder.

        Args:
            script: which.
            flags: the optimizer's, and more.
            strategy: one of STRATEGIES; None: one process.
            plain: by Python alone.

        Raises:
            RuntimeError: a process of it failed; the message has the end of its log.
        """
        out = Path(tempfile.mkdtemp(dir=self.work / "runs"))
        world = 1 if strategy is None else 2
        words = (
            f"{self.examples}/{script.path} --model_name_or_path {self.work}/models/{script.model} --output_dir {out} "
            f"{script.flags.format(data=self.work / 'data')} --cache_dir {self.work}/cache --do_train --do_eval "
            f"--max_steps {STEPS} --save_steps {MIDDLE} --logging_steps 1 --learning_rate 0.0005 --weight_decay 0.01 "
            f"--per_device_train_batch_size {GLOBAL_BATCH // world} --train_sampling_strategy sequential --seed 0 "
            f"--report_to none --disable_tqdm true {flags} {self._spread(script, strategy)}"
        ).split()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        fork = get_context("fork")
        processes = [
            fork.Process(target=_in_a_process, args=(rank, world, port, strategy, plain, self.work, words, out))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            log = "\n".join((out / f"log{rank}").read_text()[-3000:] for rank in range(world))
            raise RuntimeError(f"{' '.join(words)}: {[p.exitcode for p in processes]}\n{log}")
        return out

    def _spread(self, script: Script, strategy: str | None) -> str:
        if strategy in {None, "DDP x 2"}:
            return "--use_cpu true"
        if strategy == "ZeRO-2 x 2":
            return "--ddp_backend gloo"  # the rest says the environment, as accelerate's launcher sets it
        file = self.work / f"fsdp2_{script.model}.json"
        by_layer = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": [script.layer]}
        file.write_text(json.dumps({"version": 2, **by_layer}))
        return f"--fsdp --fsdp_config {file} --ddp_backend gloo"


def _in_a_process(
    rank: int, world: int, port: int, strategy: str | None, plain: bool, work: Path, words: list[str], out: Path
) -> None:
    """What a launcher's environment, and the shell, would give a script."""
    log = os.open(out / f"log{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if world > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    if strategy == "ZeRO-2 x 2":
        from tests.ranks.cells import stay_on_gloo

        stay_on_gloo()
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(work / "zero2.json")
    if strategy == "FSDP2 x 2":
        from accelerate.state import PartialState

        from tests.ranks.pretrain_on_gloo import gloo

        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = gloo
    from hf_soo import cli

    sys.path[1:1] = [str(work / "stand_ins")]
    code = 0
    if plain:
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")
    else:
        code = cli.main(["run", *words])
    sys.exit(code)


def evaluation(out: Path) -> dict[str, float]:
    """What a script measured on its validation data, without what depends on the clock."""
    found = json.loads((out / "eval_results.json").read_text())
    return {key: value for key, value in found.items() if "runtime" not in key and "per_second" not in key}


def losses(out: Path) -> list[float]:
    state = json.loads((out / "trainer_state.json").read_text())
    return [row["loss"] for row in state["log_history"] if "loss" in row]


def stock(bench: Bench, script: Script) -> dict[str, Any]:
    """transformers' AdamW by `hf-soo run` and by Python alone."""
    adamw, plain = (bench.run(script, STOCK, plain=plain) for plain in (False, True))
    return {
        "flags": STOCK,
        "difference_to_plain_python": difference(weights(adamw), weights(plain)),
        "same_evaluation": evaluation(adamw) == evaluation(plain),
    }


def measure(bench: Bench, script: Script, name: str) -> dict[str, Any]:
    """One script with one optimizer."""
    flags = OPTIMIZERS[name]
    whole = bench.run(script, flags)
    resumed = bench.run(script, f"{flags} --resume_from_checkpoint {whole}/checkpoint-{MIDDLE}")
    row: dict[str, Any] = {
        "flags": flags,
        "losses": losses(whole),
        "evaluation": evaluation(whole),
        "difference_resumed": difference(weights(whole), weights(resumed)),
        "same_evaluation_resumed": evaluation(whole) == evaluation(resumed),
    }
    if name in script.spread:
        row["differences_on_two"] = {
            strategy: difference(weights(whole), weights(bench.run(script, flags, strategy=strategy)))
            for strategy in script.strategies
        }
    return row


def sha256(script: Path, name: str) -> str:
    return hashlib.sha256((script.parent / name).read_bytes()).hexdigest()


def markdown(written: dict[str, Any]) -> str:
    """The table of the docs: for each optimizer the largest difference over the scripts."""
    columns = ["resumed", *STRATEGIES]
    lines = [f"| | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    for name in OPTIMIZERS:
        rows = [script["optimizers"][name] for script in written["scripts"].values()]
        found = [{"resumed": row["difference_resumed"], **row.get("differences_on_two", {})} for row in rows]
        worst = [max(each[column] for each in found if column in each) for column in columns]
        lines.append(f"| `{name}` | {' | '.join(f'{value:.0e}' if value else '0' for value in worst)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # imported once, before the processes are forked
    import datasets
    import deepspeed
    import transformers

    assert datasets and deepspeed and transformers
    bench = Bench(options.examples.resolve(), options.work.resolve())
    bench.prepare()
    packages = ("transformers", "torch", "accelerate", "datasets", "deepspeed")
    written: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"scripts": {}}
    written |= {
        "transformers_commit": options.commit,
        "versions": {name: version(name) for name in packages},
        "steps": STEPS, "resumed_at": MIDDLE, "global_batch": GLOBAL_BATCH,
    }  # fmt: skip
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for script in SCRIPTS:
        names = (Path(script.path).name, *script.beside)
        hashes = {name: sha256(bench.examples / script.path, name) for name in names}
        rows = written["scripts"].setdefault(script.path, {"model": script.model, "sha256": hashes, "optimizers": {}})
        for name in ("adamw_torch", *OPTIMIZERS):
            if name not in rows["optimizers"]:
                row = stock(bench, script) if name == "adamw_torch" else measure(bench, script, name)
                rows["optimizers"][name] = row
                RESULTS.write_text(json.dumps(written, indent=1) + "\n")
                print(script.path, name, {key: value for key, value in row.items() if "difference" in key}, flush=True)
    print(markdown(written))


if __name__ == "__main__":
    main()
