"""Is the run second-order? Per-layer health, kept on the device and read only when somebody asks."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from hf_soo.engine.gradients import TransformNorms
from hf_soo.engine.preconditioner import Outcome, Updated

logger = logging.getLogger(__name__)

CHECK_PERIOD = 100
"""Steps between the checks that read a few numbers from the device."""

LOST = (Outcome.NO_ROWS, Outcome.NOT_FINITE, Outcome.FAILED)
"""Outcomes that leave a layer with older factors than the others."""

NORMS = {"input": "a_norm2", "output": "b_norm2", "gradient": "g_norm2"}
"""What the squared norm of a side's statistics is called."""

INERT_COSINE = 0.9999
"""A direction closer to the gradient than this has not been changed."""


class Diagnostics:
    """Records of the last step and the last update, and the warnings drawn from them."""

    def __init__(self, sides: tuple[str, ...]) -> None:
        """Start with nothing recorded.

        Args:
            sides: what the method tells apart, ``Preconditioner.side_names``.
        """
        self._sides = sides
        self._moved: list[tuple[list[str], TransformNorms]] = []
        self._fresh = False
        self._updated: list[tuple[list[str], Updated]] = []
        self._refreshed: list[tuple[list[str], Tensor]] = []
        self._lowest_cosine: Tensor | None = None
        self._warned_inert = False
        self._warned_layers: set[str] = set()

    def begin_update(self) -> None:
        """Forget the last update."""
        self._updated = []

    def begin_refresh(self) -> None:
        """Forget the last refresh."""
        self._refreshed = []

    def record_update(self, names: list[str], updated: Updated) -> None:
        """Keep what an update of the named layers saw."""
        self._updated.append((names, updated))

    def record_refresh(self, names: list[str], outcomes: Tensor) -> None:
        """Keep what became of the inverses of the named layers, [L, sides]."""
        self._refreshed.append((names, outcomes))

    def record_transform(self, moved: list[tuple[list[str], TransformNorms]]) -> None:
        """Keep what this step's transforms of the named layers did; the last step's are forgotten."""
        self._moved, self._fresh = moved, True

    def check(self, step: int, method: str) -> None:
        """After step 1 and each CHECK_PERIOD: warn, once, of an inert run and of layers without statistics.

        Args:
            step: optimizer steps done.
            method: the optimizer's name, for the message.
        """
        if step == 1:  # a model in eval mode, a layer that is never called: say so before hours are spent
            self._warn_of_layers(method, self._without_gradient())
        self._follow_cosines()
        if step % CHECK_PERIOD or self._lowest_cosine is None:
            return
        lowest = self._lowest_cosine.item()
        self._lowest_cosine = None
        if lowest > INERT_COSINE and not self._warned_inert:
            self._warned_inert = True
            logger.warning(
                "%s has not changed the direction of any layer's gradient in %d steps (lowest cos(G, P) %.6f): this "
                "run is first-order. Look at optimizer.diagnostics(); smaller damping or kv_scale='unit' may help.",
                method, CHECK_PERIOD, lowest,
            )  # fmt: skip
        self._warn_of_layers(method)

    def _follow_cosines(self) -> None:
        """Take the last step into the lowest cos(G, P) so far: a few operations for all layers of a device together."""
        by_device: dict[torch.device, list[TransformNorms]] = {}
        for _, moved in self._moved if self._fresh else ():
            by_device.setdefault(moved.before.device, []).append(moved)
        for records in by_device.values():
            norms = (torch.cat(each) for each in zip(*(moved.tensors() for moved in records), strict=True))
            lowest = TransformNorms(*norms).cosine().min()
            before = self._lowest_cosine
            self._lowest_cosine = lowest if before is None else torch.minimum(before.to(lowest.device), lowest)
        self._fresh = False

    def _without_gradient(self) -> set[str]:
        """The layers whose gradient is 0 in this step: an adapter's A, while its B is."""
        return {
            name for names, moved in self._moved for name, length in zip(names, moved.before.tolist(), strict=True)
            if not length
        }  # fmt: skip

    def _warn_of_layers(self, method: str, but: Collection[str] = ()) -> None:
        """Name the layers whose statistics could not be used at the last update, each once."""
        lost: dict[str, list[str]] = {}
        for name, outcomes in self._outcomes().items():
            bad = {outcome for outcome in outcomes if outcome in LOST}
            if bad and name not in self._warned_layers and name not in but:
                self._warned_layers.add(name)
                lost.setdefault(max(bad).text, []).append(name)
        for reason, names in lost.items():
            logger.warning("%s keeps the old factors of %d layers (%s): %s", method, len(names), reason, names)

    def without_rows(self) -> set[str]:
        """The layers that got no input at the last update."""
        return {name for name, outcomes in self._outcomes().items() if Outcome.NO_ROWS in outcomes}

    def _outcomes(self) -> dict[str, list[Outcome]]:
        """Per layer and side: what became of it at the last refresh if that failed, else at the last update."""
        table: dict[str, list[Outcome]] = {}
        records = [(names, updated.outcomes) for names, updated in self._updated] + self._refreshed
        for names, outcomes in records:
            for name, codes in zip(names, outcomes.tolist(), strict=True):
                before = table.get(name, [Outcome.UPDATED] * len(codes))
                table[name] = [Outcome(new) if new else old for new, old in zip(codes, before, strict=True)]
        return table

    def rows(self, distances: Iterable[tuple[str, list[float]]] = ()) -> dict[str, dict[str, float | str]]:
        """Per layer: cos(G, P) of the last step; |a|², |b|² and what became of each side at the last update.

        Reads from the device: one host sync for each group of layers.

        Args:
            distances: a layer's name and |F - I| of each of its sides, to stand there too.
        """
        table: dict[str, dict[str, float | str]] = {}
        for names, moved in self._moved:
            finite = moved.after.isfinite().tolist()
            for name, cosine, ok in zip(names, moved.cosine().tolist(), finite, strict=True):
                table[name] = {"cos": cosine, "fallback": float(not ok)}
        outcomes = self._outcomes()
        for names, updated in self._updated:
            for name, norms in zip(names, updated.norms.tolist(), strict=True):
                row = table.setdefault(name, {})
                row |= dict(zip((NORMS[side] for side in self._sides), norms, strict=True))
                texts = (outcome.text for outcome in outcomes[name])
                row |= dict(zip((f"{side}_side" for side in self._sides), texts, strict=True))
        for name, each in distances:
            row = table.setdefault(name, {})
            row |= dict(zip((f"{side}_distance" for side in self._sides), each, strict=True))
        return table

    def health(self, layers: Sequence[str]) -> dict[str, float]:
        """A few numbers for a log line; empty before the first step, or without layers.

        Args:
            layers: the names of all layers that the method moves.

        Returns:
            ``cos_median`` and ``cos_min`` of cos(G, P), ``fallback_layers`` (no gradient, no statistics at the last
            update, or a P that was not finite) and ``noise_layers`` (a side that was rounding noise).
        """
        rows = self.rows()
        cosines = [float(row["cos"]) for row in rows.values() if "cos" in row]
        if not cosines:
            return {}
        outcomes = self._outcomes()
        fallback = {name for name in layers if "cos" not in rows.get(name, {}) or rows[name]["fallback"]}
        fallback |= {name for name, codes in outcomes.items() if any(code in LOST for code in codes)}
        return {
            "cos_median": statistics.median(cosines),
            "cos_min": min(cosines),
            "fallback_layers": float(len(fallback)),
            "noise_layers": float(sum(Outcome.NOISE in codes for codes in outcomes.values())),
        }
