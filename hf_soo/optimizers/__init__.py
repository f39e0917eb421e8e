"""Base optimizers that torch lacks, and the learning-rate schedule of BERT's pretraining recipe."""

from __future__ import annotations

from hf_soo.optimizers.lamb import Lamb
from hf_soo.optimizers.muon import Muon
from hf_soo.optimizers.schedules import poly_warmup

__all__ = ["Lamb", "Muon", "poly_warmup"]
