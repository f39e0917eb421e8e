"""Fine-tune on SQuAD v1.1 or v2.0 with any optimizer of hf_soo, from a YAML file and flags over it; or score a file.

    accelerate launch scripts/run_squad.py --config configs/squad/bert_base_mkor.yaml
    accelerate launch scripts/run_squad.py --config configs/squad/bert_base_adamw.yaml --model_name_or_path out/phase2
    python scripts/run_squad.py --score out/predictions.json --validation_file dev-v1.1.json

Flags are those of transformers' run_qa.py, and every field of TrainingArguments; all are YAML keys too. The run goes on
from the last checkpoint in --output_dir unless --restart is given. It leaves predictions.json, nbest_predictions.json
and, for v2.0, null_odds.json in OUTPUT_DIR, and one JSON in OUTPUT_DIR/runs with exact match and F1 in percent. --score
needs no model and prints one line of JSON: {"exact_match": ..., "f1": ...}; --score --help lists its flags.

`hf-soo squad` is the same in one process, `accelerate launch -m hf_soo.cli squad` in any number.
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
