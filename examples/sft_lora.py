r"""Adapters (LoRA) fine-tuned on text by TRL's SFTTrainer, with MKOR over AdamW.

    pip install "hf-soo[clients]"
    python examples/sft_lora.py --config configs/lora/sft_lora_mkor.yaml --output_dir out/sft_lora
    accelerate launch examples/sft_lora.py --config configs/lora/sft_lora_mkor.yaml --source notes.txt \
        --model_name_or_path Qwen/Qwen2.5-0.5B --bf16 true --max_length 512 --output_dir out/qwen

Every flag of TRL's SFTConfig and of SecondOrderTrainingArguments is one here. With --resume_from_checkpoint FOLDER
(out/sft_lora/checkpoint-50) a run goes on and ends with the same adapters, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from peft import LoraConfig
from tiny import byte_tokenizer, llama, texts
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_soo.integrations.trainer import SecondOrderTrainerMixin, SecondOrderTrainingArguments
from hf_soo.runs.arguments import option, parse


@dataclass
class Arguments(SFTConfig, SecondOrderTrainingArguments):
    """TRL's class first."""


class LoraTrainer(SecondOrderTrainerMixin, SFTTrainer):
    """The mixin first."""


@dataclass
class AdapterArguments:
    """What is adapted, how, and to which text."""

    model_name_or_path: str | None = option(None, "Folder or hub name of a causal model; None: a tiny one over bytes.")
    source: str = option("embedded", "Text: a file, a folder or a hub data set; embedded: Python's own help.")
    lora_r: int = option(8, "Rank of the adapters.")
    lora_alpha: int = option(16, "Their scale is lora_alpha / lora_r.")
    lora_targets: str = option("all-linear", "The layers with adapters: a regular expression, or all-linear.")


def main(flags: Sequence[str] | None = None) -> dict[str, float]:
    """Train, keep the adapters in ``output_dir``, and evaluate on text that was held out."""
    given, args = parse((AdapterArguments, Arguments), flags, description=str(__doc__))
    name = given.model_name_or_path
    if name is None or AutoConfig.from_pretrained(name).vocab_size == 256:  # of hf-soo pretrain --task lm
        tokenizer = byte_tokenizer()
    else:
        tokenizer = AutoTokenizer.from_pretrained(name)
    model = llama(args.seed) if name is None else AutoModelForCausalLM.from_pretrained(name)
    train, held_out = (Dataset.from_dict({"text": part}) for part in texts(given.source))
    adapters = LoraConfig(
        r=given.lora_r, lora_alpha=given.lora_alpha, target_modules=given.lora_targets, task_type="CAUSAL_LM"
    )
    trainer = LoraTrainer(
        model=model, args=args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer,
        peft_config=adapters,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()  # the adapters alone: PeftModel.from_pretrained(model, output_dir) puts them back
    metrics: dict[str, float] = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    print(f"evaluation loss {metrics['eval_loss']:.4f}")
    return metrics


if __name__ == "__main__":
    main()
