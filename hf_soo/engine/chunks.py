"""Walk parameters in pieces of bounded size, so that several elementwise operations find a piece in cache.

A *bundle* is a list of slots (tensors with gradients and moments): many small ones, or one large one. A *piece* is what
is worked on at once: a whole bundle, or a slice of a large slot. On a GPU a piece is large and saves launches; on a CPU
it fits the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_soo.engine.dtensors import local
from hf_soo.engine.gradients import norms, unit_of
from hf_soo.engine.strategy import Partition

# Elements per thread. One LAMB step over 59M parameters, relative to AdamW(foreach): 2¹⁴ 1.0, 2¹⁶ .63, 2¹⁷ .53,
# 2¹⁸ .48, 2¹⁹ .46, 2²⁰ .48 (EPYC, 1 MiB of L2 a core). Below, calls cost; above, pieces leave the cache.
CPU_PIECE = 1 << 18
CPU_PIECE_MAX = 1 << 20
GPU_PIECE = 1 << 26


@dataclass(slots=True)
class Slot:
    """One parameter, or a part of one: flat tensors of equal length.

    `home` is the tensor that `param` was flattened from; `tensor` says which whole tensor a part of a `Partition`
    belongs to.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    home: Tensor
    tensor: int = 0

    @classmethod
    def of(cls, param: Tensor, state: Mapping[str, Tensor], cut: bool = False) -> Slot:
        """Flatten what this process holds of a parameter and its state: of DTensors a part (`cut`).

        It shares their memory where they are contiguous; a low-precision gradient is widened to the moments' dtype.
        """
        assert param.grad is not None
        home, grad, m, v = param.detach(), param.grad, state["exp_avg"], state["exp_avg_sq"]
        if cut:
            home, grad, m, v = local(home), local(grad), local(m), local(v)
        return cls(_flat(home), _flat(grad.to(m.dtype)), _flat(m), _flat(v), state["step"], home)

    def part(self, start: int, length: int, tensor: int = 0) -> Slot:
        """The elements `start : start + length`, which belong to the whole tensor of that number."""
        param, grad, m, v = (t.narrow(0, start, length) for t in (self.param, self.grad, self.exp_avg, self.exp_avg_sq))
        return Slot(param, grad, m, v, self.step, self.home, tensor)

    def write_back(self) -> None:
        """Bring the values home where flattening had to copy them."""
        self.home.copy_(self.param.view(self.home.shape))


def slots_of(
    params: Iterable[Tensor],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    cut: bool,
    partition: Partition | None,
) -> Iterator[Slot]:
    """The slots of parameters with gradients, or of the whole tensors in them, each made when it is its turn."""
    for param in params:
        slot = Slot.of(param, state[param], cut)
        if partition is None:
            yield slot
        else:
            yield from (slot.part(f.start, f.length, f.tensor) for f in partition.parts_of(param) if f.length > 0)


def bundles(slots: Iterable[Slot], size: int) -> Iterator[tuple[list[Slot], list[list[Slot]]]]:
    """Group slots in order: as many as fit `size` elements, or one that is larger; and cut that one into pieces.

    Args:
        slots: Slots; taken as they are needed.
        size: Elements in a piece.

    Yields:
        (slots, the same in pieces of at most `size` elements).
    """
    bundle: list[Slot] = []
    filled = 0
    for slot in slots:
        if bundle and filled + slot.param.numel() > size:
            yield bundle, _cut(bundle, size)
            bundle, filled = [], 0
        bundle.append(slot)
        filled += slot.param.numel()
    if bundle:
        yield bundle, _cut(bundle, size)


def _cut(slots: list[Slot], size: int) -> list[list[Slot]]:
    """A bundle in pieces of at most `size` elements; of several slots it is one piece."""
    whole, length = slots[0], slots[0].param.numel()
    if len(slots) > 1 or length <= size:
        return [slots]
    return [[whole.part(start, min(size, length - start))] for start in range(0, length, size)]


def piece_size(tensor: Tensor) -> int:
    """Elements in a piece on the tensor's device."""
    if tensor.device.type != "cpu":
        return GPU_PIECE
    return min(CPU_PIECE * torch.get_num_threads(), CPU_PIECE_MAX)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a parameter's moments: at least fp32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _flat(tensor: Tensor) -> Tensor:
    """One dimension: a view if the tensor is contiguous, else a copy in the order of its indices."""
    return tensor.reshape(-1)


def piece_norms(grads: Sequence[Tensor]) -> list[Tensor]:
    """Norms of gradients, piece by piece: one fp32 reduction over 31M elements comes out 1.6e-3 too small on a CPU."""
    size = piece_size(grads[0])
    return tensor_norms([piece for grad in grads for piece in torch.split(_flat(grad), size)])


def tensor_norms(tensors: list[Tensor]) -> list[Tensor]:
    """Norms of tensors of one device and dtype, at least in fp32; finite for what is."""
    dtype, device = wide_dtype(tensors[0]), tensors[0].device
    found = torch._foreach_norm(tensors, 2, dtype=torch.float64 if device.type == "cuda" else dtype)
    if device.type == "cpu" and not all(norm < math.inf for norm in torch.stack(list(found)).tolist()):
        return [norms(tensor.to(dtype)[None])[0] for tensor in tensors]  # the square of a finite one may not be finite
    return [norm.to(dtype) for norm in found]


def total_norm(each: Tensor) -> Tensor:
    """The norm of several tensors from the norms of each, 0-d."""
    unit = unit_of(each.max())
    total: Tensor = torch.linalg.vector_norm(each / unit) * unit
    return total


FAR = 2.0**-64


def squares(each: Tensor) -> Tensor:
    """What ranks sum to know the norm of tensors that lie apart: Σ norm², and the same of norms 2⁻⁶⁴ as large, [2]."""
    return torch.stack([each.square().sum(), (each * FAR).square().sum()])


def root(summed: Tensor) -> Tensor:
    """The norm, 0-d, from the sum of ``squares`` over ranks: from the second where the first is no number."""
    near, far = summed.sqrt()
    return torch.where(near.isfinite(), near, far / FAR)


def whole_norms(pieces: Iterable[tuple[list[Slot], Tensor]], partition: Partition, like: Tensor) -> Tensor:
    """Norms of whole tensors, in one sum over ranks.

    Args:
        pieces: Slots that this rank holds, and two norms of each, [2, slots].
        partition: Whose pieces these are.
        like: Has the sums' device, and its moments their dtype.

    Returns:
        The norms of every tensor of the partition, [2, tensors]; 0 for those that no rank gave.
    """
    nothing = torch.zeros(2, dtype=wide_dtype(like), device=like.device)
    held: dict[int, Tensor] = {}  # no index tensor: it would have to be copied to the device
    for slots, found in pieces:
        for slot, norm in zip(slots, found.to(nothing).unbind(1), strict=True):
            held[slot.tensor] = torch.hypot(held[slot.tensor], norm) if slot.tensor in held else norm
    squares = torch.stack([held.get(number, nothing) for number in range(partition.tensors)], dim=1).square_()
    partition.sum_norms_(squares)
    return squares.sqrt_()
