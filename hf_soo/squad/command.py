"""Fine-tune on SQuAD v1.1 or v2.0 with any optimizer of hf_soo, from a YAML file and flags over it; or score a file.

    hf-soo squad --config bert_base_mkor
    hf-soo squad --score out/predictions.json --validation_file dev-v1.1.json
    accelerate launch -m hf_soo.squad --config bert_base_adamw --model_name_or_path out/phase2

Flags are those of transformers' run_qa.py, and every field of TrainingArguments; all are YAML keys too. The run goes on
from the last checkpoint in --output_dir unless --restart is given. It leaves predictions.json, nbest_predictions.json
and, for v2.0, null_odds.json in OUTPUT_DIR, and one JSON in OUTPUT_DIR/runs with exact match and F1 in percent. --score
needs no model and prints one line of JSON: {"exact_match": ..., "f1": ...}; --score --help lists its flags.

`accelerate launch -m hf_soo.squad` is the same in any number of processes, and so is scripts/run_squad.py.
"""

from __future__ import annotations

import sys

from hf_soo.squad.score import score_main


def main(flags: list[str] | None = None) -> int:
    """Run; 0 when it trained (also when it diverged), 1 with one line on stderr for an error, 130 after Ctrl-C."""
    given = sys.argv[1:] if flags is None else flags
    if any(flag.partition("=")[0] == "--score" for flag in given):
        return score_main(given)
    # Imported here: scoring needs none of it.
    from hf_soo.runs.script import run_script
    from hf_soo.squad.task import DOMAIN

    return run_script(DOMAIN, __doc__ or "", flags)
