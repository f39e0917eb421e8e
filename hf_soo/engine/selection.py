"""Which layers, or parameters, of a model a method moves, and why each other one is left to the base."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from hf_soo.engine.checks import require, shown
from hf_soo.engine.dtensors import full_shape
from hf_soo.engine.layers import Conv1DLayer, Conv1dLayer, Conv2dLayer, Layer, LinearLayer, ParameterLayer
from hf_soo.engine.passes.reads import ReadLayer, read_layers, readers_of


def _is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D, found by name so that transformers need not be installed."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def _as_layer(name: str, module: nn.Module) -> Layer | None:
    """The module as a Layer, or None if its weight is no matrix that a Kronecker factor describes."""
    if isinstance(module, nn.Linear) and getattr(module, "num_experts", None) != module.out_features:  # else a router
        return LinearLayer(name, module)
    if isinstance(module, nn.Conv2d):
        return Conv2dLayer(name, module)
    if isinstance(module, nn.Conv1d):
        return Conv1dLayer(name, module)
    if _is_transformers_conv1d(module):
        return Conv1DLayer(name, module)
    return None


@dataclass(frozen=True)
class Selection:
    """Which layers a method moves, and why each other matrix-like layer is left to the base.

    Args:
        layers: the layers to precondition, in the model's order.
        skipped: name of a module, or of a parameter, -> the reason why it is left to the base optimizer.
        meant: the reasons among them that are a choice: the user's patterns, embeddings, decoders and the like.
    """

    layers: list[Layer]
    skipped: dict[str, str]
    meant: frozenset[str] = frozenset()


_EMBEDDING, _DECODER, _TIED = "embedding", "vocabulary decoder", "weight tied to"
_COMPLEX = "complex numbers"
SCORES = "query or key of attention (queries_and_keys)"
"""Why a method leaves a layer that makes scores to the base."""
_SCORE_NAMES = re.compile(
    r"(^|[._])(w?(q|k|kv|qk|qkv)z?|query|key|c_attn)(_[^.]*)?(\.base_layer|\.lora_[AB]\.[^.]+)?$", re.IGNORECASE
)
"""Names of projections to queries and keys in transformers, alone or with the values; PEFT's parts of them."""
_ROTARY = re.compile(r"Rotary|R[oO]PE|Rope[A-Z]|RoFormer")
"""In the name of a class: what turns queries and keys by their positions, in transformers' families."""

SkipReason = Callable[[Layer], str | None]
"""Why a method cannot move a layer, or None."""


def _skip_nothing(layer: Layer) -> None:
    """For methods that can move every layer."""


def select_layers(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    skip_reason: SkipReason = _skip_nothing,
) -> Selection:
    """Choose the layers of a model that a method with Kronecker statistics moves.

    Args:
        model: the bare model (not wrapped in DistributedDataParallel).
        include: regular expressions; if given, only modules whose name matches one (``re.search``) are taken.
        exclude: regular expressions; modules whose name matches one are left to the base.
        skip_reason: why the method cannot move a layer.

    Returns:
        The chosen layers and the reasons for the others.

    Raises:
        ValueError: a pattern is no regular expression, or no layer is left.
    """
    owners, decoders, readers = _weight_owners(model), _decoders(model), readers_of(model)
    # what turns by positions serves the module that holds it: one tower of a model may be rotary, another not
    named = model.named_modules()
    turned = tuple({name[: name.rfind(".") + 1] for name, module in named if _ROTARY.search(type(module).__name__)})

    def candidates() -> Iterator[tuple[Layer, str, str | None]]:
        for name, module in model.named_modules():
            reader = readers.get(module)
            layer = ReadLayer(name, module, name, reader=reader) if reader is not None else _as_layer(name, module)
            for each in read_layers(name, module) if layer is None else [layer]:
                each.scores, each.rotary = _SCORE_NAMES.search(each.name) is not None, each.name.startswith(turned)
                yield each, each.stack or name, _reason_to_leave(each, name, owners, decoders)

    selection = _select(candidates(), include, exclude, skip_reason, "layers")
    tables = _embeddings(model)
    skipped = selection.skipped | {name: _EMBEDDING for name, module in model.named_modules() if module in tables}
    return Selection(selection.layers, skipped | _rest(model, selection.layers, skipped), selection.meant)


def _rest(model: nn.Module, layers: Sequence[Layer], skipped: Collection[str]) -> dict[str, str]:
    """The trained parameters that belong to no layer, chosen or skipped, and why none of them is one."""
    held = {id(parameter) for layer in layers for parameter in (layer.weight, layer.bias) if parameter is not None}
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.requires_grad and id(parameter) not in held and path not in skipped and name not in skipped:
                shape = list(full_shape(parameter))
                kind = type(module).__name__
                reads = f"{kind} reads these {shape} itself, which is followed for experts and routers alone"
                reasons[name] = reads if len(shape) > 1 else f"no matrix {shape}"
    return reasons


def select_parameters(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    skip_reason: SkipReason = _skip_nothing,
    everything: bool = False,
) -> Selection:
    """Choose the parameters of a model that a method without statistics moves, each on its own.

    Args:
        model: the bare model.
        include: as for ``select_layers``.
        exclude: as for ``select_layers``.
        skip_reason: why the method cannot move a parameter.
        everything: embeddings, tied weights and vocabulary decoders too.

    Returns:
        The chosen parameters and the reasons for the others.

    Raises:
        ValueError: a pattern is no regular expression, or no parameter is left.
    """
    decoders, tables = _decoders(model), _embeddings(model)
    modules = dict(model.named_modules())

    def candidates() -> Iterator[tuple[Layer, str, str | None]]:
        for full_name, parameter in model.named_parameters():
            name, _, attribute = full_name.rpartition(".")
            reason = None if parameter.requires_grad else "frozen"
            if parameter.is_complex():
                reason = reason or _COMPLEX
            if not everything and modules[name] in tables:  # a tied decoder has the embedding's name
                reason = reason or _EMBEDDING
            if not everything and modules[name] in decoders:
                reason = reason or _DECODER
            yield ParameterLayer(full_name, modules[name], attribute), name, reason

    return _select(candidates(), include, exclude, skip_reason, "parameters")


select_all_parameters = partial(select_parameters, everything=True)
"""``select_parameters`` with embeddings, tied weights and decoders."""


def _select(
    candidates: Iterator[tuple[Layer, str, str | None]],
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    skip_reason: SkipReason,
    kind: str,
) -> Selection:
    """Sort (layer, name that the patterns see, reason to leave it) into a Selection."""
    included, excluded = compile_patterns("include", include), compile_patterns("exclude", exclude)
    layers: list[Layer] = []
    skipped: dict[str, str] = {}
    meant = {_EMBEDDING, _DECODER, SCORES}
    for layer, name, reason in candidates:
        if reason is not None and reason.startswith(_TIED):
            meant.add(reason)
        reason = reason or skip_reason(layer)
        able = reason is None
        if reason is None and include is not None and not any(p.search(name) for p in included):
            reason = "no include pattern matches"
        if reason is None:
            reason = next((f"exclude={p.pattern!r}" for p in excluded if p.search(name)), None)
        if reason is None:
            layers.append(layer)
            continue
        skipped |= dict.fromkeys(layer.known_as, reason)
        if able:
            meant.add(reason)
    if not layers:
        raise ValueError(
            f"no layer selected: include={include!r}, exclude={exclude!r} leave none of {len(skipped)} {kind} "
            f"({dict(list(skipped.items())[:3])}); widen the patterns or use --optim adamw."
        )
    return Selection(layers, skipped, frozenset(meant))


def compile_patterns(what: str, patterns: Sequence[str] | None) -> list[re.Pattern[str]]:
    """The patterns compiled.

    Raises:
        ValueError: one of them is no regular expression, or a lone string was given instead of a list.
    """
    if isinstance(patterns, str):
        text = shown(patterns)
        raise ValueError(f"{what}={text} is a string; give a list of regular expressions: [{text}].")
    require(what, patterns, Sequence[str | re.Pattern[str]] | None)
    compiled = []
    for pattern in patterns or ():
        try:
            compiled.append(re.compile(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{what}={shown(pattern)} is no regular expression ({error}); escape dots as \\."
            ) from error
    return compiled


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """Parameter id -> names of the modules that hold it: more than one means that it is tied."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _decoders(model: nn.Module) -> set[nn.Module]:
    """The vocabulary decoders of the model and of models inside it, with what wraps them (PEFT) and is inside."""
    found = (getattr(module, "get_output_embeddings", lambda: None)() for module in model.modules())
    return {part for decoder in found if isinstance(decoder, nn.Module) for part in decoder.modules()}


def _embeddings(model: nn.Module) -> set[nn.Module]:
    """The embeddings of the model, and what lies in a wrapper of one: PEFT's adapters of it, trained tokens."""
    wrappers = [each for each in model.modules() if isinstance(getattr(each, "base_layer", each), nn.Embedding)]
    return {part for wrapper in wrappers for part in wrapper.modules()}


def _reason_to_leave(layer: Layer, path: str, owners: dict[int, list[str]], decoders: set[nn.Module]) -> str | None:
    """Why no Kronecker factor can describe this layer's gradient, or None."""
    module, weight = layer.module, layer.weight
    others = [name for name in owners.get(id(weight), []) if name != path]
    if others:
        return f"{_TIED} {others[0]}"
    if module in decoders:
        return _DECODER
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention reads this weight without calling the layer"
    if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter) and weight.is_floating_point():
        return "weight computed from other parameters"
    if weight.is_complex():
        return _COMPLEX
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return f"quantised weight ({getattr(weight, 'dtype', type(weight).__name__)})"
    if not weight.requires_grad:
        return "frozen weight"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups != 1:
        return f"grouped convolution (groups={module.groups})"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    return None
