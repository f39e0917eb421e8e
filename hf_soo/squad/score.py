"""``hf-soo squad --score``: the official metrics of a file of predictions, without a model."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hf_soo.files import parse_json
from hf_soo.squad.files import QuestionSet
from hf_soo.squad.metrics import Score, score_v1, score_v2

logger = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --score --help lists the flags of scoring.")


def score_main(flags: Sequence[str]) -> int:
    """Score by a command line and print the line: 0, or 1 with one line on stderr for an error."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        print(_score_file(flags))
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _score_file(flags: Sequence[str]) -> str:
    """The JSON line of a command line of scoring: ``exact_match`` and ``f1`` in percent, and for v2.0 the splits."""
    args = _parser().parse_args(list(flags))
    if args.score is None:
        raise ValueError("--score needs a file of predictions; --score --help lists the flags of scoring.")
    asked = QuestionSet.read(args.validation_file)
    version_2 = args.version_2_with_negative.lower() == "true" or asked.has_impossible
    asked.check_answers(version_2=version_2)
    predictions = _read(args.score, str, "question id -> text")
    if not version_2:
        if args.na_prob_file is not None:
            raise ValueError("na_prob_file is for SQuAD v2.0; give --version_2_with_negative, or leave it out.")
        result = score_v1(asked.questions, predictions)
    elif args.na_prob_file is None:
        result = score_v2(asked.questions, predictions)
    else:
        odds = _read(args.na_prob_file, float, "question id -> number")
        result = score_v2(asked.questions, predictions, odds, args.na_prob_thresh)
    _report_misfits(result, asked, args.score)
    return json.dumps(result.metrics)


def _report_misfits(result: Score, asked: QuestionSet, source: str) -> None:
    """Name the questions without a prediction and the predictions for no question; refuse where none fits."""
    if len(result.missing) == len(asked.questions):
        raise ValueError(
            f"{source}: holds no prediction for any question of {asked.source}; they do not belong together."
        )
    for ids, what in (
        (result.missing, f"questions of {asked.source} have no prediction and count 0"),
        (result.unknown, f"predictions are for questions that are not in {asked.source} and do not count"),
    ):
        if ids:
            logger.warning(
                "%s: %d %s: %s", source, len(ids), what, ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
            )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hf-soo squad", description="Score a file of predictions without a model.", allow_abbrev=False
    )
    parser.add_argument("--score", nargs="?", metavar="PREDICTIONS.json", help="question id -> text")  # none: --help
    parser.add_argument("--validation_file", required=True, metavar="DEV.json", help="SQuAD's JSON, or JSON lines")
    parser.add_argument(
        "--version_2_with_negative",
        nargs="?",
        const="true",
        default="false",
        choices=("true", "false", "True", "False"),
        help="some questions have no answer; not needed where the file says is_impossible",
    )
    parser.add_argument("--na_prob_file", metavar="null_odds.json", help="v2.0: question id -> odds of no answer")
    parser.add_argument("--na_prob_thresh", type=float, default=1.0, help="v2.0: above these odds there is no answer")
    return parser


def _read(file: str, kind: type, layout: str) -> dict[str, Any]:
    try:
        content = parse_json(Path(file).expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: cannot be read as JSON ({error}); one object, {layout}, is needed.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}; one object, {layout}, is needed.")
    for key, value in content.items():
        right = isinstance(value, str) if kind is str else _is_number(value)
        if not right:
            raise ValueError(f"{file}: {key!r} has the value {str(value)[:60]!r}; one object, {layout}, is needed.")
    return content


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
