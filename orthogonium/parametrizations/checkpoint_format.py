"""What a stored free tensor means: a number in each checkpoint lets one preset's load into another's layer."""

from torch import Tensor, nn

from orthogonium.parametrizations.orthogonalizers import (
    BatchedBjorckOrthogonalization,
    BatchedCayleyOrthogonalization,
    BatchedCholeskyOrthogonalization,
    BatchedExponentialOrthogonalization,
    BatchedPolarOrthogonalization,
    BatchedQROrthogonalization,
    BatchedSVDOrthogonalization,
    Orthogonalization,
)

FORMAT_VERSION = 1

# Methods of one family make the same weight from the same free tensor.
_FAMILIES: dict[int, tuple[type[Orthogonalization], ...]] = {
    1: (BatchedPolarOrthogonalization, BatchedBjorckOrthogonalization, BatchedSVDOrthogonalization),
    2: (BatchedCholeskyOrthogonalization, BatchedQROrthogonalization),
    3: (BatchedExponentialOrthogonalization,),
    4: (BatchedCayleyOrthogonalization,),
}


def checkpoint_code(orthogonalizer: nn.Module) -> int:
    """``100 · version + family``; family 0 is a hook of the user's own."""
    inner = getattr(orthogonalizer, "matrix_hook", orthogonalizer)  # a kernel's family is that of its matrix
    found = (code for code, classes in _FAMILIES.items() if type(inner) in classes)
    return 100 * FORMAT_VERSION + next(found, 0)


def source_of(code: int, original: Tensor) -> Orthogonalization | None:
    """A hook that reads free tensors of that code; ``None`` for a user's own.

    Raises:
        ValueError: another format version.
    """
    version, family = divmod(code, 100)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"the checkpoint was written in format {version}; this version of orthogonium reads format "
            f"{FORMAT_VERSION}. Load it with the version that wrote it and save plain weights."
        )
    return _FAMILIES[family][0](weight_shape=original.shape).to(original) if family in _FAMILIES else None
