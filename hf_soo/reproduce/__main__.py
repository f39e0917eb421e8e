"""``python -m hf_soo.reproduce`` and ``accelerate launch -m hf_soo.reproduce`` are `hf-soo reproduce`."""

import sys

from hf_soo.reproduce.command import main

if __name__ == "__main__":
    sys.exit(main())
