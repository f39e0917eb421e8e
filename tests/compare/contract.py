"""Plain loops in one process: every name of the registry, every form of a method, every setting, four small models.

Only the public API of hf_soo is used, so that this file runs on every version.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hf_soo
from tests.methods.forms import FORMS, VOCABULARY, WIDTH, Toy

STEPS = 12  # the default periods of 10, after 10 steps of warm-up, leave step 11 as a step without an update
SAVED_AT = 7
SIZES = (3, 3, 6)  # of a step's micro-batches
LENGTH = 5
DTYPES = {"float64": torch.float64, "float32": torch.float32}
Weights = dict[str, Tensor]
Batch = tuple[Tensor, Tensor, Tensor | None]  # inputs, labels, attention mask


class Images(nn.Module):
    """Two convolutions, the second strided and without bias, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 4, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.classifier = nn.Linear(16, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        patterns = torch.randn(VOCABULARY, 3, 6, 6, generator=generator, dtype=torch.float64)
        x = patterns[ids[:, 0]].to(self.first.weight.dtype)
        x = self.norm(self.second(torch.relu(self.first(x))))
        return self.classifier(torch.relu(x).flatten(1))[:, None].expand(-1, ids.shape[1], -1)


class Transposed(nn.Module):
    """transformers' Conv1D, whose weight is [in, out], between an embedding and a decoder of its own."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.wide, self.narrow = Conv1D(24, WIDTH), Conv1D(WIDTH, 24)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(x + self.narrow(torch.tanh(self.wide(x))))


class Bert(nn.Module):
    """One layer of BERT with its tied decoder; sentences are padded."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForMaskedLM

        self.bert = BertForMaskedLM(
            BertConfig(
                vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=24, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip

    def get_output_embeddings(self) -> nn.Module:
        return self.bert.get_output_embeddings()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.bert(input_ids=ids, attention_mask=mask).logits
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {"toy": Toy, "conv": Images, "conv1d": Transposed, "bert": Bert}

_MKOR: list[dict[str, Any]] = [
    {"update_period": 3, "warmup_updates": 2}, {"factor_decay": 0.5}, {"history": 3}, {"clip_value": 1e-3},
    {"kv_scale": "mean"}, {"kv_target": 2.0}, {"sides": "input"}, {"sides": "output"}, {"rank": 2, "history": 4},
    {"rescale": "none"}, {"exponent": 0.25}, {"gate": True}, {"queries_and_keys": False},
    {"representation": "dense", "rank": 2}, {"representation": "dense", "update_rule": "paper"},
    {"representation": "dense", "update_rule": "exact", "stabilizer_threshold": 1.5, "stabilizer_blend": 0.2},
    {"representation": "dense", "update_rule": "paper", "stabilizer_threshold": 1.5},
]  # fmt: skip
_EARLY: dict[str, Any] = {"patience": 2, "min_steps": 4, "rate_fraction": 100.0, "rate_decay": 0.9}
_EVA: list[dict[str, Any]] = [
    {"damping": 3.0}, {"kv_new_weight": 0.3}, {"kl_clip": 1e-6}, {"update_period": 4, "warmup_updates": 6},
    {"kv_scale": "sum"}, {"kv_scale": "mean"}, {"kv_scale": "unit", "damping": 3.0}, {"rescale": "norm"},
    {"rescale": "global"},
]  # fmt: skip
_FACTORS: list[dict[str, Any]] = [
    {"damping": 3.0}, {"damping_mode": "absolute"}, {"damping_mode": "relative", "inverse": "cholesky"},
    {"inverse": "eigen", "rescale": "none"}, {"factor_decay": 0.5, "update_period": 2, "inverse_period": 4},
    {"warmup_updates": 2}, {"rescale": "global", "kl_clip": 1e-3}, {"rescale": "kl_clip", "kl_clip": 1e-6},
    {"row_filter": "all"}, {"max_dim": 9}, {"factor_start": "identity"}, {"grad_workers": 1},
    {"epsilon": 0.1},
]  # fmt: skip
_BOTH_FACTORS: list[dict[str, Any]] = [
    *_FACTORS, {"fisher": "mc"}, {"loss_terms": 7, "damping_mode": "absolute"},
    {"factor_scale": "published", "damping_mode": "absolute", "inverse": "eigen"},
]  # fmt: skip
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "mkor": _MKOR,
    "muon_mkor": _MKOR,
    "mkor_h": [{**_EARLY, **more} for more in (*_MKOR[:2], {"rate_fraction": 1.0, "rate_decay": 0.1}, {"patience": 6})],
    "eva": _EVA,
    "eva_f": _EVA,
    "eva_s": [*_EVA, {"form": "separable", "exponent": 0.5}],
    "kfac_expand": _BOTH_FACTORS,
    "kfac_reduce": _BOTH_FACTORS,
    "kaisa": _BOTH_FACTORS,
    "foof": [*_FACTORS, {"input_blocks": 3}],
    "rf_rmsprop": [{"batch_size": 60}, {"factor_lr": 0.1}, {"eps": 0.1}, {"state_dtype": "bfloat16"}],
    "if_shampoo": [
        {"batch_size": 60}, {"factor_lr": 0.3}, {"riemannian_momentum": 0.1}, {"damping": 0.1}, {"update_period": 5},
        {"max_dim": 8, "large_axes": "diagonal"}, {"vector_axes": "dense"}, {"merge_kernels": False},
        {"schedule": "prototype"}, {"state_dtype": "bfloat16", "factor_lr": 0.3},
    ],
    "shampoo": [
        {"factor_decay": 1.0}, {"update_period": 5}, {"inverse_period": 4}, {"exponent": 0.5}, {"epsilon": 1e-2},
        {"grafting": "adam", "graft_decay": 0.9}, {"trace_scaling": True}, {"max_dim": 5},
    ],
}  # fmt: skip
SAMPLES = 12
BATCH_SIZE = {name: {"batch_size": SAMPLES} for name in ("if_shampoo", "rf_rmsprop")}
LEARNING_RATE = {"rmsprop": 1e-3, "kfac_expand": 1e-1, "kfac_reduce": 1e-1, "foof": 1e-1, "rf_rmsprop": 1e-1}
SMALL = {"adamw", "shampoo", "if_shampoo", "eva_s", "eva", "eva_f", "muon"}


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Row -> registry name and settings: the names, their forms, and their settings one after the other."""
    settings = {
        f"{name} {','.join(f'{key}={value}' for key, value in changed.items())}": (name, changed)
        for name, rows in SETTINGS.items()
        for changed in rows
    }
    return {name: (name, {}) for name in hf_soo.available()} | FORMS | settings


def rows(checkpoints: Path) -> Iterator[tuple[str, Callable[[], Weights]]]:
    """Every row's name, and what runs it; names and forms on every model, settings on the toy and the convolution.

    Args:
        checkpoints: where those of the older version lie, which are resumed; they are written where there is none.
    """
    for case, (name, changed) in cases().items():
        for model in MODELS if "=" not in case else ("toy", "conv"):
            for dtype in DTYPES if "=" not in case else ("float32",):
                yield f"contract/{case}/{model}/{dtype}", functools.partial(run, name, changed, model, dtype)
        if "=" not in case:
            yield (
                f"resume/loop/{case}",
                functools.partial(run, name, changed, "toy", "float64", checkpoints / f"{case}.pt"),
            )


def build(name: str, changed: dict[str, Any], model: nn.Module) -> hf_soo.PreconditionedOptimizer:
    """The row's optimizer."""
    lr = LEARNING_RATE.get(name, 1e-2 if name in SMALL else 2e-2)
    settings: dict[str, Any] = {"lr": lr, "weight_decay": 0.01, **BATCH_SIZE.get(name, {}), **changed}
    return hf_soo.build_optimizer(name, model, **settings)


def make(model: str, dtype: str, seed: int = 0) -> nn.Module:
    """A new model, the same for the same seed."""
    torch.manual_seed(seed)
    return MODELS[model]().to(DTYPES[dtype])


def run(name: str, changed: dict[str, Any], model: str, dtype: str, file: Path | None = None) -> Weights:
    """Train, and return the final weights.

    Args:
        name: in the registry.
        changed: settings.
        model: one of ``MODELS``.
        dtype: one of ``DTYPES``.
        file: a checkpoint of step ``SAVED_AT`` to go on from; it is written first if there is none.
    """
    net = make(model, dtype)
    optimizer, data = build(name, changed, net), batches(padded=model == "bert")
    torch.manual_seed(7)  # for labels drawn from the model
    if file is None:
        train(net, optimizer, data)
    else:
        if not file.exists():
            train(net, optimizer, data[:SAVED_AT])
            torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
            net = make(model, dtype, seed=5)
            optimizer = build(name, changed, net)
        saved = torch.load(file, weights_only=True)
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        train(net, optimizer, data[SAVED_AT:])
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def batches(*, padded: bool) -> list[Batch]:
    """One a step; some labels are left out, and of padded sentences all beyond their ends."""
    generator = torch.Generator().manual_seed(1)
    found: list[Batch] = []
    for _ in range(STEPS):
        ids, labels = (torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator) for _ in range(2))
        lengths = torch.randint(2, LENGTH + 1, (SAMPLES, 1), generator=generator)
        mask = (torch.arange(LENGTH) < lengths).long() if padded else None
        labels[:, -1] = -100
        found.append((ids, labels if mask is None else labels.where(mask == 1, -100), mask))
    return found


def train(model: nn.Module, optimizer: hf_soo.PreconditionedOptimizer, data: list[Batch]) -> None:
    """One step a batch, in micro-batches of ``SIZES``."""
    for ids, labels, mask in data:
        optimizer.zero_grad()
        count = (labels != -100).sum()
        masks: Any = [None] * len(SIZES) if mask is None else mask.split(SIZES)
        for x, y, m in zip(ids.split(SIZES), labels.split(SIZES), masks, strict=True):
            if m is not None:
                optimizer.mask_rows(m)
            logits = (model(x) if m is None else model(x, m)).flatten(0, 1)
            y, weight = y.flatten(), (y != -100).sum() / count
            loss = F.cross_entropy(logits.double(), y, ignore_index=-100) * weight
            if optimizer.wants_sampled_loss:
                drawn = torch.multinomial(logits.detach().float().softmax(-1), 1).squeeze(-1)
                drawn = drawn.where(y != -100, -100)
                optimizer.backward_sampled(F.cross_entropy(logits, drawn, ignore_index=-100) * weight)
            optimizer.report_loss(loss)
            loss.backward()
        optimizer.step()
