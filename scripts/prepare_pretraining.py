"""Prepare text for BERT pretraining (--help has all)."""

import sys

from hf_soo.bert.data.command import main

if __name__ == "__main__":
    sys.exit(main())
