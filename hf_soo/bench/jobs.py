"""The jobs of each suite, as data: the command lines of ``hf-soo`` (or pytest) that fill the tables and curves.

A job writes ``RESULTS/NAME.json``; ``suite.py`` adds where to, and goes through them. Each fits into a few minutes, or
keeps what it has measured and goes on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """One line of a suite.

    Args:
        name: of its JSON, under the results' folder.
        words: the command: `bench` or `plan` of hf-soo, or `pytest`.
    """

    name: str
    words: str


_LIGHT = "--memory false --bare false"
_LARGE2 = "bench --preset large2"
_CURVE = "bench --preset mini --vocabulary 1000 --batch_size 2 --seq_length 64 --rounds 2 --steps 1 " + _LIGHT
_METHODS = "--optim lamb,eva+sgd,mkor+adamw,mkor+lamb,foof+sgd,muon"
_OVER_MUON = "muon,mkor+muon,mkor:apply_to=momentum+muon"
_OFTEN = "--rounds 3 --steps 5"

_PLAN = "plan --model bert-large-uncased --beside adamw,lamb,kaisa,muon --seq 512 --batch 4096 --precision bf16"
_TABLE = (
    # few rows in a process: what one leaves behind in the allocator is the later ones' cost
    Job("large2", f"{_LARGE2} --optim adamw,lamb,sgd {_OFTEN}"),
    Job("large2_mkor", f"{_LARGE2} --optim mkor+adamw,mkor+lamb {_OFTEN}"),
    Job("large2_mkor16", f"{_LARGE2} --optim mkor:history=16+adamw,mkor:history=16+lamb {_OFTEN}"),
    Job("large2_eva", f"{_LARGE2} --optim eva+sgd,eva_f+sgd,eva_s+sgd {_OFTEN}"),
    Job("large2_rmsprop", f"{_LARGE2} --optim rf_rmsprop:batch_size=8+sgd {_OFTEN}"),
    Job("large2_muon", f"{_LARGE2} --optim {_OVER_MUON},newton_muon --rounds 2 --steps 1"),
    Job("large2_kfac", f"{_LARGE2} --optim kfac_expand,foof --rounds 2 --steps 1"),
    Job("large2_kaisa", f"{_LARGE2} --optim kaisa --rounds 1 --steps 1"),  # a round takes two minutes
    Job("large2_shampoo", f"{_LARGE2} --optim if_shampoo:batch_size=8,shampoo,soap --rounds 2 --steps 1"),
    Job("mini", "bench --preset mini --optim lamb,mkor+lamb,rf_rmsprop:batch_size=8+sgd --rounds 3 --steps 5"),
    # beside one another in one process, for the seconds of results/evidence
    Job("mini_bases", f"bench --preset mini --optim lamb,mkor+lamb,{_OVER_MUON},muon_mkor {_OFTEN}"),
    Job("mini_others", f"bench --preset mini --optim mkor+adamw,kfac_reduce+adamw,sgd,eva+sgd {_OFTEN}"),
    # torch's Muon, in bf16 whatever the device, takes minutes for a step of large2 on a CPU without units for it
    Job("mini_muon", "bench --preset mini --optim muon --peer torch.optim:Muon --rounds 2 --steps 1"),
)


def _curve(over: str, flag: str, at: tuple[int, ...], more: str = "") -> tuple[Job, ...]:
    return tuple(Job(f"{over}_{n}", f"{_CURVE} {_METHODS} --curve {flag} --{flag} {n} {more}".rstrip()) for n in at)


CPU = (
    *_TABLE,
    *_curve("width", "width", (256, 512, 1024), "--layers 1"),
    *_curve("width", "width", (2048,), "--layers 1 --rounds 1"),
    *_curve("layers", "layers", (2, 4, 8)),
    *_curve("batch", "batch_size", (2, 8, 32)),
    *_curve("ranks", "ranks", (1, 2, 4)),
    *(Job(f"plan_{n}", f"{_PLAN} --gpus {n}") for n in (1, 8, 64)),
)

_ON_GPU = "bench --device cuda --autocast true --launches true --batch_size 32 --seq_length 512"
_FAST = "--optim adamw,lamb,muon,mkor+adamw,mkor+lamb,mkor+muon --rounds 5 --steps 5"
# a refresh takes a minute or two for BERT-Large: once for each, and its bare products are not timed
_SLOW = "--optim foof+muon,kaisa,shampoo,soap --rounds 1 --steps 2 --bare false"
_PRETRAIN = (
    "bench --device cuda --autocast true --preset bert-base --batch_size 256 --seq_length 128 --train_minutes 4.5"
)

GPU = (
    Job("gpu_tests", "pytest -o addopts= -m cuda tests/methods/test_cuda.py"),
    Job("gpu_bert_base", f"{_ON_GPU} --preset bert-base {_FAST}"),
    Job("gpu_bert_large", f"{_ON_GPU} --preset bert-large {_FAST}"),
    Job("pretraining/lamb", f"{_PRETRAIN} --optim lamb --learning_rate 0.004"),
    Job("pretraining/mkor", f"{_PRETRAIN} --optim mkor+lamb --learning_rate 0.004"),
    Job("gpu_bert_base_dense", f"{_ON_GPU} --preset bert-base {_SLOW}"),
    Job("gpu_bert_large_dense", f"{_ON_GPU} --preset bert-large {_SLOW}"),
)

SUITES = {"cpu": CPU, "gpu": GPU}

TINY = {
    "bench": "--preset toy --device cpu --batch_size 2 --seq_length 16 --rounds 1 --steps 1 --memory false",
    "plan": "--model bert-tiny --seq 16 --batch 64",
    "pytest": "",
}
"""What comes after each command's own flags, and wins, in a dry run of a suite on any machine."""
