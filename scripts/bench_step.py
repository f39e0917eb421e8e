"""Time optimizers against AdamW(foreach=True) (--help has all)."""

import sys

from hf_soo.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
