"""scripts/pretrain_bert.py over gloo: accelerate's FSDP let through on CPUs, DeepSpeed without its own kernels.

accelerate 1.15 heeds ACCELERATE_USE_FSDP on devices of its list alone, and CPUs are not on it: it would train under
DistributedDataParallel and say nothing. Here it takes a CPU for one of them (ACCELERATE_TORCH_DEVICE=cpu keeps the
tensors there). DeepSpeed would spend a minute on compiling messages over shared memory first.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from tests.ranks.cells import stay_on_gloo
from tests.scripts.script_runs import load_script


def gloo(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


if __name__ == "__main__":
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        stay_on_gloo()
    else:
        PartialState._prepare_backend = gloo
    sys.exit(load_script("pretrain_bert").main())
