"""Prepare text for BERT pretraining: sentences, word pieces, next-sentence pairs, as an Arrow data set.

    python scripts/prepare_pretraining.py --source embedded --output data/embedded --vocab_size 4000
    python scripts/prepare_pretraining.py --source text/AA --output data/wiki128 --vocab vocab.txt --num_proc 2
    python scripts/prepare_pretraining.py --source wikimedia/wikipedia:20231101.en --output data/wiki512 \
        --max_seq_length 512 --short_seq_prob 0 --eval_documents 0.001 --num_proc 16

Masks are not made here: the collator draws new ones each epoch (hf_soo/tasks/masking.py).
"""

from __future__ import annotations

import logging
import sys
import time


def main() -> int:
    """Parse the flags, prepare, and say what came out; 1 after an error, 130 after Ctrl-C."""
    # Imported here: worker processes import this file too, and do not need them.
    from transformers import HfArgumentParser

    from hf_soo.tasks.pretraining_data import PrepareConfig, prepare

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_soo").setLevel(logging.INFO)
    start = time.perf_counter()
    try:
        (config,) = HfArgumentParser(PrepareConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()
        manifest = prepare(config)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was kept", file=sys.stderr)
        return 130
    for split, counts in manifest["counts"].items():
        print(f"{split}: " + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()))
    print(f"wrote {config.output} ({manifest['vocab_size']:,} word pieces) in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
