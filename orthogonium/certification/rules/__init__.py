"""One rule per module or function; importing this package registers the library's."""

from orthogonium.certification.rules import (  # noqa: F401
    activations,
    arithmetic,
    kin,
    linear,
    normalization,
    padding,
    pooling,
    refused,
    resizing,
    shapes,
)
from orthogonium.certification.rules.registry import (
    EXACT,
    Refused,
    Response,
    Rounding,
    Variable,
    lipschitz_rule,
)

__all__ = ["EXACT", "Refused", "Response", "Rounding", "Variable", "lipschitz_rule"]
