"""Pretrain BERT with any optimizer of hf_soo (--help has all)."""

import sys

from hf_soo.domains import main

if __name__ == "__main__":
    sys.exit(main())
