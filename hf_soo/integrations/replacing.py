"""``hf-soo run SCRIPT [ARGS]``: a script of anybody's that trains with transformers' Trainer, as it is, with our flags.

A script needs two things for ``--optim mkor``: arguments that know the name, and a Trainer that builds the optimizer.
``replaced`` gives it both from outside, whatever the script is, so it need not be known here:

    TrainingArguments   in transformers' modules this name, and Seq2SeqTrainingArguments, stand for classes of the same
                        names that are SecondOrderTrainingArguments too. What is imported afterwards inherits from them:
                        SFTConfig, SentenceTransformerTrainingArguments, the script's own class.
    Trainer             keeps its name and its subclasses. What is built is an instance of its class with
                        SecondOrderTrainerMixin before it, before the overrides of the class, as in a class statement
                        by hand; so what the mixin checks of overrides holds here too.

Only this module changes names of another library. It does so for the process that asked, until its script has ended.
A run with one of transformers' own optimizers is bit for bit the run of the plain script.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_soo.integrations.arguments import SecondOrderTrainingArguments
from hf_soo.integrations.trainer import SecondOrderTrainerMixin


@dataclass
class _Seen:
    """What a script has built.

    Args:
        arguments: whether TrainingArguments that know our names.
        trained: whether a Trainer that was given such.
        others: the classes of arguments of Trainers that were given others.
        early: names of such in modules that were imported before the names were replaced.
    """

    arguments: bool = False
    trained: bool = False
    others: set[str] = field(default_factory=set)
    early: set[str] = field(default_factory=set)


@contextmanager
def replaced() -> Iterator[_Seen]:
    """While it lasts, the names stand for ours; what is built is noted in the object that it gives."""
    seen = _Seen()
    stand_ins = _arguments(seen)
    places = []
    for module, name, cls in _stock_arguments():
        if module.partition(".")[0] == "transformers":
            places.append((sys.modules[module], name, cls))
            setattr(sys.modules[module], name, stand_ins[cls])
        else:
            seen.early.add(f"{module}.{name}")
    Trainer.__new__ = _trainer_maker(seen)  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Trainer.__new__ = staticmethod(_new)  # type: ignore[method-assign]
        for place, name, cls in places:
            setattr(place, name, cls)


def _stock_arguments() -> Iterator[tuple[str, str, type]]:
    """(module, name, class) of the names, but for those of hf_soo, that stand for arguments that do not know ours."""
    for module, imported in list(sys.modules.items()):
        for name, value in list(getattr(imported, "__dict__", {}).items()):
            bases = value.__mro__ if issubclass(type(value), type) else ()
            stock = TrainingArguments in bases and SecondOrderTrainingArguments not in bases
            if stock and module.partition(".")[0] != "hf_soo":
                yield module, name, value


def _arguments(seen: _Seen) -> dict[type, type]:
    """Class of transformers -> the one that stands for it; both are pickled under one name."""

    @dataclass(repr=False)
    class Plain(SecondOrderTrainingArguments):
        __doc__, __repr__ = TrainingArguments.__doc__, TrainingArguments.__repr__

        def __post_init__(self) -> None:
            super().__post_init__()
            seen.arguments = True

        def __getstate__(self) -> dict[str, Any]:  # training_args.bin is read where hf_soo is not installed too
            return {name: value for name, value in vars(self).items() if not name.startswith("_parsed")}

    @dataclass(repr=False)
    class Seq2Seq(Seq2SeqTrainingArguments, Plain):
        __doc__, __repr__ = Seq2SeqTrainingArguments.__doc__, Seq2SeqTrainingArguments.__repr__

    return {
        stock: _named_as(stock, ours)
        for stock, ours in ((TrainingArguments, Plain), (Seq2SeqTrainingArguments, Seq2Seq))
    }


def _named_as(stock: type, ours: type) -> type:
    ours.__module__, ours.__name__, ours.__qualname__ = stock.__module__, stock.__name__, stock.__qualname__
    return ours


def _new(cls: type, *args: Any, **kwargs: Any) -> Any:
    """What Trainer had before; taken off again, object's would refuse the arguments."""
    return super(Trainer, cls).__new__(cls)  # type: ignore[misc]


def _remade(cls: Any) -> Any:
    """What pickle begins with: an instance of the class that stands in a module, or of the one that is made of it."""
    return cls.__new__(cls)


def _trainer_maker(seen: _Seen) -> staticmethod[..., Any]:
    """``Trainer.__new__`` that makes an instance of a class with the mixin before it."""

    @cache
    def mixed(cls: Any) -> Any:
        class Mixed(SecondOrderTrainerMixin, cls):  # type: ignore[misc]
            __doc__ = cls.__doc__
            corrects_stock_losses = False

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                _note(seen, self.args)

            def __reduce_ex__(self, protocol: Any) -> Any:  # by the name that stands in a module
                return _remade, (cls,), *super().__reduce_ex__(protocol)[2:]

        return _named_as(cls, Mixed)

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if issubclass(cls, SecondOrderTrainerMixin):  # by hand: what it is
            seen.trained = True
        else:
            cls = mixed(cls)
        return _new(cls)

    return staticmethod(new)


def _note(seen: _Seen, args: object) -> None:
    if isinstance(args, SecondOrderTrainingArguments):
        seen.trained = True
    else:
        seen.others.add(f"{type(args).__module__}.{type(args).__qualname__}")


# ---- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a script to its end; its exit code, or 1 where it has built no Trainer that knows our optimizers.

    Args:
        arguments: the script and its arguments; None: those of the process.

    Raises:
        SystemExit: the script's, with a text.
        ValueError: the script's.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].startswith(("--local_rank=", "--local-rank=")):  # DeepSpeed's launcher puts it first
        given = [*given[1:], given[0]]
    parser = _parser()
    if given and given[0].startswith("-") and given[0] not in ("-h", "--help", "-m"):
        parser.error(f"{given[0]} stands before SCRIPT; SCRIPT comes first, then its own flags.")
    options = parser.parse_args(given)
    script, module = options.script, options.module
    with _started_as(script, module, options.arguments), replaced() as seen:
        if module and not _is_module(script):
            parser.error(f"there is no module {script!r}; without -m SCRIPT is a file.")
        if not module and not Path(script).exists():
            parser.error(f"there is no file {script!r}; SCRIPT comes first, then its own flags.")
        try:
            if module:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(script, run_name="__main__")
            code: Any = 0
        except SystemExit as end:
            code = end.code or 0
        except ValueError:  # HfArgumentParser's of flags that it does not know
            if not seen.arguments:
                _say(script, seen)
            raise
    if not seen.trained and not (code == 0 and {"-h", "--help"} & set(options.arguments)):
        if code == 0 or not seen.arguments:
            _say(script, seen)
        code = code or 1
    if isinstance(code, int):
        return code
    raise SystemExit(code)  # a text, which Python prints


@contextmanager
def _started_as(script: str, module: bool, arguments: list[str]) -> Iterator[None]:
    """``sys.argv`` and ``sys.path`` as Python sets them for a script, or for ``-m`` a module."""
    argv, path = sys.argv, sys.path[:]
    sys.argv = [script, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # 3.11: python -P
        sys.path[0] = os.getcwd() if module else str(Path(script).resolve().parent)
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def _say(script: str, seen: _Seen) -> None:
    """One line: why our optimizers were not used, and what to change."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        return
    built = "TrainingArguments but no Trainer of transformers" if seen.arguments else "no Trainer of transformers"
    change = (
        "a loop of its own (as in the *_no_trainer scripts), or a Trainer that is not transformers', takes "
        'hf_soo.build_optimizer("mkor", model, lr=...) for the optimizer that it makes'
    )
    if seen.others:
        built = f"a Trainer with arguments that do not know our names: {', '.join(sorted(seen.others))}"
        change = "let the script import transformers' TrainingArguments, or what derives from it, itself"
    if seen.early:
        change = f"let nothing import {', '.join(sorted(seen.early)[:3])} before the script runs; otherwise {change}"
    sys.stderr.write(f"hf-soo run: error: no optimizer of hf_soo was used: {script} built {built}; {change}.\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "hf-soo run",
        usage="%(prog)s [-h] [-m] SCRIPT [ARGUMENTS ...]",
        description="Run a script that trains with transformers' Trainer, or a subclass of it, as it is, with the "
        "optimizers of hf_soo: `hf-soo run run_glue.py --optim mkor --base_optim lamb ...`. `--help` after SCRIPT "
        "lists its flags, ours among them. On several processes: `torchrun --nproc_per_node 2 -m hf_soo.run SCRIPT "
        "...` or `accelerate launch -m hf_soo.run SCRIPT ...`.",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="a file, or with -m a module")
    parser.add_argument(
        "arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="the script's own, and hf_soo's among them"
    )
    return parser
