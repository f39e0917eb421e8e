"""Which rows of a layer's input are padding, and which axis holds the examples: told by where the input came from.

The model, and each part of it that has tokens or a mask of its own (an encoder, a decoder, one tower of two, torch's
TransformerEncoder), is watched by a hook that keeps the mask [B, T] it was given. A layer asks the innermost part that
it lies in. Where batch and length are equal, the layout is that of an attention beside the layer, or else the first of
[B, T] and [T, B] whose padding has no gradient.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from hf_soo.engine.layers import RowLayer
from hf_soo.engine.passes.backward import is_transformed

logger = logging.getLogger(__name__)

TOKENS = ("attention_mask", "decoder_attention_mask")  # true where there is a token
PADDING = (
    "src_key_padding_mask",
    "tgt_key_padding_mask",
    "key_padding_mask",
    "padding_mask",
)  # true where there is none
IDS = ("input_ids", "inputs_embeds", "decoder_input_ids")
NO_TEXT = ("pixel_values", "input_features", "input_values")
CROSS = {"encoder_hidden_states": "encoder_attention_mask", "memory": "memory_key_padding_mask"}
CHOOSING = ("Gather", "Index", "MaskedSelect", "Take")
"""How autograd's nodes are called that choose rows: what comes behind them has other rows than the tokens."""

Shape = tuple[int, ...]
T = TypeVar("T")


class Part:
    """A module with tokens of its own, and what its last forward pass in training was given."""

    def __init__(self, padding: Padding | None = None, name: str = "", names: Sequence[str] = ()) -> None:
        self.padding, self.name, self.names = padding, name, list(names)
        self.masked = any(each in TOKENS or each in PADDING for each in self.names)
        self.no_text = not self.masked and any(each in NO_TEXT for each in self.names)
        self.forget()

    def forget(self) -> None:
        """Drop what it was given."""
        self.waiting, self.followed = 0, False  # masks since a backward pass, and whether one has begun
        self.mask: Tensor | None = None
        self.other_mask: Tensor | None = None
        self.other: int | None = None
        self.shape: Shape | None = None

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook: keep the mask, that of a decoder's other input, and what the module says of its own parts."""
        if self.padding is None or not (self.padding.watching and module.training) or is_transformed():
            return
        if torch.is_grad_enabled():
            self.waiting, self.followed = 1 if self.followed or _in_backward() else self.waiting + 1, False
        # torch 2.9 compiles no zip(strict=False)
        given = {self.names[place]: each for place, each in enumerate(args[: len(self.names)])} | kwargs
        self.mask = _mask_of(given, ("decoder_attention_mask",) if "decoder_input_ids" in self.names else TOKENS[:1])
        self.shape = None if self.mask is None else tuple(self.mask.shape)
        explicit = self.padding.explicit
        if self.mask is not None and explicit is not None and explicit.shape == self.mask.shape:
            self.mask = self.mask & explicit
        for key in IDS[:2]:
            if self.shape is None and isinstance(given.get(key), Tensor):
                self.shape = tuple(given[key].shape[:2])
        for states, mask in CROSS.items():
            if given.get(states) is not None and not torch.compiler.is_compiling():
                self.other, self.other_mask = id(given[states]), _mask_of(given, (mask,))
        if (declare := getattr(module, "row_masks", None)) is not None:
            self.padding.declare(self.name, declare(**given))

    def __reduce__(self) -> tuple[type[Part], tuple[()]]:
        return Part, ()


def _scripted(self: Any, input: tuple[Tensor]) -> None:
    """What torch.jit.script takes the hook for."""


Part.take.__wrapped__ = _scripted  # type: ignore[attr-defined]


@dataclass
class _Place:
    """Where a layer lies.

    Args:
        parts: what it lies in, the innermost first.
        head: whether its tokens come from a part within the same part.
        sequence_first: what an attention beside it, or around both, says; None: there is none.
        declared: what the model says of the layer's rows; it is asked no further then.
        seen: whether the layer has run outside a backward pass.
    """

    parts: list[Part]
    head: bool
    sequence_first: bool | None
    declared: Tensor | None = None
    seen: bool = False


@dataclass
class Padding:
    """The masks of a model's forward passes.

    Args:
        model: the bare model.
        layers: those whose rows are asked for.

    Attributes:
        explicit: the mask [B, T] that the user has given.
        watching: whether forward passes are of interest.
    """

    model: nn.Module
    layers: Sequence[RowLayer]
    explicit: Tensor | None = None
    watching: bool = False
    parts: dict[str, Part] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Find the parts, and hook them."""
        for name, module in self.model.named_modules():
            names = list(inspect.signature(module.forward).parameters)
            if name == "" or self._is_part(name, names):
                self.parts[name] = Part(self, name, names)
        modules = dict(self.model.named_modules())
        self.sequence_first = any(_is_sequence_first(module) for module in modules.values())
        self.places = {layer.name: self._place(layer.name, modules) for layer in self.layers}
        self.handles = [
            modules[name].register_forward_pre_hook(part.take, prepend=True, with_kwargs=True)
            for name, part in self.parts.items()
            if part.masked or {*part.names} & {*IDS, *CROSS} or hasattr(modules[name], "row_masks")
        ]
        self._told: set[str] = set()

    def _is_part(self, name: str, names: Sequence[str]) -> bool:
        """Whether a module has tokens or a mask of its own: no block inside a model of which it gets the mask."""
        if any(each in PADDING or each in NO_TEXT for each in names):
            return True
        around = [part for part in _around(name, self.parts) if part.masked]
        return any(each in TOKENS for each in names) and (not around or any(each in IDS for each in names))

    def _place(self, name: str, modules: Mapping[str, nn.Module]) -> _Place:
        parts = list(_around(name, self.parts))
        inner = [part for part in self.parts.values() if part.masked and part.name.startswith(_inside(parts[0].name))]
        beside = (
            not child.batch_first
            for around in _around(name, modules)
            for child in around.children()
            if isinstance(child, nn.MultiheadAttention)
        )
        return _Place(parts, any(part is not parts[0] for part in inner), next(beside, None))

    def declare(self, part: str, masks: Mapping[str, Tensor]) -> None:
        """Keep what a part says of the rows of modules in it: name in the part -> mask."""
        for name, place in self.places.items():
            for inner, mask in masks.items():
                if f"{name}.".startswith(f"{_inside(part)}{inner}."):
                    place.declared = mask

    def forget(self) -> None:
        """Drop all masks: a step is done."""
        self.explicit = None
        for part in self.parts.values():
            part.forget()
        for place in self.places.values():
            place.declared, place.seen = None, False

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def masks(self, layer: RowLayer, x: Tensor) -> list[Tensor]:
        """What may be the mask of a layer's rows, each [*rows], the likeliest first; none: every row counts.

        Args:
            layer: the layer.
            x: its input [*rows, d_in], as the layer got it.

        Raises:
            NotImplementedError: the layer runs again in a backward pass, and it is unknown for which of several passes.
        """
        declared = self.places[layer.name].declared
        if layer.channel_dim != -1 or (layer.stack is not None and declared is None):  # a router chose an expert's rows
            return []
        if declared is not None:
            return [declared] if declared.shape == x.shape[:-1] else []
        return self.masks_around(layer, x)

    def masks_around(self, layer: RowLayer, x: Tensor) -> list[Tensor]:
        """The same of rows x that come to the module of a layer; the layer may choose of them."""
        place = self.places[layer.name]
        mask = self._mask(place, x)
        if mask is None or (place.head and _were_chosen(x)):
            return []
        layouts = _layouts(mask, x.shape[:-1])
        if len(layouts) == 2 and place.sequence_first is not None:
            layouts = layouts[place.sequence_first :][:1]
        return layouts

    def _mask(self, place: _Place, x: Tensor) -> Tensor | None:
        """The mask [B, T] of the tokens that x is made of."""
        place.seen = place.seen or not _in_backward()
        for part in place.parts:
            if part.other is not None and part.other == id(x):
                return part.other_mask
            if part.mask is not None:
                part.followed = _in_backward()
                if part.followed and part.waiting > 1 and not place.seen:
                    raise NotImplementedError(
                        f"{part.waiting} forward passes with masks before one backward pass, under reentrant gradient "
                        "checkpointing: a layer that runs again cannot tell its mask; checkpoint with "
                        "use_reentrant=False, or call backward after each pass."
                    )
                return part.mask
            if part.no_text and part.name:
                return None
        return self.explicit

    def examples(self, layer: RowLayer, x: Tensor) -> tuple[Shape | None, bool]:
        """How to tell examples from positions: the shape of flattened rows, and whether examples come second.

        Args:
            layer: the layer.
            x: its input [*rows, d_in].

        Raises:
            NotImplementedError: they cannot be told.
        """
        if layer.channel_dim != -1 or layer.stack is not None or x.ndim not in (2, 3):
            return None, False
        place, rows = self.places[layer.name], tuple(x.shape[:-1])
        known = next((part.shape for part in place.parts if part.shape is not None), None)
        if self.explicit is not None:
            known = tuple(self.explicit.shape)
        swapped = place.sequence_first
        if known is not None and known[0] != known[1] and rows in (known, known[::-1]):
            return None, rows != known
        if swapped is None and self.sequence_first and len(rows) == 2:
            raise NotImplementedError(
                f"'reduce' takes the mean over an example's positions, and in the input {tuple(x.shape)} of "
                f"{layer.name!r} examples cannot be told from positions: the model has sequence-first parts. Make them "
                "batch_first=True, call optimizer.mask_rows(mask) with the batch's mask [B, T], exclude the layer, or "
                "use kfac_expand."
            )
        if known is not None and swapped is not None and rows == (known[0] * known[1],):
            return (known[::-1] if swapped else known), swapped
        if swapped is None and rows == known and known[0] > 1:
            self._tell(layer.name, "[B, T, d] with B = T: it is taken for batch first")
        if known is not None and len(rows) == 1 and rows[0] != known[0]:
            self._tell(layer.name, "rows without their examples: each counts as one, as in 'expand'")
        return None, bool(swapped) and len(rows) == 2

    def _tell(self, name: str, what: str) -> None:
        if what not in self._told and not torch.compiler.is_compiling():
            self._told.add(what)
            logger.warning("'reduce' in %s, and in others like it: the input is %s.", name, what)


def first_without_gradient(masks: Tensor, grad: Tensor) -> Tensor:
    """The index of the first mask [C, *rows] that hides no row of ``grad`` [*rows, d] with a gradient, [1]; else 0."""
    live = (grad != 0).any(-1)
    return (live & ~masks).flatten(1).any(1).to(torch.uint8).argmin(0, keepdim=True)


def _in_backward() -> bool:
    """Whether a backward pass runs, and a checkpointed layer in it for the second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _inside(name: str) -> str:
    """What the names of modules inside a module begin with."""
    return f"{name}." if name else ""


def _around(name: str, of: Mapping[str, T]) -> Iterator[T]:
    """What belongs to the modules around a module, the innermost first, and the model itself last."""
    while True:
        name = name.rpartition(".")[0]
        if name in of:
            yield of[name]
        if not name:
            return


def _is_sequence_first(module: nn.Module) -> bool:
    """Whether it is one of torch's that take [T, B, d]."""
    return isinstance(module, nn.MultiheadAttention | nn.RNNBase) and not module.batch_first


def _mask_of(given: Mapping[str, Any], tokens: Sequence[str]) -> Tensor | None:
    """The first mask [B, T] among what a module was given, true for tokens."""
    for key in tokens:
        if isinstance(mask := given.get(key), Tensor) and mask.ndim == 2:
            return mask == 0 if key.endswith("padding_mask") else mask != 0
    for key in PADDING:
        if isinstance(mask := given.get(key), Tensor) and mask.ndim == 2:
            return mask == 0
    return None


def _layouts(mask: Tensor, rows: torch.Size) -> list[Tensor]:
    """The mask [B, T] as a mask of rows, batch first and sequence first, where it fits."""
    if rows == mask.shape != mask.shape[::-1]:
        return [mask]
    if len(rows) == 1:
        fitting = [each.flatten() for each in (mask, mask.mT) if each.numel() == rows[0]]
    else:
        fitting = [each for each in (mask, mask.mT) if each.shape == rows[:2]]
    if len(rows) > 2:  # a row for each head of a token
        more = [1] * (len(rows) - 2)
        fitting = [each.reshape(*each.shape, *more).expand(rows) for each in fitting]
    return fitting[:1] if 1 in mask.shape else fitting  # two that are one


def _were_chosen(x: Tensor) -> bool:
    """Whether rows were chosen on the way from the last sum to x; a compiled graph has no record of it."""
    node = None if torch.compiler.is_compiling() else x.grad_fn
    for _ in range(16):
        if node is None:
            return False
        if node.name().startswith(CHOOSING):
            return True
        inputs = [each for each, _ in node.next_functions if each is not None and not _is_of_a_weight(each)]
        node = inputs[0] if len(inputs) == 1 else None
    return False


def _is_of_a_weight(node: Node | None) -> bool:
    """Whether a node leads to a leaf in a step or two."""
    for _ in range(3):
        if node is None or node.name().endswith("AccumulateGrad"):
            return True
        if len(node.next_functions) != 1 or node.name().startswith((*CHOOSING, "Embedding")):
            return False
        node = node.next_functions[0][0]
    return False
