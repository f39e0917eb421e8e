"""transformers' own Trainer, as it is, with a second-order optimizer: one process, or several under DDP.

    python examples/stock_trainer.py --optimizer mkor --base adamw --learning_rate 1e-3 --max_steps 100
    torchrun --nproc_per_node 2 examples/stock_trainer.py --optimizer eva_f --base sgd --learning_rate 0.1

A tiny BERT guesses masked bytes of the English that comes with Python. A stock Trainer saves the factors within the
optimizer's state, so --resume_from_checkpoint FOLDER goes on to the last bit. FSDP2 and DeepSpeed need
SecondOrderTrainer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tiny import bert_config, byte_tokenizer, windows
from torch import Tensor
from transformers import BertForMaskedLM, HfArgumentParser, Trainer, TrainingArguments, set_seed

import hf_soo
from hf_soo.integrations.trainer import optimizer_factory


def hide(examples: list[dict[str, Tensor]], mask: int, seed: int) -> list[dict[str, Tensor]]:
    """15 % of the bytes behind a mask, and those alone as labels; the same in every epoch, so that a run can go on."""
    generator, hidden = torch.Generator().manual_seed(seed), []
    for ids in (each["input_ids"] for each in examples):
        chosen = torch.rand(ids.shape, generator=generator) < 0.15
        hidden.append({"input_ids": ids.masked_fill(chosen, mask), "labels": ids.masked_fill(~chosen, -100)})
    return hidden


def main(flags: Sequence[str] | None = None) -> dict[str, float]:
    """Train and evaluate; every flag of TrainingArguments is one, but that --optim has no say."""
    parser = HfArgumentParser(TrainingArguments)
    parser.add_argument("--optimizer", default="mkor", choices=hf_soo.available())
    parser.add_argument("--base", help="the optimizer under a second-order method; the method's own by default")
    args, own = parser.parse_args_into_dataclasses(flags)
    set_seed(args.seed)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    model = BertForMaskedLM(bert_config(len(tokenizer)))
    model.accepts_loss_kwargs = False  # else a stock Trainer makes the loss of BERT's heads too large
    train, held_out = (hide(each, tokenizer.mask_token_id, args.seed) for each in windows("embedded", tokenizer, 128))
    factory = optimizer_factory(own.optimizer, lr=args.learning_rate, base=own.base, weight_decay=args.weight_decay)
    trainer = Trainer(
        model=model, args=args, train_dataset=train, eval_dataset=held_out, optimizer_cls_and_kwargs=factory
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics: dict[str, float] = trainer.evaluate()
    print(f"evaluation loss {metrics['eval_loss']:.4f}")
    return metrics


if __name__ == "__main__":
    main()
