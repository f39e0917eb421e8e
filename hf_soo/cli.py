"""The command ``hf-soo``: what there is, what a run would cost, the runs themselves, and tables of them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import torch
from torch import Tensor, nn

from hf_soo.engine.checks import unknown_key
from hf_soo.engine.preconditioner import Method
from hf_soo.optimizers.bases import BASES
from hf_soo.outputs import file_to_write
from hf_soo.registry import METHODS

# Command -> the module whose main() it is, which a script calls as well, and a line about it. None is imported before
# its command is given: they need transformers, which takes seconds.
RUNS = {
    "prepare": ("hf_soo.bert.data.command", "text -> sequences for BERT pretraining"),
    "pretrain": ("hf_soo.domains", "pretrain BERT, or a language model over bytes"),
    "glue": ("hf_soo.glue.command", "fine-tune on GLUE"),
    "squad": ("hf_soo.squad.command", "fine-tune on SQuAD, or score a file of predictions"),
    "vision": ("hf_soo.vision.command", "classify images"),
    "run": ("hf_soo.run", "a script of yours that trains with transformers' Trainer, as it is"),
    "bench": ("hf_soo.bench.command", "time optimizers against AdamW"),
    "search": ("hf_soo.search.command", "search over the settings of optimizers, trial by trial"),
    "reproduce": ("hf_soo.reproduce.command", "the table of the MKOR paper, from raw text to SQuAD and GLUE"),
}

_TEXTS = ("list", "doctor", "plan", "report", "recipes")  # the other commands: what they say is a text

# Kind of a folder's JSONs -> the module whose text_of(FOLDER) is their table. If it has them, figures(FOLDER, TITLE)
# are pictures of all together, parts(FOLDER) the runs that can be compared, by title. Of several kinds, the first.
REPORTS = {"search": "hf_soo.search.comparison", "bench": "hf_soo.bench.report", "glue": "hf_soo.glue.table"}
_Pictures = tuple[Callable[[str], list[Any]], Callable[[], dict[str, list[Any]]]]  # both, of one folder

EXAMPLES = {
    "train with your own Trainer script, as it is": "hf-soo run train.py --optim mkor --learning_rate 4e-3",
    "train a small BERT with MKOR and with LAMB, on the text that comes with Python": (
        "hf-soo pretrain --config smoke/mkor --compare_with lamb --compare_learning_rate 0.007"
    ),
    "fine-tune on GLUE (or squad, vision)": "hf-soo glue --config minilm_mkor --data_dir glue",
    "see what a run would need on other hardware": "hf-soo plan --model bert-large-uncased --optim mkor --gpus 64",
    "search for settings": "hf-soo search muon --workload byte_gpt --dry_run",
    "make tables and pictures of runs": "hf-soo report out/smoke/runs --picture curves.png",
}
"""What one can do -> a line that does it: all that ``hf-soo`` says by itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0, or 1 after one line on stderr for bad input, 130 after Ctrl-C (argparse exits with 2).

    Args:
        arguments: the command line without the program's name; None: that of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in RUNS:
        code: int = importlib.import_module(RUNS[given[0]][0]).main(given[1:])
        return code
    if not given:
        sys.stdout.write(_overview())
        return 0
    parser = _parser(given[:1])
    if given and not given[0].startswith("-") and given[0] not in (known := (*_TEXTS, *RUNS)):
        parser.error(unknown_key("command", given[0], known))
    options = parser.parse_args(given)
    try:
        text = options.run(options)
    except (ValueError, OSError, NotImplementedError) as error:
        sys.stderr.write(f"hf-soo: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("hf-soo: stopped\n")
        return 130
    sys.stdout.write(text)
    return 0


class _Parser(argparse.ArgumentParser):
    """One line for an error, and no page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message.rstrip('.')}; --help says more.\n")


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the commands that are no runs; what a plan is asked is read only where it is given."""
    parser = _Parser(
        prog="hf-soo",
        description="Second-order optimizers for Hugging Face Transformers.",
        epilog="hf-soo COMMAND --help lists a command's flags.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    listing = commands.add_parser("list", help="the optimizers, each with its base, its statistics and its memory")
    listing.set_defaults(run=_list)
    _add_doctor(commands)
    report = commands.add_parser(
        "report",
        help="table, picture and page of a folder of run JSONs",
        description="Print the markdown table of the best run of every method in FOLDER (best learning rate by final "
        "evaluation loss), or of a search's trials the comparison over seeds and rates, and of a folder of all "
        "workloads' trials that of all; on request write it to a file, into a README, draw the curves, and make a page "
        "of all there is.",
    )
    _add_report(report)
    _add_recipes(commands)
    plan = commands.add_parser(
        "plan",
        help="memory, communication, FLOPs and predicted step time of a run on other hardware",
        description="Say what each rank of a data-parallel run would hold, send and compute, for a method and those "
        "beside it; the step time is a prediction from a hardware profile. With --dry-run count the bytes.",
    )
    if "plan" in given:
        _add_plan(plan)
    for name, (_, text) in RUNS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _add_doctor(commands: argparse._SubParsersAction[_Parser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="what works on this machine",
        description="Try strategies, precisions and locks by a small step each, in this folder; name what is missing.",
    )
    doctor.add_argument("--json", metavar="FILE", help="write the report to this file too, for a bug report")
    doctor.set_defaults(run=_doctor)


def _add_recipes(commands: argparse._SubParsersAction[_Parser]) -> None:
    recipes = commands.add_parser(
        "recipes",
        help="the recipes that come with it, for --config",
        description="List the recipes by name: what each trains, what is published for it, and what was reproduced; "
        "or one folder of them (pretrain, glue, search, accelerate, ...). With a recipe's NAME print it.",
    )
    recipes.add_argument("name", nargs="?", metavar="NAME", help="a recipe, or a folder of them")
    recipes.add_argument("--path", action="store_true", help="print where it lies, for accelerate's --config_file")
    recipes.add_argument("--copy", metavar="FOLDER", help="copy them all to a new folder, configs for example")
    recipes.set_defaults(run=_recipes)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="the folder that holds the run JSONs")
    parser.add_argument("--table", metavar="FILE.md", help="write the table to this file")
    parser.add_argument(
        "--picture",
        metavar="FILE.png",
        help="draw evaluation loss over steps and over seconds, scores, or the cost of benchmarks",
    )
    parser.add_argument(
        "--html",
        metavar="FILE.html",
        help="write one page that loads nothing: tables, curves, health of the layers, routing, settings that differ",
    )
    parser.add_argument("--title", default="", help="title of the picture and of the page")
    parser.add_argument(
        "--readme",
        metavar="FILE.md",
        help="put the table between <!-- results:NAME --> and <!-- /results -->; NAME is the folder's name",
    )
    parser.set_defaults(run=_report)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    """A flag for each field; --dry-run and --dry_run are the same."""
    from hf_soo.plan.request import PlanConfig

    hints = get_type_hints(PlanConfig)
    for field in dataclasses.fields(PlanConfig):
        names = [f"--{field.name}", *({f"--{field.name.replace('_', '-')}"} - {f"--{field.name}"})]
        text = field.metadata["help"].replace("%", "%%")
        if hints[field.name] is bool:
            parser.add_argument(*names, action="store_true", help=text)
            continue
        first = next(iter(get_args(hints[field.name])), hints[field.name])
        kind = str if isinstance(first, str) else first  # of a Literal
        shown = "" if field.default is None else f" (default: {field.default or repr('')})"
        parser.add_argument(*names, type=kind, default=field.default, metavar=kind.__name__.upper(), help=text + shown)
    parser.set_defaults(run=_plan)


def _overview() -> str:
    """What one can do, each with an example; it fits on a screen."""
    lines = (f"  {what}\n    {command}\n" for what, command in EXAMPLES.items())
    return (
        "Second-order optimizers for Hugging Face Transformers. What to do with them:\n\n" + "".join(lines) + "\n"
        "hf-soo list names the optimizers, hf-soo recipes the settings for --config, hf-soo doctor tries what\n"
        "works on this machine, hf-soo --help lists the commands, and hf-soo COMMAND --help the flags of one.\n"
    )


def _doctor(options: argparse.Namespace) -> str:
    from hf_soo import doctor
    from hf_soo.files import write_atomically

    file = file_to_write("--json", options.json) if options.json else None
    report = doctor.examine(Path.cwd())
    if file:
        write_atomically(file, json.dumps(report, indent=1) + "\n")
    return doctor.text(report)


def _list(options: argparse.Namespace) -> str:
    rows = [("name", "default base", "needs", "state B/param", "what it is")]
    for name, method in METHODS.items():
        base = "" if method.base == name else method.base
        rows.append((name, base, *_needs_and_memory(method), method.title))
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    lines = ([*(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]] for row in rows)
    return "".join("  ".join(line) + "\n" for line in lines)


def _needs_and_memory(method: Method) -> tuple[str, str]:
    """What it learns from, and its bytes for a parameter of a Linear(1024, 1024) in fp32, with its base's state."""
    of_base = BASES[method.base].state_bytes
    if method.config is None:
        return "nothing", f"{of_base:.1f}"
    preconditioner = method.make(method.config())
    recorder = preconditioner.recorder
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1024, 1024))
    tensors: list[Tensor] = []
    for layer in method.select(model, None, None, preconditioner.skip_reason).layers:
        tensors += [tensor for factor in preconditioner.init(layer).values() for tensor in factor.values()]
        if recorder.hooks and not recorder.transient:  # what a window is summed in stays, too
            tensors += recorder.allocate(layer)
    own = sum(tensor.nbytes for tensor in tensors) / sum(p.numel() for p in model.parameters())
    return recorder.needs, f"{own + of_base:.1f}"


def _plan(options: argparse.Namespace) -> str:
    from hf_soo.plan import command
    from hf_soo.plan.request import PlanConfig

    config = PlanConfig(**{field.name: getattr(options, field.name) for field in dataclasses.fields(PlanConfig)})
    return command.text(command.run(config))


def _recipes(options: argparse.Namespace) -> str:
    from hf_soo.runs import shipped

    if options.copy:
        return shipped.copy(options.copy)
    place = shipped.folder() / (options.name or "")
    if text := shipped.listing(place):
        return f"{place}\n" if options.path else text
    (file,) = shipped.find([options.name])
    return f"{file}\n" if options.path else file.read_text(encoding="utf-8")


def _report(options: argparse.Namespace) -> str:
    from hf_soo.files import write_atomically
    from hf_soo.runs import report

    (figures, parts), text = report_of(options.folder)
    table, picture, html = (
        given and file_to_write(f"--{name}", given)
        for name, given in (("table", options.table), ("picture", options.picture), ("html", options.html))
    )
    if table:
        write_atomically(table, text)
    if options.readme:
        report.update_readme(options.readme, Path(options.folder).resolve().name, text)
    if picture:
        curves = (report.figure(runs, options.title, free=None) for runs in parts().values())
        figure = next(itertools.chain(figures(options.title), curves), None)
        if figure is None:
            raise ValueError(f"--picture: {options.folder} holds nothing that can be drawn; leave it out.")
        report.save(figure, picture)
    if html:
        from hf_soo.runs.page import page

        title = options.title or f"Report of {Path(options.folder).resolve().name}"
        write_atomically(html, page(title, text, figures(""), parts()))
    return text


def report_of(folder: str | Path) -> tuple[_Pictures, str]:
    """What can be drawn of a folder, and its table.

    Args:
        folder: of run JSONs of one workload, or of trials of a search (or of folders of them, one a workload), of
            runs on GLUE, or of JSONs of ``hf-soo bench``; or OUTPUT/results of ``hf-soo reproduce``.

    Raises:
        ValueError: nothing of these is there, or runs of different workloads.
    """
    from hf_soo.reproduce import table as reproduce_table
    from hf_soo.runs import record, report

    folder = Path(folder)
    if (folder / reproduce_table.PHASE_2_FOLDER).is_dir():
        return _read_by(reproduce_table, folder)
    damaged: record.Damaged = {}
    inside = (record.read_documents(each, {}) for each in record.folders_of(folder) if each != folder)
    if any(record.kind_of(document) == "search" for documents in inside for document in documents.values()):
        return _read_by(importlib.import_module(REPORTS["search"]), folder)
    records = record.read_runs(folder, damaged)
    kinds = {"search" if run.search else run.kind for run in records}
    if not records:  # of the others, benchmarks have a table
        kinds = {record.kind_of(document) for document in record.read_documents(folder, {}).values()} & {"bench"}
    for kind, name in REPORTS.items():
        if kind in kinds:
            return _read_by(importlib.import_module(name), folder)
    if not records:
        raise ValueError(": ".join(map(str, next(iter(damaged.items())))))
    return (lambda title: [], lambda: {"": records}), report.table(records) + record.passed_over(damaged)


def _read_by(module: Any, folder: Path) -> tuple[_Pictures, str]:
    figures: Callable[..., list[Any]] = getattr(module, "figures", lambda folder, title: [])
    parts: Callable[..., dict[str, list[Any]]] = getattr(module, "parts", lambda folder: {})
    return (partial(figures, folder), partial(parts, folder)), module.text_of(folder)


if __name__ == "__main__":
    sys.exit(main())
