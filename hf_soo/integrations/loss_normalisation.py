"""Whether Trainer may leave the division of a model's loss to the model."""

from __future__ import annotations

import ast
import inspect
import textwrap

from torch import nn


def ignores_loss_kwargs(model: nn.Module) -> bool:
    """Whether a model takes ``num_items_in_batch`` in ``**kwargs`` but does not divide its loss by it.

    Read from the source of its ``forward``: transformers' heads that keep the promise hand ``**kwargs`` to
    ``self.loss_function``. A model that says ``accepts_loss_kwargs`` itself is believed.
    """
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()  # type: ignore[operator]
    if hasattr(model, "accepts_loss_kwargs"):
        return not model.accepts_loss_kwargs
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(model).forward).parameters.values()):
        return False
    for forward in (inspect.unwrap(vars(cls)["forward"]) for cls in type(model).__mro__ if "forward" in vars(cls)):
        try:
            source = inspect.getsource(forward)
        except OSError:  # no source at hand (interactive, frozen): believe Trainer
            return False
        if "num_items_in_batch" in source or _gives_kwargs_to_the_loss(source):
            return False
        if "super().forward" not in source:
            return True
    return False


def _gives_kwargs_to_the_loss(source: str) -> bool:
    """Whether ``self.loss_function`` is called with ``**kwargs``, or is handed on to code that is not seen here."""
    if "loss_function" not in source:
        return False
    try:
        tree = ast.parse(textwrap.dedent(source))
    except SyntaxError:  # a string that starts at the margin: believe Trainer
        return True
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    losses = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "loss_function"]
    return not losses or any(keyword.arg is None for call in losses for keyword in call.keywords)
