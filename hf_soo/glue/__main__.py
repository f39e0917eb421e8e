"""``python -m hf_soo.glue`` and ``accelerate launch -m hf_soo.glue`` are `hf-soo glue`."""

import sys

from hf_soo.glue.command import main

if __name__ == "__main__":
    sys.exit(main())
