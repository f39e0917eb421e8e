"""A loop of your own with Accelerate: one process, DDP, FSDP2 or DeepSpeed, whatever ``accelerate launch`` starts.

    python examples/accelerate_loop.py --optimizer mkor --base adamw --learning_rate 3e-3 --steps 100
    accelerate launch --config_file configs/accelerate/zero2_8.yaml examples/accelerate_loop.py --output_dir out/loop

A tiny decoder reads the English that comes with Python, byte by byte. State is saved every --save_steps steps, factors
included; the same command goes on from there and ends with the same weights, to the last bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from tiny import byte_tokenizer, llama, windows
from torch.utils.data import DataLoader

import hf_soo
from hf_soo.integrations.accelerate import bind


def read(flags: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--optimizer", default="mkor", choices=hf_soo.available())
    parser.add_argument("--base", help="the optimizer under a second-order method; None: the method's own")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save_steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=8, help="windows of 128 bytes for each process")
    parser.add_argument("--accumulation", type=int, default=1, help="batches to a step")
    parser.add_argument("--output_dir", default="out/accelerate_loop")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(flags)


def main(flags: Sequence[str] | None = None) -> float:
    """Train, go on from the last state where there is one, and evaluate."""
    given = read(flags)
    # of several processes on a CPU each would train alone, and say nothing, without `cpu`
    accelerator = Accelerator(gradient_accumulation_steps=given.accumulation, cpu=not torch.accelerator.is_available())
    set_seed(given.seed)
    model = llama(given.seed)
    optimizer = hf_soo.build_optimizer(given.optimizer, model, lr=given.learning_rate, base=given.base)
    train, held_out = windows("embedded", byte_tokenizer(), 128)
    saved = sorted(Path(given.output_dir).glob("state-*"))
    step = int(saved[-1].name.rpartition("-")[2]) if saved else 0
    each = given.batch_size * given.accumulation * accelerator.num_processes  # windows of a step
    order = torch.randint(len(train), (given.steps * each,), generator=torch.Generator().manual_seed(given.seed))
    batches = DataLoader([train[i] for i in order[step * each :].tolist()], batch_size=given.batch_size)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    bind(accelerator, optimizer)  # DeepSpeed: goes around the engine's step; fp16: tells the loss scale
    if saved:
        accelerator.load_state(str(saved[-1]))
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        step += accelerator.sync_gradients
        if accelerator.sync_gradients and step % given.save_steps == 0:
            accelerator.save_state(f"{given.output_dir}/state-{step:06}")
    model.eval()
    with torch.no_grad():
        held = [model(**send_to_device(each, accelerator.device)).loss for each in DataLoader(held_out, batch_size=8)]
    final = torch.stack(held).mean().item()
    accelerator.print(f"evaluation loss {final:.4f}")
    return final


if __name__ == "__main__":
    main()
