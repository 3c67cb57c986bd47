"""The front door to parametrizations: how a free matrix becomes an orthogonal one, as a value to pass around.

>>> from orthogonium.reparametrizers import CHOLESKY_ORTHO_PARAMS, ClassParam, OrthoParams
>>> OrthoParams(orthogonalizer=ClassParam(BatchedBjorckOrthogonalization, niters=20))  # doctest: +ELLIPSIS
OrthoParams(...)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from orthogonium.parametrizations import (
    BatchedBjorckOrthogonalization,
    BatchedCayleyOrthogonalization,
    BatchedCholeskyOrthogonalization,
    BatchedExponentialOrthogonalization,
    BatchedIdentity,
    BatchedPolarOrthogonalization,
    BatchedPowerIteration,
    BatchedQROrthogonalization,
    BatchedSVDOrthogonalization,
    L2Normalize,
)

__all__ = [
    "BJORCK_PASS_THROUGH_ORTHO_PARAMS",
    "CAYLEY_ORTHO_PARAMS",
    "CHOLESKY_ORTHO_PARAMS",
    "CHOLESKY_STABLE_ORTHO_PARAMS",
    "DEFAULT_ORTHO_PARAMS",
    "DEFAULT_TEST_ORTHO_PARAMS",
    "EXP_ORTHO_PARAMS",
    "POLAR_ORTHO_PARAMS",
    "PRESETS",
    "QR_ORTHO_PARAMS",
    "SVD_ORTHO_PARAMS",
    "BatchedBjorckOrthogonalization",
    "BatchedCayleyOrthogonalization",
    "BatchedCholeskyOrthogonalization",
    "BatchedExponentialOrthogonalization",
    "BatchedIdentity",
    "BatchedPolarOrthogonalization",
    "BatchedPowerIteration",
    "BatchedQROrthogonalization",
    "BatchedSVDOrthogonalization",
    "ClassParam",
    "L2Normalize",
    "OrthoParams",
    "preset",
]


class ClassParam:
    """A class and some of its arguments; called with the rest, it makes an instance.

    Like ``functools.partial``, but two of them compare equal when they would make the same thing, and they print
    readably.

    Args:
        module_class: what to make.
        arguments: keyword arguments to make it with.
    """

    def __init__(self, module_class: Callable[..., nn.Module], **arguments: Any) -> None:
        if not callable(module_class):
            raise TypeError(f"module_class must be a class or another callable, got {module_class!r}")
        self.module_class, self.arguments = module_class, arguments

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.module_class(*args, **(self.arguments | kwargs))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassParam) and (self.module_class, self.arguments) == (
            other.module_class,
            other.arguments,
        )

    def __hash__(self) -> int:
        return hash((self.module_class, tuple(sorted(self.arguments.items()))))

    def __repr__(self) -> str:
        name = getattr(self.module_class, "__name__", repr(self.module_class))
        return f"ClassParam({', '.join([name, *(f'{k}={v!r}' for k, v in self.arguments.items())])})"


@dataclass(frozen=True)
class OrthoParams:
    """How a free matrix becomes an orthogonal weight: two recipes that are called with ``weight_shape``.

    Attributes:
        spectral_normalizer: makes the module that scales the free matrix first. Skipped when the orthogonaliser does
            not depend on the scale.
        orthogonalizer: makes the module that orthogonalises.
    """

    spectral_normalizer: Callable[..., nn.Module] = ClassParam(BatchedPowerIteration, power_it_niter=3, eps=1e-12)
    orthogonalizer: Callable[..., nn.Module] = ClassParam(
        BatchedBjorckOrthogonalization, beta=0.5, niters=12, pass_through=False
    )

    def __post_init__(self) -> None:
        for name in ("spectral_normalizer", "orthogonalizer"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"{name} must be callable with weight_shape=..., for example ClassParam(BatchedIdentity), "
                    f"got {getattr(self, name)!r}"
                )

    def make(self, weight_shape: Sequence[int]) -> tuple[nn.Module, nn.Module]:
        """``(normalizer, orthogonalizer)`` for weights of this shape, ``(..., m, n)``."""
        return self.spectral_normalizer(weight_shape=weight_shape), self.orthogonalizer(weight_shape=weight_shape)


_IDENTITY = ClassParam(BatchedIdentity)

DEFAULT_ORTHO_PARAMS = OrthoParams()
"""Power iteration and Björck: the nearest orthogonal matrix."""

DEFAULT_TEST_ORTHO_PARAMS = OrthoParams(
    ClassParam(BatchedPowerIteration, power_it_niter=4, eps=1e-12),
    ClassParam(BatchedBjorckOrthogonalization, beta=0.5, niters=25, pass_through=False),
)
"""The same with a larger budget."""

BJORCK_PASS_THROUGH_ORTHO_PARAMS = OrthoParams(
    orthogonalizer=ClassParam(BatchedBjorckOrthogonalization, beta=0.5, niters=12, pass_through=True)
)
"""The nearest orthogonal matrix with a cheap, approximate gradient."""

CHOLESKY_ORTHO_PARAMS = OrthoParams(_IDENTITY, ClassParam(BatchedCholeskyOrthogonalization, stable=False))
"""The Gram–Schmidt factor: the fastest."""

CHOLESKY_STABLE_ORTHO_PARAMS = OrthoParams(_IDENTITY, ClassParam(BatchedCholeskyOrthogonalization, stable=True))
"""The same, accurate for ill-conditioned matrices too."""

EXP_ORTHO_PARAMS = OrthoParams(_IDENTITY, ClassParam(BatchedExponentialOrthogonalization, niters=7))
"""The exponential of a skew matrix, turning a base frame."""

QR_ORTHO_PARAMS = OrthoParams(_IDENTITY, ClassParam(BatchedQROrthogonalization))
"""The Gram–Schmidt factor by Householder reflections."""

SVD_ORTHO_PARAMS = OrthoParams(_IDENTITY, ClassParam(BatchedSVDOrthogonalization))
"""The nearest orthogonal matrix, by the float64 SVD."""

POLAR_ORTHO_PARAMS = OrthoParams(_IDENTITY, ClassParam(BatchedPolarOrthogonalization))
"""The nearest orthogonal matrix."""

CAYLEY_ORTHO_PARAMS = OrthoParams(_IDENTITY, ClassParam(BatchedCayleyOrthogonalization))
"""The Cayley map of a skew matrix, turning a base frame."""

PRESETS: dict[str, OrthoParams] = {
    "default": DEFAULT_ORTHO_PARAMS,
    "default_test": DEFAULT_TEST_ORTHO_PARAMS,
    "bjorck_pass_through": BJORCK_PASS_THROUGH_ORTHO_PARAMS,
    "cholesky": CHOLESKY_ORTHO_PARAMS,
    "cholesky_stable": CHOLESKY_STABLE_ORTHO_PARAMS,
    "exp": EXP_ORTHO_PARAMS,
    "qr": QR_ORTHO_PARAMS,
    "svd": SVD_ORTHO_PARAMS,
    "polar": POLAR_ORTHO_PARAMS,
    "cayley": CAYLEY_ORTHO_PARAMS,
}
"""Every preset by the name that the command line knows it by."""


def preset(name: str) -> OrthoParams:
    """The preset of that name; ``ValueError`` with the names there are."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    return PRESETS[name]
