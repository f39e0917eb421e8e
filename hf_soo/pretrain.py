"""``python -m hf_soo.pretrain`` and ``accelerate launch -m hf_soo.pretrain`` are `hf-soo pretrain`."""

import sys

from hf_soo.domains import main

if __name__ == "__main__":
    sys.exit(main())
