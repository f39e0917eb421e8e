"""Fine-tune on SQuAD with any optimizer of hf_soo, or score a file of predictions (--help has all)."""

import sys

from hf_soo.squad.command import main

if __name__ == "__main__":
    sys.exit(main())
