"""``python -m hf_soo.squad`` and ``accelerate launch -m hf_soo.squad`` are `hf-soo squad`."""

import sys

from hf_soo.squad.command import main

if __name__ == "__main__":
    sys.exit(main())
