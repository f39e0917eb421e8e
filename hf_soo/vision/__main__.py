"""``python -m hf_soo.vision`` and ``accelerate launch -m hf_soo.vision`` are `hf-soo vision`."""

import sys

from hf_soo.vision.command import main

if __name__ == "__main__":
    sys.exit(main())
