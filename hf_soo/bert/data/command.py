"""Prepare text for BERT pretraining: sentences, word pieces, next-sentence pairs, as an Arrow data set.

    hf-soo prepare --source embedded --output data/embedded --vocab_size 4000
    hf-soo prepare --source text/AA --output data/wiki128 --vocab vocab.txt --num_proc 2
    hf-soo prepare --source wikimedia/wikipedia:20231101.en --output data/wiki512 --max_seq_length 512 --num_proc 16
    hf-soo prepare --source hdf5_shards --output data/shards --vocab vocab.txt

Look at a finished folder, and check its files (--verify --help lists these flags):

    hf-soo prepare --inspect 3 --masked --output data/wiki128
    hf-soo prepare --verify --output data/wiki128

scripts/prepare_pretraining.py is the same.

Masks are not made here: the collator draws new ones each epoch (hf_soo/bert/masking.py).
"""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass, field

from hf_soo.engine.checks import Checked, Whole

LOOKING = ("--inspect", "--masked", "--verify")


@dataclass
class _LookArguments(Checked):
    """What is looked at in a finished folder."""

    output: str = field(metadata={"help": "The folder."})
    inspect: Whole | None = field(default=None, metadata={"help": "Print counts and this many examples."})
    masked: bool = field(default=False, metadata={"help": "With --inspect: show the examples masked as well."})
    verify: bool = field(default=False, metadata={"help": "Compare the files with the manifest."})

    def __post_init__(self) -> None:
        """Check that they go together.

        Raises:
            ValueError: they do not, or the number is below 0.
        """
        super().__post_init__()
        if self.masked and self.inspect is None:
            raise ValueError("--masked shows examples: give --inspect N as well.")


def main(flags: list[str] | None = None) -> int:
    """Prepare, or look at what was prepared; 1 with one line on stderr for an error, 130 after Ctrl-C."""
    from hf_soo.runs.script import guarded  # here: worker processes import this file too, and do not need it

    return guarded(_run, flags, stopped="error: interrupted; nothing was kept")


def _run(flags: list[str]) -> None:
    if any(flag.split("=")[0] in LOOKING for flag in flags):
        _look(flags)
        return
    try:
        _prepare(flags)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(f"{error}; nothing was kept: free some space") from error


def _prepare(flags: list[str]) -> None:
    """Prepare what the flags say, and report what came out."""
    from hf_soo.bert.data.inspect import describe
    from hf_soo.bert.data.prepare import PrepareConfig, prepare
    from hf_soo.runs.arguments import parse

    start = time.perf_counter()
    (config,) = parse((PrepareConfig,), flags, __doc__ or "", "prepare")
    manifest = prepare(config)
    print(*describe(manifest), sep="\n")
    print(f"wrote {config.output} ({manifest['vocab_size']:,} word pieces) in {time.perf_counter() - start:.0f} s")


def _look(flags: list[str]) -> None:
    """Print what is in a finished folder."""
    from hf_soo.bert.data.folder import load_prepared
    from hf_soo.bert.data.inspect import describe, show_examples
    from hf_soo.runs.arguments import parse

    (asked,) = parse((_LookArguments,), flags, "Look at a prepared folder.", "prepare")
    prepared = load_prepared(asked.output, verify=asked.verify)
    if asked.inspect is not None:
        print(*describe(prepared["manifest"]), *show_examples(prepared, asked.inspect, masked=asked.masked), sep="\n")
    if asked.verify:
        print(f"{asked.output}: {len(prepared['manifest']['files'])} files are as they were written")
