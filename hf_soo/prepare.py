"""``python -m hf_soo.prepare`` and ``accelerate launch -m hf_soo.prepare`` are `hf-soo prepare`."""

import sys

from hf_soo.bert.data.command import main

if __name__ == "__main__":
    sys.exit(main())
