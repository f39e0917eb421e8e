"""Classify images with a ViT or a ResNet and any optimizer of hf_soo, from a YAML file and flags over it.

    hf-soo vision --config vit_digits_kfac_reduce
    hf-soo vision --config vit_digits_adamw --learning_rate 0.001
    accelerate launch -m hf_soo.vision --config resnet_digits_adamw --dataset my_photos

The images are scikit-learn's digits, a folder of one folder a class, or a data set of the hub; images of other sizes
are resized (bilinear). The model has random weights. Every field of TrainingArguments is a flag and a YAML key. The
run goes on from the last checkpoint in --output_dir unless --restart is given. It leaves one JSON in OUTPUT_DIR/runs,
with evaluation loss and accuracy; with --compare_with, two and a picture of both curves.

`accelerate launch -m hf_soo.vision` is the same in any number of processes, and so is scripts/run_vision.py.
"""

from __future__ import annotations

from hf_soo.runs.script import run_script
from hf_soo.vision.task import DOMAIN


def main(flags: list[str] | None = None) -> int:
    """Run; 0 when it trained (also when it diverged), 1 with one line on stderr for an error, 130 after Ctrl-C."""
    return run_script(DOMAIN, __doc__ or "", flags)
