"""A convolution on a circle, frequency by frequency: Hermitian matrices whose largest eigenvalue is its squared norm.

With ``y[p] = Σ_u K[u] x[p + d u]`` and ``E[u] = Σ_t K[t + u] K[t]ᵀ``, Fourier's transform turns ``K Kᵀ`` into ``G(ω) =
Σ_u E[u] e^(iωdu)``, one small matrix per frequency. A stride is turned into more input channels first.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from orthogonium.linalg._rounding import TINY, UP, frobenius_bound, gamma

_TRIG_ERROR = 2.0**-47  # of a cosine of 2π r/L with |r| ≤ L/2: three roundings of an angle below π and its own few ulp


def polyphase(grouped: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> tuple[Tensor, list[int]]:
    """The same convolution at stride one, with one input channel per position modulo the stride.

    Args:
        grouped: ``(groups, out, in, *k)``.
        stride, dilation: per axis.

    Returns:
        ``(groups, out, in · Π stride, *j)`` and the dilation that is left, which is one along strided axes.
    """
    left = []
    for axis, (s, d) in enumerate(zip(stride, dilation, strict=True)):
        dim, k = 3 + axis, grouped.shape[3 + axis]
        if s == 1:
            left.append(d)
            continue
        places = torch.arange(k, device=grouped.device) * d
        length = -(-(d * (k - 1) + 1) // s)
        shape = (*grouped.shape[:dim], length * s, *grouped.shape[dim + 1 :])
        spread = grouped.new_zeros(shape).index_copy_(dim, places, grouped)
        phases = spread.unflatten(dim, (length, s)).movedim(dim + 1, 3)
        grouped = phases.flatten(2, 3)
        left.append(1)
    return grouped, left


@dataclass(frozen=True)
class KernelGram:
    """The autocorrelation of a kernel, on the side with fewer channels.

    Attributes:
        shifts: ``(T, d)``, integers; of each pair ``±u`` one, zero first.
        even: ``(T, groups, c, c)``: ``E[0]``, then ``E[u] + E[u]ᵀ``.
        odd: likewise ``0``, then ``E[u] − E[u]ᵀ``.
        degrees: per axis, of ``G`` as a trigonometric polynomial.
        error: at least ``‖fl(G(ω)) − G(ω)‖_F`` for every computed ``G(ω)``.
    """

    shifts: Tensor
    even: Tensor
    odd: Tensor
    degrees: tuple[int, ...]
    error: Tensor

    @classmethod
    def of(cls, grouped: Tensor) -> "KernelGram":
        """From ``(groups, out, in, *k)`` at stride one, float64, entries of size about one."""
        if grouped.shape[1] > grouped.shape[2]:  # the adjoint, whose kernel is reversed: that only conjugates G
            grouped = grouped.transpose(1, 2)
        sizes = grouped.shape[3:]
        ranges = [range(1 - k, k) for k in sizes]
        shifts = [u for u in product(*ranges) if u >= (0,) * len(sizes)]
        found = []
        for shift in shifts:
            later, earlier = grouped, grouped
            for axis, (u, k) in enumerate(zip(shift, sizes, strict=True)):
                later = later.narrow(3 + axis, max(0, u), k - abs(u))
                earlier = earlier.narrow(3 + axis, max(0, -u), k - abs(u))
            found.append(later.flatten(2) @ earlier.flatten(2).mT)
        correlation = torch.stack(found)
        even, odd = correlation + correlation.mT, correlation - correlation.mT
        even[0], odd[0] = correlation[0], 0.0
        # |fl(E[u]) − E[u]| ≤ γ Σ_t |K[t + u]||K[t]|ᵀ: over all shifts, in Frobenius norm, at most γ (Σ_t ‖K[t]‖_F)²;
        # that also bounds Σ_u ‖E[u]‖_F, which the errors of the cosines and of the sum over u are relative to
        taps = frobenius_bound(grouped.flatten(3).movedim(3, 0)).sum(0).amax() * (1 + gamma(math.prod(sizes) + 1))
        terms = math.prod(grouped.shape[2:])
        relative = 4 * (gamma(terms + 2) + _TRIG_ERROR + 2 * gamma(len(shifts) + 6))
        error = (relative * taps.square() + grouped.numel() * len(shifts) * grouped.shape[1] * TINY) * UP
        steps = torch.tensor(shifts, dtype=torch.long, device=grouped.device)
        return cls(steps, even, odd, tuple(k - 1 for k in sizes), error)

    @property
    def channels(self) -> int:
        return self.even.shape[-1]

    @property
    def groups(self) -> int:
        return self.even.shape[1]

    def shift_bound(self) -> Tensor:
        """``λ(G(ω)) ≤ μ + ‖E[0] − μ I‖_F + Σ_{u ≠ 0} ‖E[u]‖_F`` for every ω: one to rounding for orthogonal kernels.

        Of a pair ``±u`` the two together are ``cos · even + i sin · odd``, in Frobenius norm at most
        ``√(‖even‖² + ‖odd‖²) = 2 ‖E[u]‖_F``.
        """
        middle = self.even[0].diagonal(dim1=-2, dim2=-1).mean(-1)
        rest = self.even[0].clone()
        diagonal = rest.diagonal(dim1=-2, dim2=-1)
        diagonal -= middle.unsqueeze(-1)
        around = frobenius_bound(self.even[1:], self.odd[1:]).sum(0) * (1 + gamma(len(self.even) + 2))
        return ((middle + frobenius_bound(rest) + around + self.error) * UP).amax()

    def mean(self) -> float:
        """The mean eigenvalue over all frequencies, of the largest group: from below, and not verified."""
        return float(self.even[0].diagonal(dim1=-2, dim2=-1).mean(-1).max())

    def blocks(self, circle: Sequence[int], dilation: Sequence[int], entries: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Real and imaginary parts of ``G`` at the frequencies of a circle, one of each pair ``±ω``.

        Yields:
            ``(batch, c, c)`` twice, of about ``entries`` entries.
        """
        frequencies = half_of(circle, self.even.device)
        whole = math.lcm(*circle)
        weights = [d * (whole // n) for n, d in zip(circle, dilation, strict=True)]
        steps = (self.shifts * torch.tensor(weights, device=self.shifts.device)) % whole
        c = self.channels
        even, odd = self.even.flatten(1), self.odd.flatten(1)
        portions = -(-len(frequencies) // max(1, entries // max(1, even.shape[1])))
        for first in range(portions):  # each spread over the circle: neighbours are alike, so the first finds the level
            part = frequencies[first::portions]
            # integers: the phases are exact. Each product is below whole², which is far below 2⁶³
            phase = (part @ steps.T) % whole if part.device.type == "cpu" else _product(part, steps) % whole
            phase = torch.where(2 * phase > whole, phase - whole, phase)
            angle = phase.double() / whole * (2 * math.pi)
            yield (angle.cos() @ even).view(-1, c, c), (angle.sin() @ odd).view(-1, c, c)


def half_of(circle: Sequence[int], device: torch.device) -> Tensor:
    """``(F, d)``: of each pair ``±a`` of frequencies, modulo the circle's lengths, one."""
    every = torch.cartesian_prod(*(torch.arange(n, device=device) for n in circle)).view(-1, len(circle))
    place, mirrored = torch.zeros_like(every[:, 0]), torch.zeros_like(every[:, 0])
    for axis, n in enumerate(circle):
        place = place * n + every[:, axis]
        mirrored = mirrored * n + (-every[:, axis]) % n
    return every[place <= mirrored]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ rightᵀ`` of integers, for devices that have no such product."""
    return (left.unsqueeze(1) * right).sum(-1)
