"""SQuAD's files and what becomes of them: questions, windows, labels, and answers from logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from hf_soo.squad.answers import AnswerConfig, answer
from hf_soo.squad.files import QuestionSet, _collect
from hf_soo.squad.metrics import score_v1
from hf_soo.squad.tokens import Labels, Template, Tokens
from hf_soo.squad.windows import WindowCollator, Windows
from tests.data.squad_data import DATA, colour_questions, nested, paragraph, qa, real_file, tokenizer, write

CONTEXT = "w1 red w2"
GOOD = qa("1", CONTEXT, "red")


def flat(name: str, context: str, text: str) -> dict[str, Any]:
    """A row of the hub."""
    answers = {"text": [text], "answer_start": [context.index(text)]}
    return {"id": name, "title": "t", "context": context, "question": " which ? ", "answers": answers}


# files


def test_all_layouts_give_the_same_questions(tmp_path: Path) -> None:
    rows = [flat("1", CONTEXT, "red"), flat("2", CONTEXT, "w2")]
    both = [qa("1", CONTEXT, "red", question="which ?"), qa("2", CONTEXT, "w2", question=" which ?\n")]
    layouts = {
        "nested.json": nested(paragraph(CONTEXT, *both)),
        "flat.json": {"data": rows},
        "rows.jsonl": "\ufeff" + "".join(json.dumps(row) + "\r\n" for row in rows) + "\n",
    }
    read = [QuestionSet.read(write(tmp_path / name, content)) for name, content in layouts.items()]
    assert read[0].questions == read[1].questions == read[2].questions == _collect("hub", rows).questions
    first, second = read[0].questions
    assert (first.id, first.question, first.context, first.answers) == ("1", "which ?", CONTEXT, ((3, "red"),))
    assert first.context is second.context
    assert [each.id for each in read[0].head(1).questions] == ["1"] and read[0].head(None) is read[0]
    assert len(QuestionSet.read(write(tmp_path / "one.jsonl", json.dumps(rows[0]))).questions) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ([1, 2], "has no list 'data'"),
        ({"version": "1.1"}, "has no list 'data'"),
        ({"data": []}, "holds no questions"),
        (nested(), "holds no questions"),
        (nested(paragraph(CONTEXT)), "holds no questions"),
        ({"data": [{"title": "t"}]}, "an article has no list 'paragraphs'"),
        ({"data": ["x"]}, "an article has no list 'paragraphs'"),
        (nested({"context": CONTEXT}), "a paragraph has no list 'qas'"),
        (nested(paragraph(CONTEXT, "x")), "an entry of 'qas' is a str"),  # type: ignore[arg-type]
        (nested({"qas": [GOOD]}), "question '1': 'context' is None"),
        (nested(paragraph(" \n", GOOD)), "question '1': 'context' is ' \\n'"),
        (nested(paragraph(CONTEXT, {**GOOD, "question": "  "})), "question '1': 'question' is '  '"),
        (nested(paragraph(CONTEXT, {**GOOD, "question": "\ud800"})), "question '1': 'question' is '\\ud800'"),
        (nested(paragraph(CONTEXT, {**GOOD, "id": 7})), "question number 1 has no text 'id' (got 7)"),
        (nested(paragraph(CONTEXT, {**GOOD, "id": "a\ud800"})), "question number 1 has no text 'id' (got 'a\\ud800')"),
        *(
            (
                nested(paragraph(CONTEXT, {**GOOD, "is_impossible": value})),
                f"'is_impossible' is {value!r}; true or false",
            )
            for value in ("false", "true", 0, 1, 0.0, [], {})
        ),
        *(
            (
                nested(paragraph(CONTEXT, {**GOOD, "answers": [{"text": "red", "answer_start": value}]})),
                "a whole number",
            )
            for value in (True, False, 1.0, "1", None, [0])
        ),
        *(
            (
                nested(paragraph(CONTEXT, {**GOOD, "answers": [{"text": value, "answer_start": 0}]})),
                "needs a text 'text'",
            )
            for value in ("a\udfff", None, 7, True)
        ),
        (nested(paragraph(CONTEXT, GOOD, GOOD)), "the id '1' is there twice"),
        (nested(paragraph(CONTEXT, {**GOOD, "answers": {}})), "question '1' has no list 'answers'"),
        (nested(paragraph(CONTEXT, {**GOOD, "answers": ["red"]})), "question '1': 'answers' holds something else"),
        (
            nested(paragraph(CONTEXT, {**GOOD, "answers": [{"text": "red"}]})),
            "question '1': every answer needs a text 'text' and a whole number 'answer_start'; got {'text': ['red'], "
            "'answer_start': [None]}",
        ),
        (json.dumps(flat("1", CONTEXT, "red")) + '\n{"id": \n', "line 2: not JSON"),
        (json.dumps({**flat("1", CONTEXT, "red"), "answers": "red"}), "question '1': every answer needs"),
    ],
)
def test_a_bad_file_is_named_with_the_question(tmp_path: Path, content: Any, message: str) -> None:
    file = write(tmp_path / "bad.json", content)
    with pytest.raises(ValueError) as error:
        QuestionSet.read(file)
    assert str(error.value).startswith(file) and message in str(error.value)


def test_a_file_that_is_missing_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe{")
    for name in ("absent.json", "bad.json", "."):
        with pytest.raises(ValueError, match="cannot be read"):
            QuestionSet.read(tmp_path / name)


def test_what_can_be_scored(tmp_path: Path) -> None:
    """Test files lack the answers, or have empty lists of them, which are answers in v2.0 alone."""
    unknown = {key: value for key, value in GOOD.items() if key != "answers"}
    for other, expected in (([], (True, True)), ([qa("2", CONTEXT)], (False, True)), ([unknown], (False, False))):
        file = write(tmp_path / "a.json", nested(paragraph(CONTEXT, GOOD, *({**each, "id": "2"} for each in other))))
        asked = QuestionSet.read(file)
        assert tuple(asked.can_be_scored(version_2=each) for each in (False, True)) == expected


def test_questions_without_answers(tmp_path: Path) -> None:
    none = qa("2", CONTEXT)
    plain = QuestionSet.read(write(tmp_path / "a.json", nested(paragraph(CONTEXT, GOOD, none))))
    assert not plain.has_impossible
    plain.check_answers(version_2=True)
    with pytest.raises(ValueError, match=r"a.json: question '2' has no answer span.*--version_2_with_negative"):
        plain.check_answers(version_2=False)
    marked = nested(paragraph(CONTEXT, GOOD, {**none, "is_impossible": True}))
    assert QuestionSet.read(write(tmp_path / "b.json", marked)).has_impossible
    unknown = QuestionSet.read(
        write(tmp_path / "c.json", nested(paragraph(CONTEXT, {"id": "3", "question": "which ?"})))
    )
    assert unknown.questions[0].answers is None
    with pytest.raises(ValueError, match="question '3' has no 'answers'; only a test file may lack them"):
        unknown.check_answers(version_2=True)


# windows and labels


def windows(
    tmp_path: Path, content: Any, length: int = 64, stride: int = 2, query: int = 16
) -> tuple[QuestionSet, Windows, Labels]:
    asked = QuestionSet.read(write(tmp_path / "asked.json", content))
    coder = tokenizer(tmp_path)
    tokens = Tokens.of(coder, asked, query)
    labels = Labels.of(asked, tokens)
    return asked, Windows(tokens, Template.of(coder), length, stride, labels), labels


@pytest.mark.parametrize(("length", "stride"), [(10, 0), (10, 2), (12, 4), (13, 1), (24, 3), (64, 16)])
def test_windows_are_the_tokenizers_own(tmp_path: Path, length: int, stride: int) -> None:
    content = colour_questions(7, seed=0, words=17)
    content["data"][0]["paragraphs"][0]["qas"].append(
        qa("long", content["data"][0]["paragraphs"][0]["context"], question="which w1 w2 ?")
    )
    asked, ours, _ = windows(tmp_path, content, length, stride)
    coder = tokenizer(tmp_path)
    theirs = coder(
        [each.question for each in asked.questions],
        [each.context for each in asked.questions],
        truncation="only_second",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert ours.question.tolist() == theirs["overflow_to_sample_mapping"]
    for number in range(len(ours)):
        item = ours[number]
        assert item["input_ids"].tolist() == theirs["input_ids"][number]
        assert item["token_type_ids"].tolist() == theirs["token_type_ids"][number]
        places = [place for place, part in enumerate(theirs.sequence_ids(number)) if part == 1]
        spans = ours.characters(np.full(len(places), number), np.array(places)).tolist()
        assert spans == [list(theirs["offset_mapping"][number][place]) for place in places]


def test_labels_by_hand(tmp_path: Path) -> None:
    """[CLS] which colour ? [SEP] and the context's tokens from position 5."""
    context = "w1 w2 red. w3 golds blue"
    content = nested(
        paragraph(
            context,
            qa("word", context, "red"), qa("stop", context, "red."), qa("two", context, "w2 red"),
            qa("part", context, "gol"), qa("last", context, "blue"),
            {"id": "spaces", "question": "which colour ?", "answers": [{"text": " w3 ", "answer_start": 10}]},
            {"id": "wrong", "question": "which colour ?", "answers": [{"text": "red", "answer_start": 5}]},
            {"id": "before", "question": "which colour ?", "answers": [{"text": "blue", "answer_start": -4}]},
        )
    )  # fmt: skip
    asked, ours, labels = windows(tmp_path, content)
    assert ours.labels is not None and len(ours) == len(asked.questions)
    assert dict(zip((each.id for each in asked.questions), ours.labels.tolist(), strict=True)) == {
        "word": [7, 7], "stop": [7, 8], "two": [6, 7], "part": [10, 10], "last": [12, 12], "spaces": [9, 9],
        "wrong": [0, 0], "before": [0, 0],
    }  # fmt: skip
    assert (labels.wrong, labels.lost, labels.inexact) == (("wrong", "before"), (), ("part",))


def test_an_answer_in_no_token(tmp_path: Path) -> None:
    context = "w1 \u200b\u200b w2"  # BERT's normalizer drops zero-width spaces
    asked = {"id": "1", "question": "which ?", "answers": [{"text": "\u200b\u200b", "answer_start": 3}]}
    _, ours, labels = windows(tmp_path, nested(paragraph(context, asked)))
    assert (labels.lost, labels.wrong) == (("1",), ())
    assert ours.labels is not None and ours.labels.tolist() == [[0, 0]]


def test_a_context_without_a_token(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="question '1': its context has no token"):
        windows(tmp_path, nested(paragraph("\u200b", {"id": "1", "question": "which ?", "answers": []})))


def test_an_answer_is_labelled_in_every_window_that_holds_all_of_it(tmp_path: Path) -> None:
    """10 tokens a window: 4 of question, 2 special, 4 of the context, of which 2 are shared."""
    context = "w0 w1 w2 red blue w5 w6 w7 w8"
    content = nested(paragraph(context, qa("1", context, "red blue", question="which colour w9")))
    _, ours, _ = windows(tmp_path, content, length=10, stride=2)
    assert ours.first.tolist() == [0, 2, 4, 6] and ours.length.tolist() == [4, 4, 4, 3]
    assert ours.labels is not None
    assert ours.labels.tolist() == [[0, 0], [6, 7], [0, 0], [0, 0]]
    collated = WindowCollator(ours.template, 20)([ours[0], ours[3]])
    assert {key: tuple(value.shape) for key, value in collated.items()} == {
        "attention_mask": (2, 16), "input_ids": (2, 16), "token_type_ids": (2, 16), "start_positions": (2,),
        "end_positions": (2,),
    }  # fmt: skip
    assert collated["attention_mask"].sum(1).tolist() == [10, 9]
    assert collated["input_ids"][1, 9:].tolist() == [0] * 7
    for most, always, width in ((20, True, 20), (14, False, 14), (16, False, 16)):  # 10 tokens; never past `most`
        batch = WindowCollator(ours.template, most, always=always)([ours[0]])
        assert batch["input_ids"].shape == (1, width)


def test_a_long_question_is_cut(tmp_path: Path) -> None:
    content = nested(paragraph(CONTEXT, GOOD, qa("2", CONTEXT, "w1", question="which colour w3 w4 w5 ?")))
    _, ours, _ = windows(tmp_path, content, query=3)
    assert ours.tokens.cut == 1
    assert [len(ours[i]["input_ids"]) for i in range(2)] == [9, 9]
    assert (
        ours[1]["input_ids"].tolist()[1:4]
        == tokenizer(tmp_path)("which colour w3", add_special_tokens=False)["input_ids"]
    )


def test_questions_can_be_left_out(tmp_path: Path) -> None:
    _, ours, _ = windows(tmp_path, colour_questions(3, seed=0, words=20), length=16, stride=2)
    kept = [ours[i]["input_ids"].tolist() for i in range(len(ours)) if ours.question[i] != 1]
    ours.keep(np.array([True, False, True]))
    assert [ours[i]["input_ids"].tolist() for i in range(len(ours))] == kept


# answers


def reference(
    start: Any, end: Any, ours: Windows, asked: QuestionSet, size: int, longest: int
) -> dict[str, list[tuple[str, float]]]:
    """One question, one window, one pair at a time: what run_qa.py does."""
    found: dict[str, list[tuple[str, float]]] = {each.id: [] for each in asked.questions}
    for window, number in enumerate(ours.question):
        inside = range(ours.offset[window], ours.offset[window] + ours.length[window])
        firsts, lasts = (sorted(inside, key=lambda i, of=of: -of[window, i])[:size] for of in (start, end))
        for i in firsts:
            for j in (j for j in lasts if i <= j < i + longest):
                (a, _), (_, b) = ours.characters(np.array([window, window]), np.array([i, j])).tolist()
                each = asked.questions[number]
                found[each.id].append((each.context[a:b], float(start[window, i] + end[window, j])))
    return {key: sorted(pairs, key=lambda pair: -pair[1])[:size] for key, pairs in found.items()}


@pytest.mark.parametrize(("size", "longest"), [(1, 30), (3, 2), (5, 30), (20, 4), (100, 30)])
def test_answers_are_those_of_the_loops(tmp_path: Path, rng: np.random.Generator, size: int, longest: int) -> None:
    asked, ours, _ = windows(tmp_path, colour_questions(9, seed=1, words=23), length=16, stride=3)
    start, end = rng.normal(size=(2, len(ours), 24)).astype(np.float32)
    result = answer(start, end, ours, asked, AnswerConfig(size, longest))
    expected = reference(start, end, ours, asked, size, longest)
    assert len(ours) > 2 * len(asked.questions) and result.null_odds is None
    for name, pairs in expected.items():
        assert [entry["text"] for entry in result.n_best[name]] == [text for text, _ in pairs]
        scores = np.array([score for _, score in pairs])
        got = [entry["start_logit"] + entry["end_logit"] for entry in result.n_best[name]]
        np.testing.assert_allclose(got, scores, rtol=1e-6)  # fp32 logits
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose([entry["probability"] for entry in result.n_best[name]], weights, rtol=1e-5)
        assert result.texts[name] == (pairs[0][0] if pairs else "")


def test_null_odds_by_hand(tmp_path: Path) -> None:
    """The null score is the least of all windows; odds above the threshold mean no answer."""
    asked, ours, _ = windows(tmp_path, colour_questions(1, seed=2, words=6), length=10, stride=0)
    start, end = np.full((2, 2, 10), -9.0, dtype=np.float32)
    start[:, 0], end[:, 0] = (2.0, 1.0), (3.0, 1.5)  # 5 and 2.5
    start[1, 5], end[1, 6] = 1.0, 1.0
    best = " ".join(asked.questions[0].context.split()[4:])
    for threshold, expected in ((0.0, ""), (0.5, best), (0.4, "")):
        config = AnswerConfig(2, 30, version_2=True, null_score_diff_threshold=threshold)
        result = answer(start, end, ours, asked, config)
        (entries,) = result.n_best.values()
        assert result.null_odds == {"q2-0": 0.5}
        assert entries[0] == {"text": "", "probability": entries[0]["probability"], "start_logit": 1, "end_logit": 1.5}
        assert (entries[1]["text"], entries[1]["start_logit"], entries[1]["end_logit"]) == (best, 1, 1)
        assert len(entries) == 2 and result.texts["q2-0"] == expected


def test_null_stays_among_the_candidates_and_files_are_written(tmp_path: Path) -> None:
    asked, ours, _ = windows(tmp_path, colour_questions(2, seed=2, words=6))
    start, end = np.zeros((2, 2, 16), dtype=np.float32)
    start[:, 0] = -50
    result = answer(start, end, ours, asked, AnswerConfig(3, 30, version_2=True))
    assert [entry["text"] == "" for entry in result.n_best["q2-0"]] == [False] * 3 + [True]
    names = [path.name for path in result.write(tmp_path, "test_")]
    assert names == ["test_predictions.json", "test_nbest_predictions.json", "test_null_odds.json"]
    assert json.loads((tmp_path / names[0]).read_text()) == result.texts
    assert json.loads((tmp_path / names[2]).read_text()) == result.null_odds == {"q2-0": -50.0, "q2-1": -50.0}


def test_logits_that_are_not_finite_give_some_answer(tmp_path: Path) -> None:
    asked, ours, _ = windows(tmp_path, colour_questions(2, seed=2))
    broken = np.full((len(ours), 24), np.nan, dtype=np.float32)
    result = answer(broken, broken, ours, asked, AnswerConfig(version_2=True))
    json.dumps([result.n_best, result.null_odds], allow_nan=False)
    assert len(result.texts) == 2


# real questions


def test_real_labels_decode_to_their_answers_and_perfect_logits_score_near_100() -> None:
    """What is missing are answers that are part of a word piece's word (65 of 10,570), and 9 of over 30 tokens."""
    vocab = DATA.parent / "bert-base-uncased-vocab.txt"
    if not vocab.is_file():
        pytest.skip(f"{vocab.name} is not there; set HF_SOO_DATA to a folder with it")
    from transformers import BertTokenizer

    coder = BertTokenizer(vocab=str(vocab))
    expected = {"train-v1.1-head.json": (4370, 27, 2, 99.336, 99.390), "dev-v1.1.json": (10570, 65, 9, 99.395, 99.481)}
    for name, (count, inexact, long, exact, overlap) in expected.items():
        asked = QuestionSet.read(real_file(name))
        tokens = Tokens.of(coder, asked, 64)
        labels = Labels.of(asked, tokens)
        ours = Windows(tokens, Template.of(coder), 384, 128, labels)
        assert (len(asked.questions), len(labels.inexact), labels.wrong, labels.lost) == (count, inexact, (), ())
        assert int((labels.spans[:, 1] - labels.spans[:, 0] >= 30).sum()) == long
        assert ours.labels is not None
        rows, logits = np.arange(len(ours)), np.zeros((2, len(ours), 384), dtype=np.float32)
        for of, column in zip(logits, ours.labels.T, strict=True):
            of[rows, column] = 100
        metrics = score_v1(asked.questions, answer(*logits, ours, asked, AnswerConfig()).texts).metrics
        assert (round(metrics["exact_match"], 3), round(metrics["f1"], 3)) == (exact, overlap)


def test_a_tokenizer_that_cannot_be_used(tmp_path: Path) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow is no fast tokenizer"):
        Template.of(Slow())
    coder = tokenizer(tmp_path)
    coder.cls_token = "w1"
    with pytest.raises(ValueError, match=r"does not write '\[CLS\] question \[SEP\] context \[SEP\]'"):
        Template.of(coder)
    coder = tokenizer(tmp_path)
    coder.pad_token = None
    with pytest.raises(ValueError, match="has no padding token"):
        Template.of(coder)
    coder.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").is_fast
