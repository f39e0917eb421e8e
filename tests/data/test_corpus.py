"""Readers of every layout, the sentence splitter, and the vocabulary."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_soo.bert.data import workers
from hf_soo.bert.data.wordpiece import SPECIAL_TOKENS, SpecialIds, load_tokenizer, read_vocabulary, train_wordpiece
from hf_soo.text.corpus import Corpus, sentences_of

WIKI = """<doc id="12" url="http://en.wikipedia.org/wiki?curid=12" title="Anarchism">
Anarchism

Anarchism is a philosophy. It has no state.
Etymology and terminology.

</doc>
<doc id="13" url="http://en.wikipedia.org/wiki?curid=13" title="Empty">
Empty

</doc>
<doc id="25" url="http://en.wikipedia.org/wiki?curid=25" title="Autism">
Autism

Autism is a disorder.
</doc>
"""
WIKI_DOCUMENTS = [
    ["Anarchism is a philosophy.", "It has no state."],  # not the section's title
    ["Autism is a disorder."],
]
ROWS = [{"id": 1, "text": "One here. Two there.\nThree"}, {"id": 2, "text": ""}, {"id": 3, "text": "Four."}]
ROW_DOCUMENTS = [["One here.", "Two there.", "Three"], ["Four."]]


@pytest.mark.parametrize(
    ("paragraph", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "Yes." Then he left.', ['He said "Yes."', "Then he left."]),
        (
            "Mr. Smith met Dr. J. R. Jones in St. Ives. They talked.",
            ["Mr. Smith met Dr. J. R. Jones in St. Ives.", "They talked."],
        ),
        ("It cost 3.50 dollars, i.e. too much. 12 left.", ["It cost 3.50 dollars, i.e. too much.", "12 left."]),
        ("これは文です。次の文です。", ["これは文です。", "次の文です。"]),
        ("  \t ", []),
    ],
)
def test_sentences(paragraph: str, sentences: list[str]) -> None:
    assert sentences_of(paragraph) == sentences


def test_wikiextractor_folder_skips_titles_and_empty_documents(tmp_path: Path) -> None:
    (tmp_path / "AB").mkdir()
    (tmp_path / "AA").mkdir()
    (tmp_path / "AA" / "wiki_00").write_text(WIKI, encoding="utf-8")
    (tmp_path / "AB" / "wiki_00").write_text(WIKI.replace("disorder", "Störung"), encoding="utf-8")
    documents = list(Corpus(str(tmp_path)))
    assert documents == [*WIKI_DOCUMENTS, WIKI_DOCUMENTS[0], ["Autism is a Störung."]]
    assert list(Corpus(str(tmp_path / "AA" / "wiki_00"))) == WIKI_DOCUMENTS


def test_wikiextractor_json_output(tmp_path: Path) -> None:
    (tmp_path / "wiki_00").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    assert list(Corpus(str(tmp_path))) == ROW_DOCUMENTS


def test_wikiextractor_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"\xef\xbb\xbf<doc id=1>\r\nA\r\n\r\nText.\r\n</doc>\r\n")
    assert list(Corpus(str(tmp_path / "part"))) == [["Text."]]


def test_cut_off_wikiextractor_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wiki_00").write_text(WIKI[:-20], encoding="utf-8")
    with pytest.raises(ValueError, match=r"wiki_00' ends inside the <doc> block of line 12"):
        list(Corpus(str(tmp_path)))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_text_with_blank_lines_between_documents(tmp_path: Path, newline: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(newline.join(["\ufeffOne. Two.", "Three.", "", " ", "Four."]).encode())
    assert list(Corpus(str(file))) == [["One.", "Two.", "Three."], ["Four."]]


def test_jsonl_and_parquet_agree(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert list(Corpus(str(tmp_path / "a.jsonl"))) == ROW_DOCUMENTS
    assert list(Corpus(str(tmp_path / "a.parquet"))) == ROW_DOCUMENTS
    assert list(Corpus(str(tmp_path))) == [*ROW_DOCUMENTS, *ROW_DOCUMENTS]


def test_damaged_parquet_names_the_row(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    table = pa.table({"text": [f"Text number {i} here." for i in range(3000)]})
    pq.write_table(table, file, row_group_size=1000, compression="zstd", use_dictionary=False)
    second = pq.ParquetFile(file).metadata.row_group(1).column(0)
    content = bytearray(file.read_bytes())
    start = second.data_page_offset + 60
    content[start : start + 200] = bytes(200)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a.parquet' is not Parquet after row (768|1000) \(.*; write it again"):
        list(Corpus(str(file)))
    file.unlink()
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet' has no column 'text'; it has body: choose one"):
        next(iter(Corpus(str(tmp_path))))  # before anything of the first file


def test_hub_name_goes_through_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    load, asked = datasets.load_dataset, []

    def load_local(path: str, name: str | None, split: str) -> datasets.Dataset:
        asked.append((path, name))
        return load(str(tmp_path / "data"), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    assert list(Corpus("someone/corpus:20231101.en")) == ROW_DOCUMENTS
    assert asked == [("someone/corpus", "20231101.en")]
    with pytest.raises(ValueError, match="does not load as a hub data set with split 'test'"):
        list(Corpus("someone/corpus", split="test"))
    with pytest.raises(ValueError, match="has no column 'body'; it has id, text"):
        list(Corpus("someone/corpus", text_column="body"))


@pytest.mark.parametrize("kind", [ConnectionError, datasets.exceptions.DatasetGenerationError])
def test_unreachable_hub_name_is_a_one_line_error(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise kind("Couldn't reach\n'no/such' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        ValueError, match=r"source 'no/such' is no local path, and does not load .*: Couldn't reach 'no/such'"
    ):
        list(Corpus("no/such"))


def test_embedded_text_is_real_english() -> None:
    documents = list(Corpus("embedded"))
    assert 60 <= len(documents) <= 120
    assert 300_000 < sum(len(sentence) for document in documents for sentence in document) < 900_000
    assert any(sentence.startswith("Assert statements are a convenient way") for d in documents for sentence in d)


def test_corpus_can_be_read_twice_and_limited() -> None:
    corpus = Corpus("embedded", limit=3)
    assert list(corpus) == list(corpus) and len(list(corpus)) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n \n", "holds no text"),
        ("a.txt", b"good line\nbad \xff byte\n", r"a.txt', line 2 is not UTF-8: byte 0xff at offset 14; convert it"),
        ("a.txt", "ok\nü".encode()[:-1], r"a.txt', line 2 is not UTF-8: byte 0xc3 at offset 3"),
        ("a.jsonl", b'{"text": "a"}\n{oops\n', r"line 2: no JSON"),
        ("a.jsonl", b'{"body": "a"}\n', "line 1 has no column 'text'; it has body: choose one with text_column"),
        ("a.jsonl", b"[1]\n", "line 1 is a JSON list"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\\ud800"}\n', "line 3: 'text' holds half of a surrogate pair"),
        (
            "wiki_00",
            b"<doc id=1>\nA\n\nText.\n<doc id=2>\n",
            "line 5 begins a <doc> inside that of line 1, which",
        ),
        ("wiki_00", b"<doc id=1>\nA\n</doc>\nText.\n", "line 4 is outside any <doc>"),
        ("a.jsonl", b'{"text": 5}\n', "'text' is a int; it must be text"),
        ("a.parquet", b"not parquet", "is not Parquet"),
        ("a.bin", b"\x00\x01", "is of unknown kind"),
    ],
)
def test_bad_files_are_one_line_errors(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(Corpus(str(tmp_path / name)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["missing.txt", "/no/such/folder", "./nothing", "a b"])
def test_missing_source_is_named(source: str) -> None:
    with pytest.raises(ValueError, match=f"source '{source}' is no file or folder here"):
        list(Corpus(source))


def test_folder_without_text_is_refused_and_stray_files_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="holds 1 files and none is text"):
        list(Corpus(str(tmp_path)))
    (tmp_path / "a.txt").write_text("One.")
    with caplog.at_level(logging.WARNING):
        assert list(Corpus(str(tmp_path))) == [["One."]]
    assert "left out 1 files of unknown kind: picture.png" in caplog.text


def test_vocabulary_is_the_same_in_every_process(tmp_path: Path) -> None:
    imports = "from hf_soo.text.corpus import Corpus; from hf_soo.bert.data.wordpiece import train_wordpiece"
    train = imports + "; train_wordpiece(Corpus('embedded'), 1500, {!r})"
    files = [tmp_path / "here.txt", tmp_path / "there.txt"]
    assert train_wordpiece(Corpus("embedded"), 1500, files[0]) == 1500
    subprocess.run([sys.executable, "-c", train.format(str(files[1]))], check=True, cwd=Path(__file__).parents[2])
    assert files[0].read_bytes() == files[1].read_bytes()
    vocabulary = read_vocabulary(files[0])
    assert list(vocabulary)[:5] == list(SPECIAL_TOKENS) and list(vocabulary.values()) == list(range(1500))
    assert {"the", "python", "##ing"} <= set(vocabulary)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["here.txt", "there.txt"]


def test_generator_and_list_give_the_same_vocabulary(tmp_path: Path) -> None:
    documents = [["the cat sat on the mat"], ["the dog sat on the log", "café"]] * 3
    train_wordpiece(documents, 100, tmp_path / "a")
    train_wordpiece((document for document in documents), 100, tmp_path / "b")
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
    tokenizer = load_tokenizer(tmp_path / "a")
    assert tokenizer.encode("CAFÉ the").tokens[-1] == "the" and "[UNK]" not in tokenizer.encode("CAFÉ tac").tokens


@pytest.mark.parametrize(
    ("documents", "size", "message"), [([[]], 1000, "no text to train"), ([["a"]], 50, "vocab_size is 50")]
)
def test_vocabulary_needs_text_and_room(tmp_path: Path, documents: list[list[str]], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_wordpiece(documents, size, tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_tokenizer_has_exactly_the_given_vocabulary(tmp_path: Path) -> None:
    pieces = [*SPECIAL_TOKENS, "hello", "world", "##s", "!"]
    (tmp_path / "v.txt").write_text("\n".join(pieces))
    tokenizer = load_tokenizer(tmp_path / "v.txt")
    assert tokenizer.get_vocab_size() == 9
    assert tokenizer.encode("Hello WORLDS! [MASK] zzz").ids == [5, 6, 7, 8, 1, 1, 1, 1]  # literal [MASK] is plain text
    ids = SpecialIds.of(tmp_path / "v.txt")
    assert (ids.size, ids.pad, ids.unk, ids.cls, ids.sep, ids.mask) == (9, 0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[PAD]\n[UNK]\n[CLS]\na\n", r"lacks \[SEP\], \[MASK\]; it needs"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\na\n", "has 'a' on two lines"),
        (b"[PAD]\n\xe9\n", "is not UTF-8: byte 0xe9 at offset 6"),
        (None, "is no file; give a text file with one word piece a line"),
    ],
)
def test_bad_vocabulary_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "v.txt")


def test_long_sentences_are_encoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v.txt").write_text("\n".join([*SPECIAL_TOKENS, *"abcσς日é,", *(f"##{c}" for c in "abcς")]))
    tokenizer = load_tokenizer(tmp_path / "v.txt")
    text = "Abc cab  ΑΒΣ σας, ab日cd,é \t x" + " ba" * 50 + " " + "a" * 300 + " b "
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    for longest in (1, 2, 5, 17, 100, 1000):
        monkeypatch.setattr(workers, "LONGEST_PIECE", longest)
        found = list(workers._token_ids(tokenizer, ["ab", text, "", "c"]))
        assert (
            [list(ids) for ids in found]
            == [tokenizer.encode(each, add_special_tokens=False).ids for each in ("ab", text, "", "c")]
            and list(found[1]) == whole
            and len(whole) > 70
        )
    monkeypatch.setattr(workers, "SENTENCES", 2)
    assert len(list(workers._token_ids(tokenizer, ["a", "b", "c"]))) == 3
