"""A script as run_summarization.py is written, with classes of its own: arguments with another default, and a loss."""

import sys
from dataclasses import dataclass, field

import torch
from torch.utils.data import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)


@dataclass
class Arguments(Seq2SeqTrainingArguments):
    optim: str = field(default="sgd", metadata={"help": "Another default than transformers'."})
    label_weight: float = field(default=0.5, metadata={"help": "What the loss is multiplied with."})


class Reversed(Dataset):
    """Random numbers, and the same backwards."""

    def __init__(self, size: int) -> None:
        self.ids = torch.randint(4, 40, (size, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.flip(0)}


class WeightedTrainer(Seq2SeqTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = self.args.label_weight * loss
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):  # type: ignore[no-untyped-def]
        super().log({**logs, "weight": self.args.label_weight}, *args, **kwargs)


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.manual_seed(args.seed)
    config = BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16, dropout=0.1,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        max_length=8, decoder_start_token_id=2, pad_token_id=1, eos_token_id=2, bos_token_id=0
    )
    data = Reversed(48)
    trainer = WeightedTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    if args.do_train:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
    if args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())
    sys.exit(7)


if __name__ == "__main__":
    main()
