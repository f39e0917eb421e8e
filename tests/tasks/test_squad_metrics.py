"""SQuAD's scores: by hand, on published predictions, and from the command line without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hf_soo.squad.files import Question
from hf_soo.squad.metrics import _exact_match, _f1, _f1_or_empty, _normal, score_v1, score_v2
from tests.data.squad_data import nested, paragraph, qa, real_file, write
from tests.scripts.script_runs import ROOT, check_error, load_script

CONTEXT = "The Eiffel Tower is in Paris, France."


def question(name: str, *answers: str) -> Question:
    return Question(name, "?", "", tuple((0, text) for text in answers))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat,\tan A.B. the!", "cat ab"),
        ("theory of an anthem", "theory of anthem"),
        ("U.S.A", "usa"),
        ("a", ""),
        ("", ""),
        ("École – «Straße»", "école – «straße»"),  # only ASCII punctuation goes
        ("the\u00a0end", "end"),
        ("A-the B", "athe b"),
        ("$1,000.50", "100050"),
    ],
)
def test_normal(text: str, expected: str) -> None:
    assert _normal(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "overlap", "overlap_v2"),
    [
        ("the Cat", "cat!", 1, 1, 1),
        ("black cat", "cat", 0, 2 / 3, 2 / 3),
        ("a b b c", "b b d", 0, 2 * 2 / (3 + 3), 2 * 2 / (3 + 3)),  # multisets, and "a" is an article
        ("dog", "cat", 0, 0, 0),
        ("", "", 1, 0, 1),  # v1.1: no common word
        ("the", "", 1, 0, 1),
        ("", "cat", 0, 0, 0),
        ("naïve café", "Naïve", 0, 2 / 3, 2 / 3),
    ],
)
def test_pairs_by_hand(prediction: str, answer: str, exact: float, overlap: float, overlap_v2: float) -> None:
    assert _exact_match(prediction, answer) == exact
    assert _f1(prediction, answer) == pytest.approx(overlap)
    assert _f1_or_empty(prediction, answer) == pytest.approx(overlap_v2)


def test_v1_takes_the_best_answer_and_counts_a_missing_prediction_as_zero() -> None:
    asked = [question("1", "black cat", "cat"), question("2", "red dog"), question("3", "x")]
    result = score_v1(asked, {"1": "a cat", "2": "dog", "other": "y"})
    assert result.metrics["exact_match"] == pytest.approx(100 / 3)
    assert result.metrics["f1"] == pytest.approx(100 * (1 + 2 / 3) / 3)
    assert (result.missing, result.unknown) == (("3",), ("other",))


V2 = [question("has1", "red cat"), question("has2", "dog"), question("no1"), question("no2"), question("has3", "the")]
V2_TEXTS = {"has1": "cat", "has2": "dog", "no1": "", "no2": "bird", "has3": "fox"}


def test_v2_splits_by_hand() -> None:
    """An answer that is nothing after `normal` is replaced by "", as in evaluate-v2.0."""
    result = score_v2(V2, V2_TEXTS)
    assert result.metrics == pytest.approx(
        {
            "exact_match": 40, "f1": 100 * (2 / 3 + 1 + 1) / 5, "HasAns_exact": 100 / 3,
            "HasAns_f1": 100 * (2 / 3 + 1) / 3, "NoAns_exact": 50, "NoAns_f1": 50,
        }
    )  # fmt: skip
    assert score_v2(V2[2:4], {"no1": ""}).metrics == {"exact_match": 50, "f1": 50, "NoAns_exact": 50, "NoAns_f1": 50}


def test_v2_best_thresholds_by_hand() -> None:
    """By rising odds: has2 +1, has1 +0 (EM) or +2/3, no1 unanswered 0, no2 -1, has3 0; it starts with 2 of 5."""
    odds = {"no2": 3.0, "has2": -5.0, "has1": -2.0, "no1": 0.5, "has3": 4.0}
    metrics = score_v2(V2, V2_TEXTS, odds).metrics
    assert (metrics["best_exact"], metrics["best_exact_thresh"]) == pytest.approx((60, -5.0))
    assert (metrics["best_f1"], metrics["best_f1_thresh"]) == pytest.approx((100 * (3 + 2 / 3) / 5, -2.0))
    assert metrics["exact_match"] == 40  # no threshold asked for
    withdrawn = score_v2(V2, V2_TEXTS, odds, threshold=-3.0).metrics  # has2 alone is still answered
    assert (withdrawn["exact_match"], withdrawn["HasAns_f1"], withdrawn["NoAns_exact"]) == pytest.approx(
        (60, 100 / 3, 100)
    )
    assert (withdrawn["best_f1"], withdrawn["best_exact"]) == pytest.approx((metrics["best_f1"], 60))


def test_published_predictions_score_as_published() -> None:
    """Without transformers, in a process of its own."""
    predictions, questions = (real_file(name) for name in ("dev_predictions_bert_ensemble.json", "dev-v1.1.json"))
    flags = ["--score", str(predictions), "--validation_file", str(questions)]
    code = (
        f"import sys; sys.path.insert(0, 'scripts'); import run_squad; code = run_squad.main({flags!r}); "
        "print('transformers' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    line, loaded = done.stdout.splitlines()
    scores = json.loads(line)
    assert list(scores) == ["exact_match", "f1"] and loaded == "False"
    assert (round(scores["exact_match"], 3), round(scores["f1"], 3)) == (86.206, 92.196)
    assert done.stderr == ""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("run_squad")


@pytest.fixture
def dev(tmp_path: Path) -> str:
    content = nested(paragraph(CONTEXT, qa("1", CONTEXT, "Paris"), qa("2", CONTEXT, "The Eiffel Tower")))
    return write(tmp_path / "dev.json", content)


def test_score_has_its_own_help(script: ModuleType, dev: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        script.main(["--score", "--help"])
    assert ended.value.code == 0 and "--na_prob_file" in capsys.readouterr().out
    assert script.main(["--score", "--validation_file", dev]) == 1
    check_error(capsys, "--score needs a file of predictions")


def test_score_reports_what_does_not_fit(
    script: ModuleType, dev: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    predictions = write(tmp_path / "p.json", {"2": "eiffel tower", "9": "x"})
    assert script.main([f"--score={predictions}", "--validation_file", dev]) == 0
    assert json.loads(capsys.readouterr().out) == {"exact_match": 50.0, "f1": 50.0}
    assert "1 questions of" in caplog.text and "have no prediction and count 0: 1" in caplog.text
    assert "1 predictions are for questions that are not in" in caplog.text


def test_score_of_v2(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = paragraph(CONTEXT, qa("1", CONTEXT, "Paris"), qa("2", CONTEXT))
    marked = paragraph(CONTEXT, qa("1", CONTEXT, "Paris"), qa("2", CONTEXT, is_impossible=True))
    predictions = write(tmp_path / "p.json", {"1": "Paris", "2": "France"})
    odds = write(tmp_path / "odds.json", {"1": -1, "2": 2.5})
    expected = {
        "exact_match": 50.0, "f1": 50.0, "HasAns_exact": 100.0, "HasAns_f1": 100.0, "NoAns_exact": 0.0, "NoAns_f1": 0.0,
    }  # fmt: skip
    for content, more in ((plain, ["--version_2_with_negative"]), (marked, [])):
        dev = write(tmp_path / "dev.json", nested(content))
        assert script.main(["--score", predictions, "--validation_file", dev, *more]) == 0
        assert json.loads(capsys.readouterr().out) == expected
    for threshold, exact in (("1.0", 100.0), ("3.0", 50.0)):
        more = ["--na_prob_file", odds, "--na_prob_thresh", threshold]
        assert script.main(["--score", predictions, "--validation_file", dev, *more]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert (scores["exact_match"], scores["best_exact"], scores["best_exact_thresh"]) == (exact, 100.0, -1)


@pytest.mark.parametrize(
    ("predictions", "more", "message"),
    [
        ({"9": "x"}, [], "holds no prediction for any question of"),
        (["x"], [], "holds a list; one object, question id -> text"),
        ({"1": None}, [], "'1' has the value 'None'; one object, question id -> text"),
        ("{", [], "cannot be read as JSON"),
        ({"1": "x"}, ["--na_prob_file", "x"], "na_prob_file is for SQuAD v2.0"),
        ({"1": "x"}, ["--na_prob_fil", "x"], "unrecognized arguments: --na_prob_fil x"),
        ({"1": "x"}, ["--version_2_with_negative", "--na_prob_file", "absent"], "absent: cannot be read as JSON"),
    ],
)
def test_score_refuses(
    script: ModuleType,
    dev: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    predictions: Any,
    more: list[str],
    message: str,
) -> None:
    assert script.main(["--score", write(tmp_path / "p.json", predictions), "--validation_file", dev, *more]) == 1
    check_error(capsys, message)
