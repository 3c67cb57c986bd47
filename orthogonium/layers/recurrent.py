"""Recurrent layers whose gates are orthogonal, so that memory neither fades nor explodes by the weights' doing."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from orthogonium._checks import check_count
from orthogonium.initialization._filling import Draw
from orthogonium.initialization.recurrent import check_horizon, remember
from orthogonium.layers.constrain import orthogonal
from orthogonium.linalg import qr_orthogonalize
from orthogonium.parametrizations.torch_weights import stacked_blocks
from orthogonium.reparametrizers import DEFAULT_ORTHO_PARAMS, OrthoParams


class _OrthoRecurrent(nn.RNNBase):
    """Construction and initialisation; the computation is torch's."""

    def _set_up(
        self,
        ortho_params: OrthoParams,
        constrain_inputs: bool,
        horizon: int | None = None,
        lower_input_gate: bool = True,
    ) -> None:
        check_count("hidden_size", self.hidden_size)
        if horizon is not None:
            check_horizon(horizon)
            if not self.bias:
                raise ValueError("horizon sets biases, so it needs bias=True")
        self.horizon, self.lower_input_gate = horizon, lower_input_gate
        self.ortho_params, self.constrain_inputs = ortho_params, constrain_inputs
        kinds = ("weight_hh", "weight_hr", "weight_ih") if constrain_inputs else ("weight_hh", "weight_hr")
        self._constrained = [name for name in self._flat_weights_names if name.startswith(kinds)]
        self._blocks = {name: stacked_blocks(self, name, getattr(self, name).shape[0]) for name in self._constrained}
        self.reset_parameters()
        for name in self._constrained:
            orthogonal(self, name, ortho_params)

    def reset_parameters(self) -> None:
        """Draw every constrained block uniformly (Haar), the rest as torch does, and biases for the horizon."""
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
        if self.horizon is not None:
            remember(self, self.horizon, Draw("orthogonal", None), self.lower_input_gate)


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
        self._set_up(ortho_params, constrain_inputs)


_GATED = """``nn.{name}`` with the recurrent matrix of each gate orthogonal.

    One constraint on the {gates} stacked matrices together would make each of them contract; here each gate has its
    own. With ``horizon`` the biases are those of :func:`orthogonium.initialize`: at the start at least half of the
    state, and of its gradient, is left after that many steps.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional{more}, device, dtype: as in
            :class:`torch.nn.{name}`.
        ortho_params: how a free matrix becomes orthogonal.
        constrain_inputs: constrain ``weight_ih…`` too, not only ``weight_hh…``{hr}.
        horizon: steps that the state should last, at least 1: units keep ``1 − 1/T`` a step, with ``T`` evenly over
            ``(2, 10 · horizon)``. ``None`` leaves torch's biases.{lower}

    Shape:
        as in :class:`torch.nn.{name}`.

    Raises:
        ValueError: ``horizon`` below 1, or without biases.
        TypeError: it is no integer.

    Source: Tallec and Ollivier, "Can recurrent neural networks warp time?", ICLR 2018, for the biases.
    """


_LOWER = """
        lower_input_gate: with ``horizon``, cells also take in as little as they forget. Otherwise only the forget gate
            is set, and what a cell adds feeds back: gradients grow, by 1e7 over 100 steps without input."""


class OrthoLSTM(_OrthoRecurrent, nn.LSTM):
    __doc__ = _GATED.format(name="LSTM", gates="four", more=", proj_size", hr=" and ``weight_hr…``", lower=_LOWER)

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
        horizon: int | None = None,
        *,
        lower_input_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__(*sizes, device=device, dtype=dtype)
        self._set_up(ortho_params, constrain_inputs, horizon, lower_input_gate)


class OrthoGRU(_OrthoRecurrent, nn.GRU):
    __doc__ = _GATED.format(name="GRU", gates="three", more="", hr="", lower="")

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
        horizon: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__(*sizes, device=device, dtype=dtype)
        self._set_up(ortho_params, constrain_inputs, horizon)
