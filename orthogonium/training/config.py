"""Everything that decides a training run, as plain data."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, get_type_hints

from torch import nn

from orthogonium._randomness import own_randomness
from orthogonium.models import lipschitz_cnn, lipschitz_mlp
from orthogonium.models.cnn import check_cnn_sizes
from orthogonium.reparametrizers import PRESETS
from orthogonium.training.data import CLASSES, FEATURES

MODELS = {"mlp": lipschitz_mlp, "cnn": lipschitz_cnn}
# Chosen on validation splits of the training part. An offset of √2 r aims at the certified radius r:
# 0.7 and 1.0 here.
RECIPES: dict[str, dict[str, float]] = {
    "balanced": {"temperature": 10.0, "offset": 1.0, "noise": 0.05},
    "radius": {"temperature": 16.0, "offset": 1.4, "noise": 0.05},
}
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class TrainConfig:
    """What to train and how; the same config gives the same metrics on the same machine.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range, or a name is unknown; the message lists what is known.
    """

    model: str = "mlp"
    preset: str = "default"
    width: int = 256
    depth: int = 4
    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 0.01
    temperature: float = 10.0
    offset: float = 1.0
    noise: float = 0.05
    seed: int = 0
    split_seed: int = 0
    evaluate_on: str = "test"

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind is float and type(value) is int:
                object.__setattr__(self, name, float(value))
            elif type(value) is not kind:
                raise TypeError(f"{name} must be {kind.__name__}, got {value!r}")
        _check_known("model", self.model, list(MODELS))
        _check_known("preset", self.preset, list(PRESETS))
        _check_known("evaluate_on", self.evaluate_on, ["test", "validation"])
        for name, least, most in _WHOLE:
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in {least} … {most}, got {getattr(self, name)}")
        for name, may_be_zero in _REAL:
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
                raise ValueError(f"{name} must be {'at least' if may_be_zero else 'above'} 0, got {value}")
        if self.width % 2:
            raise ValueError(f"width must be even, got {self.width}. Use {self.width + 1}")
        if self.model == "cnn":
            check_cnn_sizes(self.width, self.depth)

    def build_model(self) -> nn.Module:
        """A fresh model, initialised from ``seed`` alone; the global random state is left as it was."""
        with own_randomness(self.seed):
            return MODELS[self.model](
                FEATURES, CLASSES, width=self.width, depth=self.depth, ortho_params=PRESETS[self.preset]
            )

    def to_dict(self) -> dict[str, Any]:
        return {"format_version": _FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of :meth:`to_dict`; ``ValueError`` on unknown, missing or newer content."""
        if not isinstance(values, dict):
            raise ValueError("the config must be a JSON object")
        fields = {field.name for field in dataclasses.fields(cls)}
        version = values.get("format_version")
        if version != _FORMAT_VERSION:
            raise ValueError(f"the config has format_version {version!r}, but this version reads {_FORMAT_VERSION}")
        given = set(values) - {"format_version"}
        if given != fields:
            raise ValueError(f"the config misses {sorted(fields - given)} and has unknown {sorted(given - fields)}")
        return cls(**{name: values[name] for name in fields})


_WHOLE = (
    ("width", 2, 16384),
    ("depth", 1, 1000),
    ("epochs", 1, 10**6),
    ("batch_size", 1, 10**6),
    ("seed", 0, 2**63 - 1),
    ("split_seed", 0, 2**32 - 1),
)
_REAL = (("learning_rate", False), ("temperature", False), ("offset", True), ("noise", True))


def _check_known(name: str, value: str, known: list[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}. Known: {', '.join(known)}")
