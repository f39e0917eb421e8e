"""How long the preconditioned gradient may be: scale factors computed from squared norms, without host syncs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from hf_soo.engine.gradients import TransformNorms


class Rescale(Protocol):
    """A rule for the length of P."""

    joint: bool  # True if the scales of all layers depend on each other

    def scales(self, moved: Sequence[TransformNorms], learning_rates: Sequence[Tensor]) -> list[Tensor] | None:
        """Scale factors [L] for each batch of layers, or None to leave P alone; rates are given if ``joint``."""


class NoRescale:
    """P as it is."""

    joint = False

    def scales(self, moved: Sequence[TransformNorms], learning_rates: Sequence[Tensor]) -> None:
        """None."""


class MatchNorm:
    """|P| = |G| for each layer, weight and bias together (MKOR, Algorithm 1, line 6)."""

    joint = False

    def scales(self, moved: Sequence[TransformNorms], learning_rates: Sequence[Tensor]) -> list[Tensor]:
        """|G| / |P|; 1 where P is 0 or a norm is not finite."""
        ratios = [m.before.sqrt() / m.after.sqrt() for m in moved]
        return [torch.where(r.isfinite() & (r > 0), r, 1.0) for r in ratios]


class KLClip:
    """ν = min(1, √(κ / Σ η²⟨P, G⟩)) over all layers, η the scheduled learning rate (K-FAC, Eva)."""

    joint = True

    def __init__(self, kl_clip: float) -> None:
        """Clip the step's predicted KL divergence at κ > 0."""
        self.kl_clip = kl_clip

    def scales(self, moved: Sequence[TransformNorms], learning_rates: Sequence[Tensor]) -> list[Tensor]:
        """The same ν for every layer; 1 if the sum is 0. A layer whose ⟨P, G⟩ is not finite does not count."""
        moved, unit = _in_one_unit(moved)
        terms = [lr.square() * m.inner for m, lr in zip(moved, learning_rates, strict=True)]
        total = torch.stack([torch.where(term.isfinite(), term, 0.0).sum() for term in terms]).sum()
        nu = (self.kl_clip / total).sqrt() / unit
        nu = torch.where(nu.isfinite() & (total > 0), nu, 1.0).clamp(max=1.0)
        return [nu.expand_as(m.inner) for m in moved]


class _GlobalNorm:
    """√(Σ|G|² / Σ|P|²) over all layers: the step is as long as the base's own would be (Eva's code, κ = 0)."""

    joint = True

    def scales(self, moved: Sequence[TransformNorms], learning_rates: Sequence[Tensor]) -> list[Tensor]:
        """The same factor for every layer; 1 if it is 0 or not finite. A layer whose P is not finite does not count."""
        moved, _ = _in_one_unit(moved)
        usable = [m.before.isfinite() & m.after.isfinite() for m in moved]
        before, after = (
            torch.stack([torch.where(ok, norm, 0.0).sum() for ok, norm in zip(usable, norms, strict=True)]).sum()
            for norms in ([m.before for m in moved], [m.after for m in moved])
        )
        ratio = (before / after).sqrt()
        ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
        return [ratio.expand_as(m.inner) for m in moved]


def _in_one_unit(moved: Sequence[TransformNorms]) -> tuple[Sequence[TransformNorms], Tensor | float]:
    """Squares of all layers in the largest unit that one of them has, which comes with them."""
    if all(m.unit is None for m in moved):
        return moved, 1.0
    units = [torch.ones_like(m.before) if m.unit is None else m.unit for m in moved]
    largest = torch.stack([unit.max() for unit in units]).max()
    shares = [(unit / largest).square() for unit in units]
    return [
        TransformNorms(*(square * share for square in m.tensors())) for m, share in zip(moved, shares, strict=True)
    ], largest


def rates_of(rates: Sequence[float | Tensor], like: Tensor) -> Tensor:
    """Learning rates [L], which may be tensors; none is read by the host."""
    if not any(isinstance(rate, Tensor) for rate in rates):
        return like.new_tensor(rates)
    return torch.stack([torch.as_tensor(rate, dtype=like.dtype, device=like.device).view(()) for rate in rates])


RescaleName = Literal["kl_clip", "global", "norm", "none"]
DEFAULT_KL_CLIP = 1e-3


def make_rescale(rescale: RescaleName, kl_clip: float | None) -> Rescale:
    """The rule that a method's two settings name, checked.

    Args:
        rescale: "kl_clip", "global" (norms over all layers), "norm" (``MatchNorm``) or "none".
        kl_clip: κ of the KL clip; None: no clip.

    Returns:
        The rule.

    Raises:
        ValueError: a value is out of range, or the two contradict each other.
    """
    if rescale != "kl_clip" and kl_clip not in (None, DEFAULT_KL_CLIP):
        raise ValueError(f"kl_clip={kl_clip} has no effect with rescale={rescale!r}; leave one of the two out.")
    if rescale == "kl_clip":
        return NoRescale() if kl_clip is None else KLClip(kl_clip)
    rules: dict[str, type[Rescale]] = {"global": _GlobalNorm, "norm": MatchNorm, "none": NoRescale}
    return rules[rescale]()
