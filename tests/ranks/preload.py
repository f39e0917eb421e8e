"""What ranks import, imported once: the server that ranks are forked from loads it when the first one is wanted."""

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import accelerate
import deepspeed
import transformers

import hf_soo.integrations.deepspeed
import tests.ranks.cells

tests.ranks.cells.stay_on_gloo()  # no rank shall wait for a compiler
gc.collect()
gc.freeze()  # as in conftest.py: each Trainer.train collects, and would go through all of the libraries

__all__ = ["accelerate", "deepspeed", "hf_soo", "tests", "transformers"]
