"""The table of the MKOR paper, at a chosen scale: phase 1 once, phase 2 by each optimizer, SQuAD and GLUE after each.

    prepare_phase1, prepare_phase2    raw text -> sequences of 128 and of 512 tokens
    phase1                            LAMB
    phase2_NAME                       from phase 1's weights and moments, by bert_SCALE_phase2.yaml and NAME.yaml
    squad_NAME, glue_NAME             fine-tuned by AdamW, the same for all: what is compared is the pretraining

Every stage is one of hf-soo's commands with flags, which --dry_run prints. OUTPUT/results has the run JSONs, the
table and the pictures. A pipeline that was stopped, in whatever way, goes on where it was when it is started again.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from hf_soo.bert.data.wordpiece import read_vocabulary
from hf_soo.engine.checks import Checked, Count, Seed
from hf_soo.glue.data import GlueDataArguments, load_part
from hf_soo.glue.tasks import find_tasks
from hf_soo.outputs import folder_to_write
from hf_soo.reproduce import table as reproduce_table
from hf_soo.reproduce.pipeline import Pipeline, Stage
from hf_soo.runs import arguments
from hf_soo.runs.arguments import option
from hf_soo.runs.recipes import optimizer_names
from hf_soo.runs.script import guarded
from hf_soo.runs.shipped import find
from hf_soo.squad.files import QuestionSet
from hf_soo.text.corpus import Corpus

COMMAND = ("-m", "hf_soo.cli")
PHASE_1 = "lamb"


@dataclass
class ReproduceArguments(Checked):
    """What is reproduced, from which data."""

    _argument_group_name = "reproduce"

    scale: Literal["mini", "small", "base", "large"] = option(
        "mini", "mini: 2 CPU cores, two to three hours; small, base: one GPU; large: the paper's."
    )
    text: str = option("wikimedia/wikipedia:20231101.en", "Corpus: what `hf-soo prepare` takes as --source.")
    vocab: str | None = option(None, "WordPiece vocabulary, one piece a line; None: trained on the corpus.")
    squad_train: str | None = option(None, "SQuAD's train JSON; None: from the hub.")
    squad_dev: str | None = option(None, "SQuAD's dev JSON; None: from the hub.")
    glue_dir: str | None = option(None, "Folder of GLUE's folders; None: from the hub.")
    optimizers: list[str] = field(
        default_factory=lambda: ["lamb", "mkor", "mkor_muon", "mkor_h", "eva", "kaisa"],
        metadata={"help": "Of phase 2, by the names of its configs."},
    )
    glue_tasks: list[str] = field(
        default_factory=lambda: ["rte", "mrpc", "stsb", "cola"], metadata={"help": "Tasks of GLUE, or all."}
    )
    seeds: list[Seed] = field(
        default_factory=lambda: [0], metadata={"help": "Of the fine-tuning on GLUE; the table has medians."}
    )
    configs: str | None = option(None, "Folder of the recipes; None: those of `hf-soo recipes`.")
    output: str | None = option(None, "Folder for everything; None: out/reproduce_SCALE.")
    num_proc: Count = option(1, "Processes that prepare the text.")
    jobs: Count = option(1, "Stages that run at once; on CPUs they share the cores.")
    launch: str = option("accelerate launch", "How training is started, with a --config_file for example.")
    dry_run: bool = option(False, "Print the commands and run nothing.")

    def __post_init__(self) -> None:
        """Refuse what would fail later.

        Raises:
            ValueError: a count below 1, an unknown optimizer, one SQuAD file of two, or a missing file.
        """
        super().__post_init__()
        if (self.squad_train is None) != (self.squad_dev is None):
            raise ValueError(
                f"squad_train={self.squad_train!r} and squad_dev={self.squad_dev!r}; give both or neither."
            )
        for name in ("vocab", "squad_train", "squad_dev", "glue_dir", "configs"):
            value = getattr(self, name)
            if value is not None and not Path(value).exists():
                raise ValueError(f"{name}={value!r} does not exist; give an existing path.")
        known = optimizer_names(find(self.recipe("pretrain", "phase2"))[0])
        for name in self.optimizers:
            if name not in known:
                raise ValueError(f"optimizers has {name!r}; allowed are {', '.join(known)}.")

    def recipe(self, kind: str, workload: str, *optimizer: str) -> tuple[Path, ...]:
        """A recipe of this scale: paths, or where ``configs`` is None names, which any installation finds.

        Args:
            kind: folder under ``configs``.
            workload: name of its file after "bert_SCALE_".
            optimizer: the name of its file.
        """
        names = (f"bert_{self.scale}_{workload}", *optimizer)
        return tuple(Path(self.configs or "configs") / kind / f"{name}.yaml" for name in names)

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.output or f"out/reproduce_{self.scale}")


def _stages(of: ReproduceArguments) -> list[Stage]:
    """All stages, each after those that it needs."""
    data, results = of.folder / "data", of.folder / "results"
    vocab = (of.vocab,) if of.vocab is not None else ()
    found = [_prepare(of, 1, vocab), _prepare(of, 2, (str(data / "phase1" / "vocab.txt"),))]
    phase_1 = _pretrain(of, 1, PHASE_1, ("prepare_phase1", "prepare_phase2"))
    found.append(dataclasses.replace(phase_1, alone=True))
    for name in of.optimizers:
        found.append(_pretrain(of, 2, name, ("phase1",)))
    for name in of.optimizers:
        model = ("--model_name_or_path", str(of.folder / f"phase2_{name}"))
        files = ("--train_file", of.squad_train, "--validation_file", of.squad_dev)
        squad = (
            *model,
            *(files if of.squad_train else ("--dataset_name", "squad")),
            "--name",
            name,
            "--results_dir",
            results / "squad",
        )
        need = (f"phase2_{name}",)
        found.append(_script(of, f"squad_{name}", "squad", of.recipe("squad", "adamw"), squad, need))
        local = ("--data_dir", of.glue_dir) if of.glue_dir else ()
        tasks = ("--task_name", *of.glue_tasks, "--seeds", *of.seeds)
        glue = (*model, *local, *tasks, "--results_dir", results / "glue" / name)
        found.append(_script(of, f"glue_{name}", "glue", of.recipe("glue", "adamw"), glue, need))
    return found


def _prepare(of: ReproduceArguments, phase: int, vocab: tuple[str, ...]) -> Stage:
    output = of.folder / "data" / f"phase{phase}"
    lengths = {1: ("128", "0.1"), 2: ("512", "0")}[phase]
    flags = ("--max_seq_length", lengths[0], "--short_seq_prob", lengths[1], "--eval_documents", "0.01")
    given = tuple(item for file in vocab for item in ("--vocab", file))
    command = (sys.executable, *COMMAND, "prepare", "--source", of.text, "--output", output)
    needs = ("prepare_phase1",) if phase == 2 else ()  # its vocabulary
    how = ("--num_proc", str(of.num_proc))
    everything = tuple(map(str, (*command, *flags, *given)))
    return Stage(f"prepare_phase{phase}", everything, needs, output / "manifest.json", how=how)


def _pretrain(of: ReproduceArguments, phase: int, name: str, needs: tuple[str, ...]) -> Stage:
    stage = "phase1" if phase == 1 else f"phase2_{name}"
    before = ("--previous_phase", of.folder / "phase1") if phase == 2 else ()
    places = (
        "--data_dir",
        of.folder / "data" / f"phase{phase}",
        "--results_dir",
        of.folder / "results" / f"phase{phase}",
    )
    configs = of.recipe("pretrain", f"phase{phase}", name)
    return _script(of, stage, "pretrain", configs, (*places, *before, "--name", name), needs)


def _script(
    of: ReproduceArguments,
    stage: str,
    name: str,
    configs: tuple[Path, ...],
    flags: tuple[object, ...],
    needs: tuple[str, ...],
) -> Stage:
    recipe = (item for file in configs for item in ("--config", file))
    command = (*shlex.split(of.launch), *COMMAND, name, *recipe, "--output_dir", of.folder / stage)
    return Stage(stage, tuple(map(str, (*command, *flags))), needs, configs=tuple(find(configs)))


def _check_inputs(of: ReproduceArguments) -> None:
    """Read what is here, as the stages will read it hours later; the hub's data sets are left to them.

    Raises:
        ValueError: a folder that cannot be written to, a file that is missing or malformed, a launcher or a library
            that is not installed, or a task that GLUE does not have.
    """
    folder_to_write("output", of.folder)
    launcher = shlex.split(of.launch)
    if not launcher or shutil.which(launcher[0]) is None:
        raise ValueError(
            f"launch={of.launch!r} names no program on the PATH; give 'python', 'torchrun ...' or the like."
        )
    if find_spec("matplotlib") is None:
        raise ValueError("The picture needs matplotlib and it is not installed; pip install 'hf-soo[report]'.")
    tasks = find_tasks(of.glue_tasks)
    if of.glue_dir is not None:
        data = GlueDataArguments(data_dir=of.glue_dir)
        for task in tasks:
            for part in ("train", *task.evaluation_parts):
                load_part(task, part, data)
    for file in (of.squad_train, of.squad_dev):
        if file is not None:
            QuestionSet.read(file)
    if of.vocab is not None:
        read_vocabulary(of.vocab)
    corpus = Corpus(of.text)
    if not corpus.on_hub:
        next(corpus.texts())


def _run(flags: list[str]) -> None:
    """Run the stages, and make the table of what is there.

    Raises:
        ValueError: settings that cannot be, or stages that failed.
    """
    (of,) = arguments.parse((ReproduceArguments,), flags, __doc__ or "", "reproduce")
    planned = _stages(of)
    if of.dry_run:
        print("\n".join(shlex.join(stage.whole) for stage in planned))
        return
    _check_inputs(of)
    # a launcher of several processes, one for each GPU, knows better
    cores = None if torch.cuda.is_available() else os.cpu_count()
    failed = Pipeline(planned, of.folder, jobs=of.jobs, cores=cores).run()
    print(reproduce_table.write(of.folder / "results", of.scale), end="")
    if failed:
        raise ValueError(f"{len(failed)} of {len(planned)} stages did not end well: {', '.join(failed)}.")


def main(flags: list[str] | None = None) -> int:
    """The command: 0 when every stage ended well, 1 after an error, 130 after Ctrl-C."""
    return guarded(_run, flags)
