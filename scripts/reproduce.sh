#!/usr/bin/env bash
# Reproduce the table of the MKOR paper at a chosen scale, from raw text to SQuAD and GLUE:
#   scripts/reproduce.sh --scale mini --text text --vocab vocab.txt --squad_train train-v1.1.json --squad_dev dev-v1.1.json --glue_dir glue --jobs 2
# --help lists every flag; the same command goes on where it was stopped.
exec python -m hf_soo.cli reproduce --configs "$(cd "$(dirname "${BASH_SOURCE[0]}")/../configs" && pwd)" "$@"
