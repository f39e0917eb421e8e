"""``hf-soo run SCRIPT``: scripts that know nothing of us train as changed by hand, and without us as ever."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from transformers import BertForMaskedLM, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_soo import cli
from hf_soo.integrations.replacing import replaced
from hf_soo.integrations.trainer import SecondOrderTrainerMixin, SecondOrderTrainingArguments
from tests.ranks.distributed import run_ranks
from tests.trainer.test_trainer import Examples, bert
from tests.unmodified.measure import OPTIMIZERS, RESULTS, TOLERANCE
from tests.unmodified.measure import SCRIPTS as SCRIPTS_OF_OTHERS
from tests.unmodified.runs import FLAGS, MKOR, by_hand, difference, history, ours, plain, weights

SCRIPTS = ["classify.py", "translate.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_adamw_torch_is_the_plain_run(script: str, tmp_path: Path) -> None:
    """With dropout, accumulation, evaluation: weights and all that is logged, to the last bit; and its exit code."""
    flags = [*FLAGS, "--optim", "adamw_torch", "--do_eval", "--gradient_accumulation_steps", "2"]
    plain_code, our_code = (
        run(script, *flags, "--output_dir", str(tmp_path / name)) for name, run in (("plain", plain), ("ours", ours))
    )
    assert plain_code == our_code == (7 if script == "translate.py" else 0)
    assert difference(weights(tmp_path / "plain"), weights(tmp_path / "ours")) == 0.0
    last = "checkpoint-6"
    assert history(tmp_path / "plain" / last) == history(tmp_path / "ours" / last)
    for file in ("optimizer.pt", "scheduler.pt"):
        states = [torch.load(tmp_path / name / last / file, weights_only=True) for name in ("plain", "ours")]
        assert_equal(*states)


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("script", SCRIPTS)
def test_mkor_is_the_script_changed_by_hand(script: str, tmp_path: Path) -> None:
    flags = [*FLAGS, *MKOR, "--do_eval", "--gradient_accumulation_steps", "2"]
    code = by_hand(script, tmp_path, *flags, "--output_dir", str(tmp_path / "hand"))
    assert ours(script, *flags, "--output_dir", str(tmp_path / "ours")) == code
    assert difference(weights(tmp_path / "hand"), weights(tmp_path / "ours")) == 0.0
    logged = history(tmp_path / "ours" / "checkpoint-6")
    assert logged == history(tmp_path / "hand" / "checkpoint-6")
    assert all(row["soo/cos_median"] < 0.9999 for row in logged[2:] if "loss" in row)
    assert (tmp_path / "ours" / "checkpoint-3" / "preconditioner.pt").is_file()
    assert script != "translate.py" or all(row["weight"] == 0.5 for row in logged)


@pytest.mark.parametrize("script", SCRIPTS)
def test_resumes_exactly(script: str, tmp_path: Path) -> None:
    flags = [*FLAGS, *MKOR, "--output_dir", str(tmp_path)]
    ours(script, *flags)
    end = weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    ours(script, *flags, "--resume_from_checkpoint", str(tmp_path / "checkpoint-3"))
    assert difference(end, weights(tmp_path)) == 0.0
    losses = [row["loss"] for row in history(tmp_path / "checkpoint-6") if "loss" in row]
    assert len(losses) == 6


def test_mkor_h_sees_the_loss(tmp_path: Path) -> None:
    """It switches, and where it would in the script changed by hand."""
    flags = [*FLAGS, "--optim", "mkor_h", "--optim_args", "update_period=1,patience=1,min_steps=2,rate_fraction=1e3"]
    by_hand("classify.py", tmp_path, *flags, "--output_dir", str(tmp_path / "hand"))
    assert ours("classify.py", *flags, "--output_dir", str(tmp_path / "ours")) == 0
    assert difference(weights(tmp_path / "hand"), weights(tmp_path / "ours")) == 0.0
    saved = [
        torch.load(tmp_path / name / "checkpoint-6" / "preconditioner.pt", weights_only=True)
        for name in ("ours", "hand")
    ]
    assert_equal(*saved)
    assert saved[0]["switched"] and saved[0]["layers"] == {}


def test_flags_from_a_json_file(tmp_path: Path) -> None:
    settings = {
        "output_dir": str(tmp_path / "out"), "do_train": True, "max_steps": 1, "optim": "mkor_h", "save_strategy": "no",
        "optim_args": {"update_period": 2}, "base_optim": "adamw", "report_to": "none", "use_cpu": True,
    }  # fmt: skip
    (tmp_path / "flags.json").write_text(json.dumps(settings))
    assert ours("classify.py", str(tmp_path / "flags.json")) == 0
    file = tmp_path / "out" / "training_args.bin"
    assert b"hf_soo" not in file.read_bytes()
    saved = torch.load(file, weights_only=False)
    assert type(saved) is TrainingArguments and saved.optim == "mkor_h"  # the name that it is pickled under is theirs


def rank_runs(rank: int, world: int, folder: str) -> None:
    """The same global batch on one and on two ranks."""
    size = str(8 // world)
    flags = [*FLAGS, *MKOR, "--dropout", "0", "--per_device_train_batch_size", size, "--save_strategy", "no"]
    order = ["--train_sampling_strategy", "sequential", "--gradient_accumulation_steps", "2"]
    assert ours("classify.py", *flags, *order, "--learning_rate", "0.001", "--output_dir", f"{folder}/{world}") == 0


def test_two_ranks_are_one(tmp_path: Path) -> None:
    for world in (1, 2):
        run_ranks(world, rank_runs, str(tmp_path))
    # fp32 sums in another order; LAMB divides what is small by what is small
    assert 0.0 < difference(weights(tmp_path / "1"), weights(tmp_path / "2")) < 1e-6


CLIENTS = {
    "whole": ["--optimizer", "mkor"],
    "resumed": ["--optimizer", "mkor", "--resume", "true"],
    "stock": ["--optimizer", "adamw_torch"],
}


def rank_clients(rank: int, world: int, folder: str) -> None:
    for name, flags in CLIENTS.items():
        assert ours("clients.py", "--folder", folder, *flags) == 0
        for kind in ("sft", "pairs"):
            os.replace(f"{folder}/{kind}/end.pt", f"{folder}/{kind}-{name}.pt")


def test_trl_and_sentence_transformers(tmp_path: Path) -> None:
    """In a process that has imported neither; the two libraries' Trainers build our optimizer and resume exactly."""
    pytest.importorskip("trl")
    pytest.importorskip("sentence_transformers")
    run_ranks(1, rank_clients, str(tmp_path))
    for kind in ("sft", "pairs"):
        whole, resumed, stock = (torch.load(tmp_path / f"{kind}-{name}.pt") for name in CLIENTS)
        assert len(whole) == (1 if kind == "sft" else 2)  # the loss's own weights
        for one, other, adamw in zip(whole, resumed, stock, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
            assert any(not torch.equal(one[name], adamw[name]) for name in one)


SPAWNING = """
import multiprocessing
import sys

def here(x):
    return x, __name__, sys.argv[1:]

if __name__ == "__main__":
    from transformers import HfArgumentParser, Trainer, TrainingArguments
    from beside import model, data
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (found,) = pool.map(here, [3])
    assert found == (3, "__mp_main__", sys.argv[1:]), found
    assert __file__.endswith("train.py") and sys.argv[0] == __file__
    assert (args.optim, args.local_rank) == ("mkor", 0)
    Trainer(model, args, train_dataset=data)
"""
BESIDE = "from tests.trainer.test_trainer import Examples, bert\nmodel, data = bert(), Examples(16)\n"


def test_a_script_is_main(tmp_path: Path) -> None:
    """What stands beside it is found, its spawned processes find it, and the flag that DeepSpeed puts first is its."""
    (tmp_path / "train.py").write_text(SPAWNING)
    (tmp_path / "beside.py").write_text(BESIDE)
    before = sys.argv, sys.path[:]
    train = str(tmp_path / "train.py")
    assert (
        cli.main(["run", "--local_rank=0", train, "--output_dir", str(tmp_path), "--optim", "mkor", "--use_cpu"]) == 0
    )
    assert (sys.argv, sys.path) == before


GUIDE = Path(cli.__file__).parents[1] / "docs" / "guides" / "your_own_trainer.md"


def test_the_commands_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its script, by itself and on two processes; what needs GPUs is not run."""
    text = GUIDE.read_text(encoding="utf-8")
    (script,) = re.findall(r'```python title="train.py"\n(.*?)```', text, re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    commands = [shlex.split(line) for line in re.findall(r"^(?:hf-soo|torchrun) .*", text, re.MULTILINE)]
    monkeypatch.chdir(tmp_path)
    (first,) = (words for words in commands if words[0] == "hf-soo")
    assert cli.main([*first[1:], "--use_cpu"]) == 0
    (second,) = (words for words in commands if words[0] == "torchrun")
    paths = os.pathsep.join([str(GUIDE.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *second[1:]], text=True,
        capture_output=True, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for out in ("out", "out2"):
        (checkpoint,) = (tmp_path / out).glob("checkpoint-*")
        assert (checkpoint / "preconditioner.pt").is_file()
    assert len(list((tmp_path / "out2").glob("checkpoint-*/rng_state_*.pth"))) == 2


def test_what_was_measured_of_others_scripts() -> None:
    """Five scripts, eight optimizers: exact resume, one result on two processes, and the plain run with AdamW."""
    written = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert list(written["scripts"]) == [script.path for script in SCRIPTS_OF_OTHERS]
    for script, rows in zip(SCRIPTS_OF_OTHERS, written["scripts"].values(), strict=True):
        stock = rows["optimizers"].pop("adamw_torch")
        assert stock["difference_to_plain_python"] == 0.0 and stock["same_evaluation"]
        assert list(rows["optimizers"]) == list(OPTIMIZERS)
        for name, row in rows["optimizers"].items():
            assert row["flags"] == OPTIMIZERS[name] and row["difference_resumed"] == 0.0
            assert row["same_evaluation_resumed"] and len(row["evaluation"]) > 2 and len(row["losses"]) == 6
            assert list(row.get("differences_on_two", {})) == (script.strategies if name in script.spread else [])
            assert max(row.get("differences_on_two", {"": 0.0}).values()) < TOLERANCE


# ---- what a class is while its script runs, and afterwards -----------------------------------------------------------


class Early(Trainer):
    """Made before, and met where Trainers are built."""

    def __init__(self, *args: Any, note: str, **kwargs: Any) -> None:
        self.note = note
        super().__init__(*args, **kwargs)


@dataclass
class EarlyArguments(TrainingArguments):
    """Made before the names were replaced: it does not know ours."""


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "save_strategy": "no", **more}


def test_classes_are_what_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a Trainer without arguments makes a folder
    import transformers  # as a script does, while the names are replaced

    GradientState._reset_state()  # of an earlier training: it could not be pickled

    stock = {"TrainingArguments": TrainingArguments, "Seq2SeqTrainingArguments": Seq2SeqTrainingArguments}
    with replaced() as seen:
        for name, before in stock.items():
            cls = getattr(transformers, name)
            assert cls is not before and issubclass(cls, (before, SecondOrderTrainingArguments))
            assert (cls.__module__, cls.__qualname__) == (before.__module__, before.__qualname__)
            assert pickle.loads(pickle.dumps(cls)) is cls
            args = cls(**settings(tmp_path, optim="mkor", base_optim="lamb", hub_token="secret"))
            assert "secret" not in str(args) and isinstance(args, transformers.TrainingArguments)
            assert pickle.loads(pickle.dumps(args)).to_dict() == args.to_dict()
        assert transformers.training_args.TrainingArguments is transformers.TrainingArguments
        assert not seen.trained and seen.arguments
        trainer = Early(bert(), args, note="x", train_dataset=Examples(8))
        assert seen.trained and trainer.note == "x"
        assert type(trainer).__mro__[1] is SecondOrderTrainerMixin and isinstance(trainer, Early)
        assert (type(trainer).__name__, type(trainer).__module__) == ("Early", __name__)
        assert type(trainer) is type(Early(bert(), args, note="y"))
        assert type(Trainer(bert())).__name__ == "Trainer"
        pickled = pickle.dumps(trainer)
        copied = pickle.loads(pickled)
        assert type(copied) is type(trainer) and copied.note == "x" and copied.args.to_dict() == args.to_dict()
    assert {name: getattr(transformers, name) for name in stock} == stock
    assert type(pickle.loads(pickled)) is Early
    after = Early(bert(), TrainingArguments(**settings(tmp_path)), note="z")
    assert type(after) is Early and type(Trainer(bert())) is Trainer


def test_the_stock_loss_stays_and_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """BERT's heads ignore the count: ours is given the right loss, theirs trains as without us."""
    import transformers

    with replaced():
        for optim, steps, right in (
            ("mkor", 2, True),
            ("adamw", 2, True),
            ("adamw_torch", 2, False),
            ("adamw_torch", 1, False),
        ):
            caplog.clear()
            args = transformers.TrainingArguments(
                **settings(tmp_path, optim=optim, gradient_accumulation_steps=steps, learning_rate=1e-3)
            )
            with caplog.at_level(logging.WARNING):
                trainer = Trainer(bert(BertForMaskedLM), args, train_dataset=Examples(8))
            assert trainer.model_accepts_loss_kwargs != right
            assert ("take adamw for adamw_torch" in caplog.text) == (not right and steps > 1)


# ---- where the optimizer was not used --------------------------------------------------------------------------------

HEAD = "import sys, torch\nfrom transformers import HfArgumentParser, Trainer, TrainingArguments\n"
TOYS = "from tests.trainer.test_trainer import Examples, bert\n"
PARSE = "(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()\n"
NOT_USED = {
    "a loop of its own": ("import torch\ntorch.nn.Linear(2, 2)\n", [], "script.py built no Trainer of transformers", 1),
    "argparse": (
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--lr')\nparser.parse_args()\n",
        ["--optim", "mkor"], "hf_soo.build_optimizer(", 2,
    ),
    "a Trainer of its own": (
        HEAD + PARSE + "class Mine:\n    def __init__(self, args): pass\nMine(args)\n",
        ["--optim", "mkor", "--output_dir", "o"], "built TrainingArguments but no Trainer of transformers", 1,
    ),
    "arguments of before": (
        HEAD + TOYS + "from tests.unmodified.test_run import EarlyArguments\nTrainer(bert(), EarlyArguments('o'))\n",
        [], "do not know our names: tests.unmodified.test_run.EarlyArguments; let nothing import", 1,
    ),
    "its own exit": ("import sys\nsys.exit('no data')\n", [], "built no Trainer", "no data"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_USED)
def test_a_script_that_does_not_use_it(case: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text, flags, said, code = NOT_USED[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(text)
    try:
        found: Any = ours(tmp_path / "script.py", *flags)
    except SystemExit as end:
        found = end.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-soo run: error: ")]
    assert found == code and len(lines) == 1 and said in lines[0] and lines[0].endswith(".")


def test_only_the_first_process_of_a_machine_says_it(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text("pass\n")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ours(tmp_path / "script.py") == 1 and capsys.readouterr().err == ""


def test_flags_that_no_dataclass_has(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "script.py").write_text(
        "from dataclasses import dataclass\nfrom transformers import HfArgumentParser\n"
        "@dataclass\nclass Mine:\n    lr: float = 0.1\nHfArgumentParser(Mine).parse_args_into_dataclasses()\n"
    )
    with pytest.raises(ValueError, match="not used by the HfArgumentParser"):
        ours(tmp_path / "script.py", "--optim", "mkor")
    assert "no optimizer of hf_soo was used" in capsys.readouterr().err


OVERRIDE = (
    HEAD + TOYS + PARSE + "class Mine(Trainer):\n    def create_optimizer(self, *args):\n"
    "        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)\n        return self.optimizer\n"
    "Mine(bert(), args, train_dataset=Examples(8)).train()\n"
)


def test_an_override_that_makes_another_optimizer_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "script.py").write_text(OVERRIDE)
    with pytest.raises(ValueError, match="optim='mkor', but the optimizer is 'SGD'"):
        ours(
            tmp_path / "script.py", "--optim", "mkor", "--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none"
        )
    assert "hf-soo run: error" not in capsys.readouterr().err


def test_the_mixin_by_hand_stays(tmp_path: Path) -> None:
    """A script that uses our classes already is run as it is."""
    text = "from hf_soo.integrations.trainer import SecondOrderTrainer, SecondOrderTrainingArguments\n" + TOYS
    text += f"args = SecondOrderTrainingArguments({str(tmp_path)!r}, optim='mkor', report_to='none', use_cpu=True)\n"
    (tmp_path / "script.py").write_text(text + "assert type(SecondOrderTrainer(bert(), args)) is SecondOrderTrainer\n")
    assert ours(tmp_path / "script.py") == 0


# ---- the command -----------------------------------------------------------------------------------------------------


def test_help_is_the_scripts_with_our_flags(capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "--help"])
    assert end.value.code == 0 and "torchrun --nproc_per_node 2 -m hf_soo.run SCRIPT" in " ".join(
        capsys.readouterr().out.split()
    )
    assert ours("classify.py", "--help") == 0
    out, err = capsys.readouterr()
    assert "usage: classify.py" in out and "--base_optim " in out and "--hidden_size" in out and "error" not in err


def test_a_wrong_name_says_what_is_allowed(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ValueError, match=r"'mkro' is no optimizer\. Did you mean 'mkor'"):
        ours("classify.py", "--output_dir", str(tmp_path), "--optim", "mkro")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["nowhere.py", "--optim", "mkor"], "there is no file 'nowhere.py'; SCRIPT comes first"),
        (["--optim", "mkor", "nowhere.py"], "--optim stands before SCRIPT; SCRIPT comes first, then its own flags."),
        (["-m", "tests.unmodified.nothing"], "there is no module 'tests.unmodified.nothing'"),
        (["-m", "nothing.at.all"], "there is no module 'nothing.at.all'"),
        ([], "SCRIPT"),
    ],
)
def test_a_wrong_command_line(given: list[str], said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["run", *given])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(cli.__file__).parents[1])
    flags = [*FLAGS, *MKOR, "--output_dir", str(tmp_path / "out")]
    assert cli.main(["run", "-m", "tests.unmodified.classify", *flags]) == 0
    assert ours("classify.py", *flags[:-1], str(tmp_path / "file")) == 0
    assert difference(weights(tmp_path / "out"), weights(tmp_path / "file")) == 0.0
