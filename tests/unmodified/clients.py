"""A script of TRL's SFTTrainer and of sentence-transformers' Trainer, one after the other."""

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
    models,
)
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from tests.clients.toys import bert_folder, llama, sentence, tokenizer


@dataclass
class ScriptArguments:
    folder: str
    optimizer: str = "mkor"
    resume: bool = False


def common(script: ScriptArguments, name: str) -> dict[str, object]:
    chosen = {"optim": "mkor", "base_optim": "adamw", "optim_args": "update_period=2"}
    return {
        "output_dir": f"{script.folder}/{name}", "max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 2,
        "learning_rate": 5e-3, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False,
        **(chosen if script.optimizer == "mkor" else {"optim": script.optimizer}),
    }  # fmt: skip


def finish(trainer, script: ScriptArguments, *modules: torch.nn.Module) -> None:  # type: ignore[no-untyped-def]
    folder = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if script.resume else None)
    torch.save([module.state_dict() for module in (trainer.model, *modules)], folder / "end.pt")


def main() -> None:
    (script,) = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()
    texts = Dataset.from_dict({"text": [sentence(i) for i in range(16)]})
    torch.manual_seed(0)
    sft = SFTTrainer(
        model=llama(), args=SFTConfig(max_length=16, **common(script, "sft")), train_dataset=texts,
        processing_class=tokenizer(),
    )  # fmt: skip
    finish(sft, script)
    torch.manual_seed(0)
    encoder = bert_folder(Path(script.folder) / "encoder")
    model = SentenceTransformer(
        modules=[models.Transformer(encoder, max_seq_length=16), models.Pooling(16)], device="cpu"
    )
    loss = losses.SoftmaxLoss(model, 16, num_labels=2)
    pairs = {"a": [sentence(i, 4) for i in range(16)], "b": [sentence(i + 9, 7) for i in range(16)]}
    data = Dataset.from_dict({**pairs, "label": [i % 2 for i in range(16)]})
    args = SentenceTransformerTrainingArguments(**common(script, "pairs"))
    finish(SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss), script, loss)


if __name__ == "__main__":
    main()
