r"""A sentence encoder trained by sentence-transformers' Trainer: a sentence's neighbour is the one that follows it.

    pip install "hf-soo[clients]"
    python examples/sentence_embeddings.py --optim mkor --base_optim adamw --learning_rate 1e-3 --max_steps 100
    python examples/sentence_embeddings.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --source notes.txt --optim mkor --base_optim adamw --learning_rate 2e-5

Every flag of SentenceTransformerTrainingArguments and of SecondOrderTrainingArguments is one here.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny import bert_config, byte_tokenizer
from transformers import BertModel, set_seed

from hf_soo.integrations.trainer import SecondOrderTrainerMixin, SecondOrderTrainingArguments
from hf_soo.runs.arguments import option, parse
from hf_soo.text.corpus import Corpus


@dataclass
class Arguments(SentenceTransformerTrainingArguments, SecondOrderTrainingArguments):
    """The library's class first."""


class PairTrainer(SecondOrderTrainerMixin, SentenceTransformerTrainer):
    """The mixin first."""


@dataclass
class EncoderArguments:
    """What is trained, on which text."""

    model_name_or_path: str | None = option(None, "Folder or hub name of an encoder; None: a tiny one over bytes.")
    source: str = option("embedded", "Text: a file, a folder or a hub data set; embedded: Python's own help.")


def tiny_encoder(seed: int) -> SentenceTransformer:
    """Mean pooling over a tiny BERT of random weights."""
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:  # the library reads its parts from folders
        BertModel(bert_config(), add_pooling_layer=False).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        part = Transformer(folder, max_seq_length=128)
    return SentenceTransformer(modules=[part, Pooling(part.get_embedding_dimension())])


def main(flags: Sequence[str] | None = None) -> dict[str, float]:
    """Train, keep the encoder in ``output_dir``, and evaluate on documents that were held out."""
    given, args = parse((EncoderArguments, Arguments), flags, description=str(__doc__))
    name = given.model_name_or_path
    model = tiny_encoder(args.seed) if name is None else SentenceTransformer(name)
    pairs: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for number, sentences in enumerate(Corpus(given.source)):
        own = [{"anchor": first, "positive": then} for first, then in itertools.pairwise(sentences)]
        pairs[number % 20 == 19].extend(own)
    train, held_out = (Dataset.from_list(each) for each in pairs)
    trainer = PairTrainer(
        model=model, args=args, train_dataset=train, eval_dataset=held_out,
        loss=MultipleNegativesRankingLoss(model),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics: dict[str, float] = trainer.evaluate()
    print(f"evaluation loss {metrics['eval_loss']:.4f}")
    return metrics


if __name__ == "__main__":
    main()
