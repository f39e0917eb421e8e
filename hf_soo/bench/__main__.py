"""``python -m hf_soo.bench`` and ``accelerate launch -m hf_soo.bench`` are `hf-soo bench`."""

import sys

from hf_soo.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
