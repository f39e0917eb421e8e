"""Which rows count: the sums of each layer against a textbook that sees the true rows alone, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig

import hf_soo
from hf_soo.bert.model import GatheredBertForPreTraining

D, CLASSES = 8, 4
Rows = Callable[[torch.Size], Tensor]


def lengths_mask(batch: int, width: int, *, left: bool = False) -> Tensor:
    """Ragged [B, T], the first row full; no transposition of it is itself."""
    lengths = torch.tensor([max(1, width - (3 * i) % width) for i in range(batch)])
    mask = torch.arange(width) < lengths[:, None]
    return mask.flip(1) if left else mask


def check(
    model: nn.Module, run: Callable[[nn.Module, Any], Tensor], true_rows: Callable[[str, Tensor], Tensor], *,
    compiled: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Compare what is collected in one backward pass with the sum of the true rows.

    Args:
        model: in float64.
        run: the model and the optimizer -> a loss.
        true_rows: a layer's name and its input -> which of its rows are no padding.
        compiled: under torch.compile.

    Returns:
        The true rows of each layer.
    """
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for layer_name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def note(m: nn.Module, args: tuple[Any, ...], at: str = layer_name) -> None:
                seen.setdefault(at, []).append(args[0].detach())

            handles.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        run(model, None)
    for handle in handles:
        handle.remove()
    optimizer = hf_soo.build_optimizer("eva", model, lr=0.1, exclude=["patch_embedding"])
    torch._dynamo.reset()
    run(torch.compile(model, backend="aot_eager") if compiled else model, optimizer).backward()
    counts = {}
    for at, (samples, sums, *_) in optimizer.stages.capture.buffers.items():
        rows = torch.cat([x[true_rows(at, x)] for x in seen[at]])
        counts[at] = float(len(rows))
        assert samples.item() == len(rows), f"{at}: {samples.item()} rows of {len(rows)}, input {seen[at][0].shape}"
        torch.testing.assert_close(sums[0], rows.sum(0), rtol=1e-11, atol=1e-12, msg=lambda m, at=at: f"{at}: {m}")
    assert counts
    return counts


class Tagger(nn.Module):
    """torch's encoder between two layers, with tokens [T, B, d] or [B, T, d] inside, and a head of either layout."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.enter = nn.Linear(D, D)
        block = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.head(self.encoder(self.enter(x), src_key_padding_mask=attention_mask == 0))
        return x if self.batch_first else x.transpose(0, 1)


class Flat(nn.Module):
    """Layers over flattened tokens, batch first or sequence first."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first, self.one, self.two = batch_first, nn.Linear(D, D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        batch, width = attention_mask.shape
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.two(torch.tanh(self.one(x.reshape(-1, D))))
        return x.view(batch, width, -1) if self.batch_first else x.view(width, batch, -1).transpose(0, 1)


class Heads(nn.Module):
    """A layer over each head's part of a token."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(D // 2, D // 2), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x.unflatten(-1, (2, D // 2)))).flatten(2))


class Plain(nn.Module):
    """No mask in the forward: the user tells it."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first, self.one, self.two = batch_first, nn.Linear(D, D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(torch.tanh(self.one(x if self.batch_first else x.transpose(0, 1))))
        return x if self.batch_first else x.transpose(0, 1)


def rows_of(mask: Tensor, batch_first: bool) -> Callable[[str, Tensor], Tensor]:
    def true_rows(name: str, x: Tensor) -> Tensor:
        own = mask if batch_first else mask.mT
        if x.ndim == 2:
            return own.flatten()
        return own if x.ndim == 3 else own[..., None].expand(x.shape[:-1])

    return true_rows


def token_loss(logits: Tensor, mask: Tensor) -> Tensor:
    labels = torch.arange(mask.numel()).view(mask.shape) % CLASSES
    return F.cross_entropy(logits.flatten(0, 1), torch.where(mask, labels, -100).flatten())


MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "encoder, batch first": (lambda: Tagger(True), True),
    "encoder, sequence first": (lambda: Tagger(False), False),
    "flattened, batch first": (lambda: Flat(True), True),
    "flattened, sequence first": (lambda: Flat(False), False),
    "heads": (Heads, True),
    "told, batch first": (lambda: Plain(True), True),
    "told, sequence first": (lambda: Plain(False), False),
}


@pytest.mark.parametrize("size", [(5, 5), (3, 7), (7, 3), (2, 2), (1, 6)], ids=str)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("kind", MODELS)
def test_layouts(kind: str, left: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    make, batch_first = MODELS[kind]
    mask, x = lengths_mask(*size, left=left), torch.randn(*size, D, dtype=torch.float64)

    def run(model: nn.Module, optimizer: Any) -> Tensor:
        if kind.startswith("told"):
            if optimizer is not None:
                optimizer.mask_rows(mask)
            return token_loss(model(x), mask)
        return token_loss(model(x, attention_mask=mask.long()), mask)

    check(make().double(), run, rows_of(mask, batch_first))


def test_a_layout_in_a_compiled_model() -> None:
    torch.manual_seed(0)
    make, batch_first = MODELS["flattened, sequence first"]
    mask, x = lengths_mask(5, 5), torch.randn(5, 5, D, dtype=torch.float64)
    check(
        make().double(), lambda model, _: token_loss(model(x, attention_mask=mask), mask), rows_of(mask, batch_first),
        compiled=True,
    )  # fmt: skip


SMALL = {"vocab_size": 40, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def ids(*shape: int) -> Tensor:
    return torch.randint(5, 40, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gathered_positions_as_many_as_the_width(compiled: bool) -> None:
    """The head counts the positions that are predicted, whatever the mask says, and no slot that is empty."""
    torch.manual_seed(0)
    mask = lengths_mask(4, 6)
    positions = torch.tensor([[1, 4, 5, 2, 3, 0], [1, 2, 0, 0, 0, 0], [2, 1, 3, 4, 5, 0], [1, 2, 0, 0, 0, 0]])
    inputs = {
        "input_ids": ids(4, 6), "attention_mask": mask.long(), "masked_positions": positions,
        "labels": torch.where(positions > 0, ids(4, 6), -100), "next_sentence_label": torch.tensor([0, 1, 1, 0]),
    }  # fmt: skip

    def true_rows(name: str, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return torch.ones(len(x), dtype=torch.bool)
        return positions > 0 if name.startswith("cls") else mask

    model = GatheredBertForPreTraining(BertConfig(**SMALL, **NO_DROPOUT)).double().train()
    counts = check(model, lambda model, _: model(**inputs).loss, true_rows, compiled=compiled)
    assert counts["cls.predictions.transform.dense"] == 14 and counts["bert.pooler.dense"] == 4


class Chooser(nn.Module):
    """Somebody's head over chosen positions, as many as the batch is wide."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.bert = transformers.BertModel(BertConfig(**SMALL, **NO_DROPOUT), add_pooling_layer=False)
        self.norm, self.one, self.two = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, chosen: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.how == "gather":
            hidden = hidden.gather(1, chosen[..., None].expand(-1, -1, D))
        elif self.how == "index":
            hidden = hidden[torch.arange(len(chosen))[:, None], chosen]
        return self.two(self.norm(F.gelu(self.one(F.dropout(self.norm(hidden), 0.0)))))


@pytest.mark.parametrize("how", ["gather", "index", "none"])
def test_a_head_over_chosen_positions_counts_them_all(how: str) -> None:
    torch.manual_seed(0)
    mask, chosen = (
        lengths_mask(4, 6),
        torch.tensor([[1, 2, 0, 1, 3, 2], [0, 1, 2, 2, 1, 0], [0] * 6, [2, 1, 0, 0, 1, 2]]),
    )

    def run(model: nn.Module, _: Any) -> Tensor:
        logits = model(ids(4, 6), mask.long(), chosen)
        return logits.square().mean() if how != "none" else token_loss(logits, mask)

    def true_rows(name: str, x: Tensor) -> Tensor:
        return torch.ones_like(mask) if how != "none" and not name.startswith("bert") else mask

    check(Chooser(how).double().train(), run, true_rows)


def test_a_decoder_as_wide_as_its_encoder() -> None:
    """Its own rows by its own mask, the encoder's by the encoder's, in attention across too."""
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=40, d_model=D, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, dropout=0.0, max_position_embeddings=16,
    )  # fmt: skip
    source, target = lengths_mask(4, 6), lengths_mask(4, 6).flip(0)
    inputs = {
        "input_ids": ids(4, 6), "attention_mask": source.long(), "decoder_input_ids": ids(4, 6),
        "decoder_attention_mask": target.long(), "labels": torch.where(target, ids(4, 6), -100),
    }  # fmt: skip

    def true_rows(name: str, x: Tensor) -> Tensor:
        across = "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name
        return source if "model.encoder" in name or across else target

    model = transformers.BartForConditionalGeneration(config).double().train()
    check(model, lambda model, _: model(**inputs).loss, true_rows)
    del inputs["decoder_attention_mask"]

    def all_of_its_own(name: str, x: Tensor) -> Tensor:
        return source if true_rows(name, x) is source else torch.ones_like(source)

    inputs["labels"] = ids(4, 6)
    model = transformers.BartForConditionalGeneration(config).double().train()
    check(model, lambda model, _: model(**inputs).loss, all_of_its_own)


def test_an_image_of_as_many_patches_as_the_text_has_tokens() -> None:
    torch.manual_seed(0)
    text = {key: value for key, value in SMALL.items()} | {"max_position_embeddings": 8, "eos_token_id": 39}
    vision = {key: value for key, value in SMALL.items() if key != "vocab_size"} | {"image_size": 4, "patch_size": 2}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=D))
    mask = lengths_mask(4, 5)

    def run(model: nn.Module, _: Any) -> Tensor:
        pixels = torch.randn(4, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return model(input_ids=ids(4, 5), attention_mask=mask.long(), pixel_values=pixels, return_loss=True).loss

    def true_rows(name: str, x: Tensor) -> Tensor:
        return mask if name.startswith("text_model") and x.ndim == 3 else torch.ones(x.shape[:-1], dtype=torch.bool)

    check(model.double().train(), run, true_rows)


def test_choices_are_examples() -> None:
    torch.manual_seed(0)
    mask = lengths_mask(6, 5).view(2, 3, 5)
    model = transformers.BertForMultipleChoice(BertConfig(**SMALL, **NO_DROPOUT)).double().train()
    inputs = {"input_ids": ids(2, 3, 5), "attention_mask": mask.long(), "labels": torch.tensor([0, 2])}

    def true_rows(name: str, x: Tensor) -> Tensor:
        return mask.view(6, 5) if x.ndim == 3 else torch.ones(len(x), dtype=torch.bool)

    check(model, lambda model, _: model(**inputs).loss, true_rows)


def test_xlnet_is_sequence_first_inside() -> None:
    torch.manual_seed(0)
    config = transformers.XLNetConfig(
        vocab_size=40, d_model=D, n_layer=2, n_head=2, d_inner=16, dropout=0.0, num_labels=CLASSES
    )
    mask = lengths_mask(5, 5)
    inputs = {
        "input_ids": ids(5, 5),
        "attention_mask": mask.long(),
        "labels": torch.where(mask, ids(5, 5) % CLASSES, -100),
    }

    def true_rows(name: str, x: Tensor) -> Tensor:
        return mask.mT if "ff." in name else mask

    check(transformers.XLNetForTokenClassification(config).double().train(), lambda m, _: m(**inputs).loss, true_rows)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.reentrant = nn.Linear(D, D), nn.Linear(D, CLASSES), reentrant

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        def body(x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)))

        result = checkpoint(body, x, use_reentrant=self.reentrant)
        assert isinstance(result, Tensor)
        return result


def test_two_passes_before_one_backward_pass_under_checkpointing() -> None:
    """Queries and documents: each pass by its own mask, though the first runs again after the second."""
    torch.manual_seed(0)
    first, second = lengths_mask(4, 6), lengths_mask(4, 6).flip(0)
    x = torch.randn(4, 6, D, dtype=torch.float64)
    remaining: list[Tensor] = []

    def run(model: nn.Module, _: Any) -> Tensor:
        remaining[:] = [first, second] * 2
        return token_loss(model(x, first), first) + token_loss(model(x, second), second)

    check(Checkpointed().double(), run, lambda name, _: remaining.pop(0))


def test_reentrant_checkpointing_cannot_tell_two_passes() -> None:
    first, second = lengths_mask(4, 6), lengths_mask(4, 6).flip(0)
    x = torch.randn(4, 6, D, dtype=torch.float64, requires_grad=True)
    model = Checkpointed(reentrant=True).double()
    optimizer = hf_soo.build_optimizer("eva", model, lr=0.1)
    for mask in (first, second):  # each with its backward pass: as ever
        token_loss(model(x, mask), mask).backward()
    assert optimizer.stages.capture.buffers["one"][0].item() == first.sum() + second.sum()
    loss = token_loss(model(x, first), first) + token_loss(model(x, second), second)
    with pytest.raises(NotImplementedError, match=r"2 forward passes with masks before one.*use_reentrant=False"):
        loss.backward()


# ---- the mean over an example's positions ----------------------------------------------------------------------------


def reduced(model: nn.Module, x: Tensor, mask: Tensor, steps: int = 3, **settings: Any) -> list[Tensor]:
    optimizer = hf_soo.build_optimizer("kfac_reduce", model, lr=0.1, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        if isinstance(model, Plain):
            optimizer.mask_rows(mask)
            token_loss(model(x), mask).backward()
        else:
            token_loss(model(x, mask), mask).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("make", [Tagger, Plain])
@pytest.mark.parametrize("size", [(3, 7), (7, 3)], ids=str)
def test_reduce_is_the_same_in_both_layouts(make: Callable[[bool], nn.Module], size: tuple[int, int]) -> None:
    mask, x = lengths_mask(*size), torch.randn(*size, D, dtype=torch.float64)
    after = []
    for batch_first in (True, False):
        torch.manual_seed(0)
        after.append(reduced(make(batch_first).double(), x, mask))
    for one, other in zip(*after, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11)  # fp64; sums in another order


def test_reduce_within_torchs_encoder_needs_no_mask() -> None:
    """The layout is that of the attention beside a layer, whatever the sizes."""
    x, after = torch.randn(5, 5, D, dtype=torch.float64), []
    for batch_first in (True, False):
        torch.manual_seed(0)
        encoder = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=batch_first).double()
        optimizer = hf_soo.build_optimizer("kfac_reduce", encoder, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            encoder(x if batch_first else x.transpose(0, 1)).square().mean().backward()
            optimizer.step()
        after.append([p.detach() for p in encoder.parameters()])
    for one, other in zip(*after, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11)  # fp64; sums in another order


def test_reduce_refuses_what_it_cannot_tell(caplog: pytest.LogCaptureFixture) -> None:
    mask, x = lengths_mask(5, 5), torch.randn(5, 5, D, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"cannot be told from positions.*batch_first=True.*kfac_expand"):
        reduced(Tagger(False).double(), x, mask)
    reduced(Tagger(False).double(), x, mask, exclude=["enter", "head"])
    assert not caplog.text
    reduced(Flat(True).double(), x, mask)
    assert "'reduce' in one, and in others like it: the input is rows without their examples" in caplog.text
    reduced(Heads().double(), x, mask)
    assert "'reduce' in two, and in others like it: the input is [B, T, d] with B = T: it is taken for" in caplog.text
