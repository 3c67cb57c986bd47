"""A run folder for a model of one's own: a chain of known layers, as data, so that nothing has to be unpickled."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import remove_parametrizations

import orthogonium.layers as layers
from orthogonium.certification import lipschitz_bound
from orthogonium.certification.rules.registry import plain_type
from orthogonium.surgery.bounds import evaluating
from orthogonium.training.checkpoint import save_model
from orthogonium.training.data import CLASSES, FEATURES, load_digits
from orthogonium.training.evaluation import RADII, evaluate
from orthogonium.training.run_folder import RunFolder, RunFolderError, write_json

_FORMAT_VERSION = 1
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_KNOWN: dict[str, tuple[Any, tuple[str, ...]]] = {
    "Linear": (nn.Linear, ("in_features", "out_features")),
    "Conv1d": (nn.Conv1d, _CONV),
    "Conv2d": (nn.Conv2d, _CONV),
    "Conv3d": (nn.Conv3d, _CONV),
    "OrthoConv1d": (layers.OrthoConv1d, _CONV),
    "OrthoConv2d": (layers.OrthoConv2d, _CONV),
    "OrthoConv3d": (layers.OrthoConv3d, _CONV),
    "AOLConv1d": (layers.AOLConv1d, _CONV),
    "AOLConv2d": (layers.AOLConv2d, _CONV),
    "AOLConv3d": (layers.AOLConv3d, _CONV),
    "MaxMin": (layers.MaxMin, ("dim",)),
    "GroupSort": (layers.GroupSort, ("group_size", "dim")),
    "ReLU": (nn.ReLU, ()),
    "Identity": (nn.Identity, ()),
    "Flatten": (nn.Flatten, ("start_dim", "end_dim")),
    "Unflatten": (nn.Unflatten, ("dim", "unflattened_size")),
    "Dropout": (nn.Dropout, ("p",)),
}


@dataclass(frozen=True)
class SavedModel:
    """What stands in the ``config.json`` of a run folder that :func:`save_run` wrote.

    Attributes:
        layers: type and arguments of each layer.
        evaluate_on, split_seed: of the digits, as in :class:`TrainConfig`.
    """

    layers: tuple[dict[str, Any], ...]
    evaluate_on: str = "test"
    split_seed: int = 0
    model: str = "a saved model"
    preset: str = "fixed weights"

    def build_model(self) -> nn.Module:
        """The chain with weights still to be loaded.

        Raises:
            ValueError: an unknown layer, or arguments that it does not take.
        """
        return nn.Sequential(*(_built(layer) for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        saved = {"layers": list(self.layers), "evaluate_on": self.evaluate_on, "split_seed": self.split_seed}
        return {"format_version": _FORMAT_VERSION, "saved_model": saved}


def save_run(
    path: str | Path,
    model: nn.Module,
    *,
    evaluate_on: str = "test",
    split_seed: int = 0,
    radii: Sequence[float] = RADII,
) -> RunFolder:
    """Write a run folder for a digits classifier of one's own, for ``orthogonium certify`` and ``export``.

    Weights are saved as they are now, in float32, without what they were trained with: it is the network that is
    certified.

    Args:
        path: a folder that is new or empty.
        model: a chain of linear layers, convolutions, ``MaxMin``, ``GroupSort``, ``ReLU``, ``Flatten``, ``Unflatten``,
            ``Dropout`` and ``Identity`` from 64 pixels in [0, 1] to 10 logits, constrained or not: ``nn.Sequential``.
        evaluate_on, split_seed: which digits ``metrics.json`` and ``certify`` speak of.
        radii: of the certified accuracy in ``metrics.json``.

    Returns:
        The folder.

    Raises:
        TypeError: a layer of another kind, or with hooks; the message names its path.
        ValueError: a network that is not for digits, or computes something else than its layers as data; weights that
            are not finite, or a radius.
        RunFolderError: ``path`` cannot be used.
    """
    described = tuple(_described(name, module) for name, module in _chain(model, ""))
    config = SavedModel(described, evaluate_on, split_seed)
    plain = config.build_model().eval()
    with evaluating(model):
        for new, (_, old) in zip(plain.children(), _chain(model, ""), strict=True):
            _copy_weights(new, old)
    _check_saved(config)
    split = load_digits(evaluate_on, split_seed)
    _check_same(model, plain, split.x_eval[:8])
    result = evaluate(plain, split.x_eval, split.y_eval, radii, attack_steps=0)
    folder = RunFolder.create(Path(path))
    write_json(folder.config, config.to_dict())
    save_model(folder.model, plain)
    metrics = {
        "clean_accuracy": result.clean_accuracy,
        "certified_accuracy": {str(radius): share for radius, share in result.certified.items()},
        "lipschitz_bound": result.lipschitz_bound,
    }
    write_json(folder.metrics, metrics)
    return folder


def read_saved(folder: RunFolder) -> SavedModel | None:
    """The config of a folder that :func:`save_run` wrote; ``None`` if training wrote it.

    Raises:
        RunFolderError: it is damaged or of another version.
    """
    try:
        values = json.loads(folder.config.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or "saved_model" not in values:
            return None
        if values["format_version"] != _FORMAT_VERSION:
            raise ValueError(f"format_version {values['format_version']!r}, this version reads {_FORMAT_VERSION}")
        saved = values["saved_model"]
        config = SavedModel(tuple(saved["layers"]), saved["evaluate_on"], saved["split_seed"])
        _check_saved(config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RunFolderError(f"{folder.config} cannot be read: {error}") from error
    return config


def _check_saved(config: SavedModel) -> None:
    """Whether it describes a network for digits, which can be certified, and a split of them."""
    if config.evaluate_on not in ("test", "validation"):
        raise ValueError(f"evaluate_on must be 'test' or 'validation', got {config.evaluate_on!r}")
    if type(config.split_seed) is not int or not 0 <= config.split_seed < 2**32:
        raise ValueError(f"split_seed must lie in 0 … {2**32 - 1}, got {config.split_seed!r}")
    model = config.build_model().eval()
    lipschitz_bound(model, (FEATURES,))
    with torch.no_grad():
        logits = tuple(model(torch.zeros(2, FEATURES)).shape)
    if logits != (2, CLASSES):
        raise ValueError(f"the network must give (N, {CLASSES}) logits, got {('N', *logits[1:])}")


def _chain(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        _check_forward(path, module)
        return [
            found
            for name, child in module._modules.items()
            if child is not None
            for found in _chain(child, f"{path}.{name}" if path else name)
        ]
    return [(path or "the model itself", module)]


def _check_forward(path: str, module: nn.Module) -> None:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise TypeError(f"{path or 'the model itself'} has forward hooks, or a forward of its own: remove them")


def _described(path: str, module: nn.Module) -> dict[str, Any]:
    known = {layers.OrthoLinear: "Linear", layers.UnitNormLinear: "Linear"}  # once the weight is fixed
    known |= {made: name for name, (made, _) in _KNOWN.items()}
    made = plain_type(module)
    kind = known.get(made)
    if kind is None:
        name = f"{made.__module__}.{made.__name__}" if made.__name__ in _KNOWN else made.__name__
        raise TypeError(f"{path} is a {name}, which cannot be saved as data. Known: {', '.join(_KNOWN)}")
    _check_forward(path, module)
    arguments = {name: getattr(module, name) for name in _KNOWN[kind][1]}
    if "bias" in module._parameters:
        arguments["bias"] = module.bias is not None
    return {"type": kind, **arguments}


def _check_same(model: nn.Module, plain: nn.Module, x: Tensor) -> None:
    given = next(model.parameters(), x)
    with evaluating(model), torch.no_grad():
        expected = model(x.to(given)).to(x)
        apart = float((plain(x) - expected).abs().max())
    if not apart <= 1e-3 * (1 + float(expected.abs().max())):
        raise ValueError(
            f"the model gives other results than its layers as data, by {apart:.3g}: one of them computes something "
            f"of its own, or was changed after it was made"
        )


def _built(layer: dict[str, Any]) -> nn.Module:
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in layer.items()}
    kind = arguments.pop("type")
    if kind not in _KNOWN:
        raise ValueError(f"unknown layer {kind!r}. Known: {', '.join(_KNOWN)}")
    made: nn.Module = _KNOWN[kind][0](**arguments)
    if hasattr(made, "parametrizations"):
        remove_parametrizations(made, "weight")
    return made


def _copy_weights(new: nn.Module, old: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            parameter.copy_(getattr(old, name))
