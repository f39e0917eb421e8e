"""Models, data and stand-ins for transformers' example scripts: random, tiny, and on this machine."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHANCE = random.Random(0)
WORDS = sorted({"".join(CHANCE.choices("abdeilmnorst", k=4)) for _ in range(60)})

STAND_INS = {
    "evaluate.py": '''"""Stands in for evaluate, whose metrics are fetched when they are used."""
import numpy as np


class Metric:
    def __init__(self, name):
        self.name = name

    def compute(self, predictions, references, **kwargs):
        if self.name == "squad":
            pairs = [(p["prediction_text"], r["answers"]["text"]) for p, r in zip(predictions, references)]
            return {"exact_match": 100.0 * np.mean([p in texts for p, texts in pairs])}
        if self.name == "rouge":
            pairs = [({*p.split()}, {*r.split()}) for p, r in zip(predictions, references)]
            return {"rouge1": float(np.mean([len(p & r) / len(r) for p, r in pairs]))}
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def load(name, *args, **kwargs):
    return Metric(name)
''',
    "nltk.py": '''"""Stands in for nltk, whose sentence splitter is fetched when it is used."""


class data:
    @staticmethod
    def find(name):
        return name


def sent_tokenize(text):
    return text.split(". ")
''',
}


def write_stand_ins(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in STAND_INS.items():
        (folder / name).write_text(text, encoding="utf-8")


def sentence(length: int) -> str:
    return " ".join(CHANCE.choices(WORDS, k=length))


def write_data(folder: Path) -> None:
    """pairs.csv with a label, questions.json, lines.txt and summaries.json, each as training and as validation data."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, size in (("train", 64), ("validation", 16)):
        pairs = [(sentence(5), sentence(5)) for _ in range(size)]
        rows = [(first, second, int(first < second)) for first, second in pairs]
        lines = ["sentence1,sentence2,label", *(",".join(map(str, row)) for row in rows)]
        (folder / f"{part}_pairs.csv").write_text("\n".join(lines) + "\n")
        questions = []
        for i in range(size):
            context, place = sentence(12), 5 * CHANCE.randrange(12)
            answers = {"text": [context[place : place + 4]], "answer_start": [place]}
            questions.append(
                {"id": str(i), "title": "", "context": context, "question": sentence(3), "answers": answers}
            )
        (folder / f"{part}_questions.json").write_text(json.dumps({"data": questions}))
        (folder / f"{part}_lines.txt").write_text("\n".join(sentence(12) for _ in range(2 * size)) + "\n")
        summaries = [{"text": text, "summary": text[:19]} for text in (sentence(10) for _ in range(size))]
        (folder / f"{part}_summaries.json").write_text("\n".join(map(json.dumps, summaries)) + "\n")


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token, and pairs as BERT has them."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", bos_token="[CLS]", eos_token="[SEP]", model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def write_models(folder: Path) -> None:
    """bert, gpt2 and bart: no dropout, so that a run on two processes is the run on one."""
    torch.manual_seed(0)
    size = len(SPECIAL) + len(WORDS)
    bert = BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    gpt2 = GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=2, eos_token_id=3, initializer_range=0.1,
    )  # fmt: skip
    bart = BartConfig(
        vocab_size=size, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32, dropout=0.0,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3, init_std=0.1,
    )  # fmt: skip
    made: dict[str, PreTrainedModel] = {
        "bert": BertForMaskedLM(bert),
        "gpt2": GPT2LMHeadModel(gpt2),
        "bart": BartForConditionalGeneration(bart),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        words = tokenizer()
        if name != "bert":
            words.model_input_names = ["input_ids", "attention_mask"]
        words.save_pretrained(folder / name)
