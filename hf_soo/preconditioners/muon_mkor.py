"""MKOR on Muon's momentum, in all layers but attention's queries and keys: the form that our own runs favour.

With Muon's (Nesterov) momentum M of a matrix, and the factors L⁻¹, R⁻¹ that `mkor` learns from its gradients,

    P = L⁻¹ M R⁻¹             P = M for queries, keys and what `mkor` leaves to its base
    W ← W - η s polar(P)      s: Muon's scale for the shape

The mean input is the strongest direction of R: along it a step moves all outputs alike, so it is the stiffest one, and
Muon steps along it as far as along any other; R⁻¹ damps it. In queries and keys that goes wrong where the model turns
them by their positions (rotary): the mean query and the mean key, turned, are then the scores of places, which
attention learns first and in no other way. With learnt positions a mean key shifts all scores of a query alike, which
the softmax does not see, and little is lost. docs/results.md has the runs, layer by layer and with both positions.

Deviation: the paper puts MKOR on every layer's gradient, in front of LAMB; that is `mkor`, of which this is
`base="muon"`, `apply_to="momentum"` and `queries_and_keys=False`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_soo.engine.preconditioner import Method
from hf_soo.preconditioners.mkor import MKOR, MKORConfig


@dataclass(frozen=True)
class MuonMKORConfig(MKORConfig):
    """MKOR without the queries and keys of attention."""

    queries_and_keys: Literal["auto"] | bool = False


METHOD = Method(
    "muon_mkor",
    "MKOR on Muon's momentum, without queries and keys",
    base="muon",
    config=MuonMKORConfig,
    make=MKOR,
    apply_to="momentum",
)
