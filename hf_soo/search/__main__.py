"""``python -m hf_soo.search`` and ``accelerate launch -m hf_soo.search`` are `hf-soo search`."""

import sys

from hf_soo.search.command import main

if __name__ == "__main__":
    sys.exit(main())
