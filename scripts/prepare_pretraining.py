"""Prepare text for BERT pretraining: sentences, word pieces, next-sentence pairs, as an Arrow data set.

    python scripts/prepare_pretraining.py --source embedded --output data/embedded --vocab_size 4000
    python scripts/prepare_pretraining.py --source text/AA --output data/wiki128 --vocab vocab.txt --num_proc 2
    python scripts/prepare_pretraining.py --source wikimedia/wikipedia:20231101.en --output data/wiki512 \
        --max_seq_length 512 --short_seq_prob 0 --eval_documents 0.001 --num_proc 16
    python scripts/prepare_pretraining.py --source hdf5_shards --output data/shards --vocab vocab.txt

Look at a finished folder, and check its files:

    python scripts/prepare_pretraining.py --inspect 3 --masked --output data/wiki128
    python scripts/prepare_pretraining.py --verify --output data/wiki128

Masks are not made here: the collator draws new ones each epoch (hf_soo/bert/masking.py).
"""

from __future__ import annotations

import argparse
import errno
import logging
import sys
import time


def main() -> int:
    """Prepare, or look at what was prepared; 1 after an error, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_soo").setLevel(logging.INFO)
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    look.add_argument("--inspect", type=int, metavar="N", help="Print counts and N examples of the folder --output.")
    look.add_argument("--masked", action="store_true", help="With --inspect: show the examples masked as well.")
    look.add_argument("--verify", action="store_true", help="Compare the files of --output with its manifest.")
    wanted, _ = look.parse_known_args()
    try:
        if wanted.inspect is not None or wanted.verify or wanted.masked:
            _look(look)
        else:
            _prepare(look)
    except OSError as error:
        advice = "; nothing was kept: free some space" if error.errno == errno.ENOSPC else ""
        print(f"error: {' '.join(str(error).split())}{advice}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was kept", file=sys.stderr)
        return 130
    return 0


def _prepare(look: argparse.ArgumentParser) -> None:
    """Prepare what the flags say, and report what came out."""
    # Imported here: worker processes import this file too, and do not need them.
    from transformers import HfArgumentParser

    from hf_soo.bert.data.inspect import describe
    from hf_soo.bert.data.prepare import PrepareConfig, prepare

    start = time.perf_counter()
    parser = HfArgumentParser(PrepareConfig, description=__doc__.splitlines()[0], parents=[look])
    config, _ = parser.parse_args_into_dataclasses()
    manifest = prepare(config)
    print(*describe(manifest), sep="\n")
    print(f"wrote {config.output} ({manifest['vocab_size']:,} word pieces) in {time.perf_counter() - start:.0f} s")


def _look(look: argparse.ArgumentParser) -> None:
    """Print what is in a finished folder."""
    from hf_soo.bert.data.folder import load_prepared
    from hf_soo.bert.data.inspect import describe, show_examples

    parser = argparse.ArgumentParser(description="Look at a prepared folder.", parents=[look], allow_abbrev=False)
    parser.add_argument("--output", required=True, help="The folder.")
    flags = parser.parse_args()
    if flags.masked and flags.inspect is None:
        parser.error("--masked shows examples: give --inspect N as well")
    if flags.inspect is not None and flags.inspect < 0:
        parser.error(f"--inspect is {flags.inspect}; it must be a number of examples, 0 or more")
    prepared = load_prepared(flags.output, verify=flags.verify)
    if flags.inspect is not None:
        print(*describe(prepared["manifest"]), *show_examples(prepared, flags.inspect, masked=flags.masked), sep="\n")
    if flags.verify:
        print(f"{flags.output}: {len(prepared['manifest']['files'])} files are as they were written")


if __name__ == "__main__":
    sys.exit(main())
