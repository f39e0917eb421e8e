"""Low-rank adapters (LoRA, Hu et al. 2021; arXiv 2106.09685) under a new head, by PEFT: W stays, W + (α/r) B A is used.

Checkpoints hold adapters and head; what is kept at the end are whole weights, with the adapters in them, which load as
those of any other run.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import nn

from hf_soo.glue.model import GlueModelArguments
from hf_soo.runs.finetuning import FineTuningTrainer


def with_adapters(model: nn.Module, given: GlueModelArguments) -> nn.Module:
    """The model with its weights frozen, adapters beside some of them, and its head trainable.

    Args:
        model: with its head.
        given: rank, scale, and which layers.

    Raises:
        ValueError: PEFT is not installed, or the model has no such layers.
    """
    if find_spec("peft") is None:
        raise ValueError(f"lora_r={given.lora_r} needs PEFT, which is not installed; pip install 'hf-soo[lora]'.")
    from peft import LoraConfig, get_peft_model

    assert given.lora_r is not None
    targets: Any = given.lora_targets
    config = LoraConfig(
        task_type="SEQ_CLS",  # the head is trained and kept too
        r=given.lora_r,
        lora_alpha=given.alpha,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
    )
    try:
        adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        named = f"lora_targets={given.lora_targets!r} with a {type(model).__name__}"
        raise ValueError(f"{named}: {error}; name layers that it has (query, value), or all-linear.") from error
    return adapted


class AdapterTrainer(FineTuningTrainer):
    """Keeps whole weights at the end, and adapters in checkpoints."""

    make_adapted: Callable[[], nn.Module]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; without a folder, into `output_dir` with the adapters merged into the weights."""
        if output_dir is not None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._show(True)  # an average of the weights, where they are evaluated with one
        if not self.args.should_save:
            return
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        # Into a new one: taken out of the trained weights again, adapters leave rounding errors behind.
        whole: Any = self.make_adapted()
        trained = get_peft_model_state_dict(self.accelerator.unwrap_model(self.model))
        set_peft_model_state_dict(whole, {name: value.cpu() for name, value in trained.items()})
        tokenizer: Any = self.processing_class
        for kept in (whole.merge_and_unload(), tokenizer):
            kept.save_pretrained(self.args.output_dir)
