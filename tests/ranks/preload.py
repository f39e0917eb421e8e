"""What ranks import, imported once: the server that ranks are forked from loads it when the first one is wanted."""

import gc
import importlib
import os

from tests.ranks import cells

os.environ.setdefault("DS_ACCELERATOR", "cpu")

for module in (
    "accelerate",
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",  # of the first ZeRO engine: a second of torch's compiler
    "hf_soo.integrations.deepspeed",
    "hf_soo.integrations.trainer",
    "transformers.models.bert.modeling_bert",
):
    importlib.import_module(module)

cells.stay_on_gloo()  # no rank shall wait for a compiler
gc.collect()
gc.freeze()  # as in conftest.py: each Trainer.train collects, and would go through all of the libraries
