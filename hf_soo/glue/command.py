"""Fine-tune a pretrained model on GLUE with any optimizer of hf_soo, from a YAML file and flags over it.

    hf-soo glue --model_name_or_path bert-base-uncased --task_name mrpc --optim mkor
    hf-soo glue --config minilm_adamw --task_name mrpc,stsb --data_dir glue
    accelerate launch -m hf_soo.glue --config bert_base_mkor --task_name all --seeds 0 1 2

The examples are the hub's (nyu-mll/glue), those of --data_dir (folders as in GLUE's archive: CoLA/train.tsv ...) or of
--train_file and --validation_file. Metrics are computed here. Every field of TrainingArguments is a flag and a YAML
key. A run goes on from its last checkpoint, and a finished one is not repeated, unless --restart is given. Each leaves
one JSON in OUTPUT_DIR/runs, where table.md has medians over seeds of all runs; with several tasks or --seeds, each
has its folder OUTPUT_DIR/TASK/seedN. --do_predict writes OUTPUT_DIR/predictions in the format of the GLUE server.

`accelerate launch -m hf_soo.glue` is the same in any number of processes, and so is scripts/run_glue.py.
"""

from __future__ import annotations

from hf_soo.glue import sweep
from hf_soo.runs.script import guarded


def main(flags: list[str] | None = None) -> int:
    """Run; 0 when it trained (also when it diverged), 1 with one line on stderr for an error, 130 after Ctrl-C."""
    return guarded(lambda given: sweep.run(given, __doc__ or ""), flags)
