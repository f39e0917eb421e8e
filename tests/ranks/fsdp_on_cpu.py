"""scripts/pretrain_bert.py with accelerate's FSDP let through on CPUs, over gloo.

accelerate 1.15 heeds ACCELERATE_USE_FSDP on devices of its list alone, and CPUs are not on it: it would train under
DistributedDataParallel and say nothing. Here it takes a CPU for one of them (ACCELERATE_TORCH_DEVICE=cpu keeps the
tensors there).
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from tests.scripts.script_runs import load_script


def gloo(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState._prepare_backend = gloo
    sys.exit(load_script("pretrain_bert").main())
