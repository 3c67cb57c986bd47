"""What a layer of this library is in torch's own modules."""

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from orthogonium.layers.activations import GroupSort
from orthogonium.layers.conv import _PaddedConv
from orthogonium.layers.conv_transposed import _PaddedConvTranspose
from orthogonium.layers.linear import _ConstrainedLinear
from orthogonium.layers.recurrent import _OrthoRecurrent
from orthogonium.layers.skew_conv import _SkewOrthoConv
from orthogonium.surgery._traceable import FoldedTranspose, SkewSeries, SortedGroups, recorded

Tensors = Callable[[nn.Module, str], Any]  # a copied tensor, by module and name
_CIRCULAR: dict[int, Any] = {1: nn.CircularPad1d, 2: nn.CircularPad2d, 3: nn.CircularPad3d}
_ZEROS: dict[int, Any] = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def _linear(old: nn.Module, tensor: Tensors) -> nn.Module:
    assert isinstance(old, _ConstrainedLinear)
    new = nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
    return _filled(new, old, tensor)


def _filled(new: nn.Module, old: nn.Module, tensor: Tensors) -> nn.Module:
    for name in list(new._parameters):
        new._parameters[name] = tensor(old, name)
    return new


def _convolution(old: nn.Module, tensor: Tensors) -> nn.Module:
    assert isinstance(old, _PaddedConv)
    pads, circular, dims = old.geometry.pads, old.geometry.circular, old._dims
    even = all(before == after for before, after in pads)
    padding = tuple(before if even else 0 for before, _ in pads)
    mode = "circular" if circular and any(padding) else "zeros"
    sizes: tuple[Any, ...] = (old.in_channels, old.out_channels, old.kernel_size, old.stride, padding)
    sizes += (old.dilation, old.groups)
    new = _filled(_CONVOLUTIONS[dims](*sizes, old.bias is not None, mode, device="meta"), old, tensor)
    if even:
        return new
    around = tuple(p for pair in reversed(pads) for p in pair)
    return nn.Sequential((_CIRCULAR if circular else _ZEROS)[dims](around), new)


def _transposed(old: nn.Module, tensor: Tensors) -> nn.Module:
    assert isinstance(old, _PaddedConvTranspose)
    pads = old.geometry.pads
    if not all(before == after and (before == 0 or not old.geometry.circular) for before, after in pads):
        name = f"CircularConvTranspose{old._dims}d" if old.geometry.circular else f"CroppedConvTranspose{old._dims}d"
        return recorded(FoldedTranspose(old, tensor(old, "weight"), tensor(old, "bias")), name)
    padding = tuple(before for before, _ in pads)
    added = tuple(more + filled for more, filled in zip(old.output_padding, old._filled, strict=True))
    sizes = (old.in_channels, old.out_channels, old.kernel_size, old.stride, padding, added, old.groups)
    new = _TRANSPOSED[old._dims](*sizes, old.bias is not None, old.dilation, device="meta")
    return _filled(new, old, tensor)


def _skew(old: nn.Module, tensor: Tensors) -> nn.Module:
    assert isinstance(old, _SkewOrthoConv)
    name = f"SkewConv{old._dims}d"
    return recorded(SkewSeries(old, tensor(old, "weight"), tensor(old, "bias")), name)


def _recurrent(old: nn.Module, tensor: Tensors) -> nn.Module:
    assert isinstance(old, _OrthoRecurrent)
    cls: Any = next(base for base in type(old).__mro__ if base in (nn.RNN, nn.LSTM, nn.GRU))
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    more: dict[str, Any] = {"proj_size": old.proj_size} if cls is nn.LSTM else {}
    more |= {"nonlinearity": old.nonlinearity} if cls is nn.RNN else {}
    new: nn.RNNBase = cls(**{name: getattr(old, name) for name in names}, **more, device="meta")
    _filled(new, old, tensor)
    new._init_flat_weights()
    return new


def _sorted(old: nn.Module, tensor: Tensors) -> nn.Module:
    assert isinstance(old, GroupSort)
    name = "MaxMin" if old.group_size == 2 else "GroupSort"
    return recorded(SortedGroups(old.group_size, old.dim), name)


RULES: dict[type[nn.Module], Callable[[nn.Module, Tensors], nn.Module]] = {
    _ConstrainedLinear: _linear,
    _PaddedConv: _convolution,
    _PaddedConvTranspose: _transposed,
    _SkewOrthoConv: _skew,
    _OrthoRecurrent: _recurrent,
    GroupSort: _sorted,
}


def in_torch_operations(module: nn.Module) -> fx.GraphModule:
    """Any other module of this library, its children plain already, as a graph."""
    return recorded(module, type(module).__name__)
