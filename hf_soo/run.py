"""What ``hf-soo run`` does, for launchers that start a module: ``torchrun -m hf_soo.run SCRIPT [ARGUMENTS]``."""

from __future__ import annotations

import sys

from hf_soo.integrations.replacing import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
