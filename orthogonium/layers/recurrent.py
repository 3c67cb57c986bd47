"""Recurrent layers whose gates are orthogonal, so that memory neither fades nor explodes by the weights' doing."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from orthogonium._checks import check_count
from orthogonium.layers.constrain import orthogonal
from orthogonium.layers.linear import _rebuild
from orthogonium.linalg import qr_orthogonalize
from orthogonium.parametrizations.torch_weights import stacked_blocks
from orthogonium.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams


class _OrthoRecurrent(nn.RNNBase):
    """Construction, initialisation and pickling; the computation is torch's."""

    _memory_gate: int | None = None  # the block of biases that the time scale sets

    def _set_up(self, ortho_params: OrthoParams, constrain_inputs: bool, time_scale: int | None) -> None:
        check_count("hidden_size", self.hidden_size)
        if time_scale is not None and (isinstance(time_scale, bool) or not isinstance(time_scale, int)):
            raise TypeError(f"time_scale must be an integer or None, got {time_scale!r}")
        if time_scale is not None and time_scale < 2:
            raise ValueError(f"time_scale must be at least 2 steps, got {time_scale}")
        if time_scale is not None and not self.bias:
            raise ValueError("time_scale sets biases, so it needs bias=True")
        self.ortho_params, self.constrain_inputs, self.time_scale = ortho_params, constrain_inputs, time_scale
        kinds = ("weight_hh", "weight_hr", "weight_ih") if constrain_inputs else ("weight_hh", "weight_hr")
        self._constrained = [name for name in self._flat_weights_names if name.startswith(kinds)]
        self._blocks = {name: stacked_blocks(self, name, getattr(self, name).shape[0]) for name in self._constrained}
        self.reset_parameters()
        for name in self._constrained:
            orthogonal(self, name, ortho_params)

    def reset_parameters(self) -> None:
        """Draw every constrained block uniformly (Haar), the rest as torch does, and biases for the time scale."""
        blocks: dict[str, int] | None = getattr(self, "_blocks", None)
        if blocks is None:  # torch's constructor; what it draws is replaced
            return
        bound = self.hidden_size**-0.5 if self.hidden_size else 0.0
        with torch.no_grad():
            for name in self._flat_weights_names:
                constrained = is_parametrized(self, name)
                # the free tensor, since the weight of uninitialised memory cannot be computed
                present: Tensor = self.parametrizations[name].original if constrained else getattr(self, name)  # type: ignore
                if present.is_meta:
                    continue
                if name not in blocks:
                    nn.init.uniform_(present, -bound, bound)
                    continue
                shape = present.shape if constrained else present.unflatten(0, (blocks[name], -1)).shape
                draw = torch.randn(shape, dtype=torch.float32, device=present.device)
                weight = qr_orthogonalize(draw).to(present.dtype)
                weight = weight.flatten(0, 1) if weight.ndim == 3 else weight
                if constrained:
                    self.parametrizations[name].right_inverse(weight)  # type: ignore[index, union-attr]
                else:
                    present.copy_(weight)
            if self.time_scale is not None:
                self._set_time_scale(self.time_scale)

    def _set_time_scale(self, steps: int) -> None:
        for name in self._flat_weights_names:
            if not name.startswith("bias_ih") or getattr(self, name).is_meta:
                continue
            inputs, hidden = getattr(self, name), getattr(self, name.replace("bias_ih", "bias_hh"))
            spread = torch.empty(self.hidden_size, dtype=torch.float32, device=inputs.device)
            assert self._memory_gate is not None
            span = slice(self._memory_gate * self.hidden_size, (self._memory_gate + 1) * self.hidden_size)
            inputs[span], hidden[span] = spread.uniform_(1.0, max(steps - 1, 1.5)).log().to(inputs.dtype), 0.0

    def _arguments(self) -> dict[str, Any]:
        names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
        return {name: getattr(self, name) for name in (*names, "ortho_params", "constrain_inputs")}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as constructor arguments and state dict; the class that torch makes cannot be pickled."""
        if not is_parametrized(self):
            return super().__reduce_ex__(protocol)
        original = next(self.parameters())
        arguments = self._arguments() | {"device": original.device, "dtype": original.dtype}
        flags = {name: p.requires_grad for name, p in self.named_parameters()}
        return _rebuild, (type(self).__mro__[1], arguments, self.state_dict(), self.training, flags)


class OrthoRNN(_OrthoRecurrent, nn.RNN):
    """``nn.RNN`` whose recurrent matrices are orthogonal.

    With ``nonlinearity="tanh"`` gradients over a hundred steps keep their size as long as the state stays small;
    without a nonlinearity they would keep it exactly.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional, device, dtype: as
            in :class:`torch.nn.RNN`.
        ortho_params: how a free matrix becomes orthogonal.
        constrain_inputs: constrain ``weight_ih…`` too, not only ``weight_hh…``.

    Shape:
        as in :class:`torch.nn.RNN`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS,
        constrain_inputs: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional)
        super().__init__(*sizes, device=device, dtype=dtype)
        self._set_up(ortho_params, constrain_inputs, None)

    def _arguments(self) -> dict[str, Any]:
        return super()._arguments() | {"nonlinearity": self.nonlinearity}


_GATED = """``nn.{name}`` with the recurrent matrix of each gate orthogonal.

    One constraint on the {gates} stacked matrices together would make each of them contract; here each gate has its
    own. With ``time_scale`` the biases of the {memory} gate are drawn so that units remember for 1 to that many
    steps: then gradients survive long sequences.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional{more}, device, dtype: as in
            :class:`torch.nn.{name}`.
        ortho_params: how a free matrix becomes orthogonal.
        constrain_inputs: constrain ``weight_ih…`` too, not only ``weight_hh…``{hr}.
        time_scale: the longest memory in steps, at least 2; ``None`` leaves torch's biases.

    Shape:
        as in :class:`torch.nn.{name}`.

    Raises:
        ValueError: ``time_scale`` below 2, or without biases.

    Source: Tallec and Ollivier, "Can recurrent neural networks warp time?", ICLR 2018, for the biases{changed}.
    """


_CHANGED = """. They also lower the input gate by as much; here it
        stays, since the state would then enter the cell scaled by the inverse of its memory"""


class OrthoLSTM(_OrthoRecurrent, nn.LSTM):
    __doc__ = _GATED.format(
        name="LSTM", gates="four", memory="forget", more=", proj_size", hr=" and ``weight_hr…``", changed=_CHANGED
    )
    _memory_gate = 1  # torch's order: input, forget, cell, output

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS,
        constrain_inputs: bool = False,
        time_scale: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__(*sizes, device=device, dtype=dtype)
        self._set_up(ortho_params, constrain_inputs, time_scale)

    def _arguments(self) -> dict[str, Any]:
        return super()._arguments() | {"proj_size": self.proj_size, "time_scale": self.time_scale}


class OrthoGRU(_OrthoRecurrent, nn.GRU):
    __doc__ = _GATED.format(name="GRU", gates="three", memory="update", more="", hr="", changed="")
    _memory_gate = 1  # torch's order: reset, update, new; the update gate keeps the old state

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        ortho_params: OrthoParams = DEFAULT_ORTHO_PARAMS,
        constrain_inputs: bool = False,
        time_scale: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__(*sizes, device=device, dtype=dtype)
        self._set_up(ortho_params, constrain_inputs, time_scale)

    def _arguments(self) -> dict[str, Any]:
        return super()._arguments() | {"time_scale": self.time_scale}
