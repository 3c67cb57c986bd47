"""Functions of a skew matrix through its eigenvectors: for arguments so large that products lose their digits.

``A = U diag(iω) Uᴴ`` with real ``ω`` from the Hermitian ``−iA``. Slow (complex128, all of ``N × N``), orthogonal
for every size of ``A``; where ``‖A‖₂`` exceeds the inverse of machine precision the angles themselves are noise, as for
any method.
"""

import torch
from torch import Tensor


def _eigen(free: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    frame = base.double()
    own = frame.shape[-2] == frame.shape[-1]  # a square frame has the free matrix in its own coordinates
    product = (frame @ free.double() if own else free.double()) @ frame.mT
    skew = product - product.mT
    frequencies, vectors = torch.linalg.eigh(torch.complex(torch.zeros_like(skew), -skew))
    # The spectrum of a real matrix is symmetric and its null space exact; rounding of a large A hides both.
    frequencies = 0.5 * (frequencies - frequencies.flip(-1))
    noise = frequencies[..., -1:] * torch.finfo(frequencies.dtype).eps * frequencies.shape[-1]
    return torch.where(frequencies.abs() > noise, frequencies, 0.0), vectors


def _values(frequencies: Tensor, kind: str) -> Tensor:
    if kind == "exponential":
        return _phase(frequencies)
    half = torch.complex(torch.zeros_like(frequencies), 0.5 * frequencies)
    return (1 + half) / (1 - half)


def _phase(angle: Tensor) -> Tensor:
    """``exp(iω)``, reduced first: vectorised sines lose all digits beyond about 1e9."""
    return torch.polar(torch.ones_like(angle), torch.fmod(angle, 2 * torch.pi))


def spectral_map(free: Tensor, base: Tensor, kind: str) -> Tensor:
    """``f(X Q₀ᵀ − Q₀ Xᵀ) Q₀`` for ``(..., N, k)``, same dtype as ``free``."""
    frequencies, vectors = _eigen(free, base)
    matrix = (vectors * _values(frequencies, kind)[..., None, :]) @ vectors.mH
    q = matrix.real @ base.double()
    return (1.5 * q - 0.5 * q @ (q.mT @ q)).to(free.dtype)  # one Newton–Schulz step


def spectral_gradient(grad: Tensor, free: Tensor, base: Tensor, kind: str) -> Tensor:
    """The gradient with respect to ``X``: divided differences of ``f`` in the eigenbasis (Daleckii and Krein, 1965)."""
    frequencies, vectors = _eigen(free, base)
    if kind == "exponential":
        mean = 0.5 * (frequencies[..., :, None] + frequencies[..., None, :])
        gap = 0.5 * (frequencies[..., :, None] - frequencies[..., None, :])
        differences = _phase(mean) * torch.sinc(gap / torch.pi)
    else:
        half = 1 / (1 - torch.complex(torch.zeros_like(frequencies), 0.5 * frequencies))
        differences = half[..., :, None] * half[..., None, :]
    base64 = base.double()
    seed = (grad.double() @ base64.mT).to(vectors.dtype)
    inner = (vectors.mH @ seed @ vectors) * differences.conj()
    full = (vectors @ inner @ vectors.mH).real
    result = (full - full.mT) @ base64
    return (base64.mT @ result if base.shape[-2] == base.shape[-1] else result).to(free.dtype)
