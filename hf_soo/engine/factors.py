"""Second moments of the rows that flow into and out of a layer: the Kronecker factors of K-FAC and FOOF.

With rows a (1 appended for a bias) and output gradients g = dL/dy of the mean loss over R terms,

    expand   A = (1/M) Σ a aᵀ over all M rows           B = R Σ g gᵀ
    reduce   A = (1/N) Σ ā āᵀ, ā = mean of an example   B = R Σ ĝ ĝᵀ, ĝ = Σ g of an example

so that neither the batch size nor how the loss is averaged changes what a damping means. A row whose g is exactly zero
(padding, a position without a label above the last attention) is no part of the gradient; ``row_filter`` leaves it out
of A as well. It needs the input in the backward pass, where nn.Linear keeps it anyway.

A wide input may be cut into k blocks: A is then the k blocks on its diagonal alone. A bias's 1 is one more block, whose
moment is 1 and needs no room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from hf_soo.engine.capture import Buffers, FisherPass, Statistics, Window
from hf_soo.engine.gradients import Groups
from hf_soo.engine.layers import Layer, RowLayer, accumulation_dtype, stack
from hf_soo.engine.passes.backward import Target, accumulates, gate
from hf_soo.engine.passes.padding import Padding, Shape
from hf_soo.engine.strategy import Strategy
from hf_soo.engine.sums import in_squares_range, noise_level


@dataclass(frozen=True)
class FactorRecorder:
    """Second moments of input and output-gradient rows.

    A layer's buffers, all in the accumulation dtype:

    0. the samples in A, and those with g ≠ 0, [2];
    1. Σ a aᵀ, [d_in (+ 1), d_in (+ 1)], or of each block, [k, d_in / k, d_in / k];
    2. Σ g gᵀ, [d_out, d_out], empty if not asked for;
    3. Σ |ĝ|² and δ² Σ |g|² (``NOISE_LEVEL``), [2], of "reduce", where a sum may be rounding noise alone.

    Args:
        outputs: keep B too.
        reduce: the "reduce" setting, else "expand".
        row_filter: "grad" (rows with g ≠ 0) or "all".
        loss_terms: R; None takes the rows with g ≠ 0 of the last layer that has any, experts apart.
        published: the released kfac-pytorch's B, Σ g gᵀ / rows.
        fisher_pass: for a sampled loss, whose pass adds to B alone, as the real one then adds to A alone; else None.
        blocks: k, into which an input wider than the output is cut, if that divides it.
    """

    outputs: bool
    reduce: bool
    row_filter: Literal["grad", "all"]
    loss_terms: int | None = None
    published: bool = False
    fisher_pass: FisherPass | None = None
    blocks: int = 1
    hooks = True
    transient = True

    @property
    def needs(self) -> str:
        """See ``Recorder``."""
        return "Kronecker factors" if self.outputs else "input factor"

    def cut(self, layer: Layer) -> int:
        """How many blocks a layer's input is cut into."""
        d_out, d_in = layer.shape
        return self.blocks if d_in > d_out and d_in % self.blocks == 0 else 1

    def allocate(self, layer: Layer) -> Buffers:
        """See ``Recorder``."""
        (d_out, d_in), k = layer.shape, self.cut(layer)
        m, n, weight = d_in + (layer.bias is not None), d_out if self.outputs else 0, layer.prototype

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=accumulation_dtype(weight.dtype), device=weight.device)

        A = zeros(m, m) if k == 1 else zeros(k, d_in // k, d_in // k)
        return [zeros(2), A, zeros(n, n), zeros(2 if self.outputs and self.reduce else 0)]

    def commit(
        self, layer: RowLayer, x: Tensor, output: Tensor, buffers: Buffers, padding: Padding, target: Target
    ) -> Tensor:
        """See ``Recorder``; padding is told by its output gradient here (``row_filter``)."""
        shape, swapped = padding.examples(layer, x) if self.reduce else (None, False)
        x = x.detach().to(output.dtype)  # under autocast half of the memory, and what the layer computes with
        return cast(Tensor, _CommitFactors.apply(output, x, target, layer, self, shape, swapped, *buffers))  # type: ignore[no-untyped-call]

    def ready(self, layers: Sequence[Layer], strategy: Strategy) -> list[Layer]:
        """All: a layer without rows is told so."""
        return list(layers)

    def collect(self, window: Window) -> Callable[[Groups], list[Statistics]]:
        """Sum the counts over all ranks and the factors at each layer's owner, and hand out A and B.

        ``inputs`` is A [L, d_in (+ 1), d_in (+ 1)], or its blocks [L, k, d_in / k, d_in / k], ``outputs`` B [L, d_out,
        d_out], or None.

        Raises:
            RuntimeError: a sampled loss was wanted and none came.
        """
        if self.fisher_pass is not None and self.fisher_pass.passes == 0:
            raise RuntimeError(
                "fisher='mc' got no sampled loss in this window: call optimizer.backward_sampled(loss) before the real "
                "backward where optimizer.wants_sampled_loss, or use SecondOrderTrainer."
            )
        placement, buffers = window.placement, window.buffers
        placement.sum_([buffers[layer.name][i] for layer in window.layers for i in (0, 3)])
        matrices = {layer.name: [M for F in buffers[layer.name][1:3] for M in _single(F)] for layer in window.layers}
        placement.sum_at_owner_(matrices)
        whole = [layer for layer in window.layers if layer.stack is None] or window.layers  # an expert sees some rows
        counts = stack([buffers[layer.name][0] for layer in whole])
        terms = self._terms(counts[:, 1])

        def of(group: Sequence[Layer]) -> Statistics:
            samples, live = stack([buffers[layer.name][0] for layer in group]).unbind(-1)
            A = stack([buffers[layer.name][1] for layer in group])
            A = A / samples.clamp(min=1).view(-1, *[1] * (A.ndim - 1))
            if not self.outputs:
                return Statistics(samples=samples, inputs=A)
            scale = window.unit**2 * (
                1 / samples.clamp(min=1) if self.published else terms.to(samples).expand_as(samples)
            )
            B = stack([buffers[layer.name][2] for layer in group]) * scale[:, None, None]
            noise = stack([buffers[layer.name][3] for layer in group])
            is_noise = noise[:, 0] <= noise[:, 1] if self.reduce else None
            return Statistics(samples=torch.where(live > 0, samples, 0.0), inputs=A, outputs=B, noise=is_noise)

        return lambda groups: [of(group) for group in groups]

    def _terms(self, live: Tensor) -> Tensor:
        """R, [1]: as given, or the rows with g ≠ 0 of the last layer that has any."""
        if self.loss_terms is not None:
            return live.new_full((1,), float(self.loss_terms))
        order = torch.arange(1, len(live) + 1, device=live.device)
        return live.gather(0, (order * (live > 0)).argmax(0, keepdim=True))  # indexing would read from the device


class _CommitFactors(torch.autograd.Function):
    """The identity on the layer's output; its backward adds a micro-batch's second moments."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        target: Target,
        layer: RowLayer,
        recorder: FactorRecorder,
        shape: Shape | None,
        swapped: bool,
        *buffers: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x)  # not its rows: a convolution's patches are some times the image
        ctx.target, ctx.layer, ctx.recorder, ctx.buffers = target, layer, recorder, buffers
        ctx.shape, ctx.swapped = shape, swapped
        return output.detach()  # see _CommitSums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        done = (grad, *[None] * (6 + len(ctx.buffers)))
        recorder: FactorRecorder = ctx.recorder
        which = "both" if recorder.fisher_pass is None else recorder.fisher_pass.which
        keep = which == "outputs" or accumulates(ctx.target, grad)  # a sampled loss's pass stops at the outputs
        if keep is False:
            return done
        saved, g = gate(keep, *ctx.saved_tensors, grad.detach())
        if ctx.shape is not None or ctx.swapped:  # examples first, as rows are read
            saved, g = (_examples_first(each, ctx.shape, ctx.swapped) for each in (saved, g))
        x = ctx.layer.input_rows(saved)
        counts, A, B, noise = ctx.buffers
        g = g.movedim(ctx.layer.channel_dim, -1)
        g = g.reshape(*x.shape[:2], g.shape[-1])  # not -1: there may be no rows
        live = (g != 0).any(-1)
        if which != "outputs":
            counted = live if recorder.row_filter == "grad" else gate(keep, torch.ones_like(live))[0]
            _commit_inputs(x, live, counted, recorder, counts, A)
        if which != "inputs" and B.numel() and g.numel():
            level = noise_level(ctx.layer, g.dtype) ** 2
            g = in_squares_range(g.to(B.dtype), B.dtype)
            rows = g.sum(1) if recorder.reduce else g.flatten(0, 1)
            B.addmm_(rows.mT, rows)
            if recorder.reduce:
                noise.add_(torch.stack([rows.square().sum(), level * g.square().sum()]))
        return done


def _single(matrices: Tensor) -> Sequence[Tensor]:
    """Blocks [k, d, d] one by one; [d, d] as it is."""
    return [matrices] if matrices.ndim == 2 else matrices.unbind()


def _examples_first(rows: Tensor, shape: Shape | None, swapped: bool) -> Tensor:
    """Rows [*rows, d] as [examples, positions, d]; see ``Padding.examples``."""
    rows = rows if shape is None else rows.reshape(*shape, rows.shape[-1])
    return rows.transpose(0, 1) if swapped else rows


def _commit_inputs(
    x: Tensor, live: Tensor, counted: Tensor, recorder: FactorRecorder, counts: Tensor, A: Tensor
) -> None:
    """Add the rows of x [N, S, d_in] that are ``counted`` to A, the bias's column of ones included."""
    keep = counted.to(A.dtype)
    if recorder.reduce:
        positions = keep.sum(1)
        weight = (positions > 0).to(A.dtype)
        rows = (x.to(A.dtype) * keep[..., None]).sum(1) / positions.clamp(min=1)[:, None]
    else:
        weight = keep.flatten()
        rows = x.to(A.dtype).flatten(0, 1)
        if recorder.row_filter == "grad":
            rows = rows * weight[:, None]
    d = rows.shape[-1]
    if A.ndim == 3:
        blocks = rows.view(len(rows), len(A), -1)
        A.baddbmm_(blocks.permute(1, 2, 0), blocks.transpose(0, 1))
    else:
        A[:d, :d].addmm_(rows.mT, rows)
    if A.ndim == 2 and len(A) > d:
        total = rows.sum(0)
        A[d, :d].add_(total)
        A[:d, d].add_(total)
        A[d, d].add_(weight.sum())
    counts.add_(torch.stack([weight.sum(), live.sum().to(A.dtype)]))
