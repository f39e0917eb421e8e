"""Pretrain BERT (masked words and next sentence) with any optimizer of hf_soo, from a YAML file and flags over it.

    accelerate launch scripts/pretrain_bert.py --config configs/smoke/mkor.yaml
    accelerate launch scripts/pretrain_bert.py --config configs/smoke/mkor.yaml --compare_with lamb
    python scripts/pretrain_bert.py --config configs/pretrain/bert_mini_wiki.yaml --config configs/pretrain/mkor.yaml

Every field of TrainingArguments is a flag and a YAML key. The run goes on from the last checkpoint in --output_dir
unless --restart is given. It leaves one JSON in OUTPUT_DIR/runs; with --compare_with, two and a picture of both curves.

`hf-soo pretrain` is the same in one process, `accelerate launch -m hf_soo.cli pretrain` in any number.
"""

from __future__ import annotations

from hf_soo.bert.inputs import DataArguments, ModelArguments
from hf_soo.bert.task import PretrainingTask
from hf_soo.runs.script import run_script


def main(flags: list[str] | None = None) -> int:
    """Run; 0 when it trained (also when it diverged), 1 with one line on stderr for an error, 130 after Ctrl-C."""
    return run_script(PretrainingTask, (ModelArguments, DataArguments), __doc__ or "", flags)
