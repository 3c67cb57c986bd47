"""What a wide layer does to the size of signals and of gradients, computed instead of sampled."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from orthogonium.initialization._elementwise import ActivationLike, Elementwise, as_elementwise
from orthogonium.initialization._quadrature import gaussian_expectation


@dataclass(frozen=True)
class Moments:
    """Gaussian moments of an activation at pre-activations of variance ``q``, ``x = √q z``."""

    mean: float  # E φ(x)
    second: float  # E φ(x)²
    slope2: float  # E φ'(x)²
    slope4: float  # E φ'(x)⁴
    growth: float  # d/dq E φ(x)² = E[z φ φ'] / √q

    @property
    def spread(self) -> float:
        """Variance of the squared singular values that one layer adds, with orthogonal weights at χ = 1."""
        return max(self.slope4 / self.slope2**2 - 1, 0.0) if self.slope2 > 1e-150 else math.inf


def moments(phi: Elementwise, q: float) -> Moments:
    """Moments at ``q > 0``, to about 1e-15.

    Raises:
        ValueError: values or slopes grow too fast to have moments.
    """
    return _moments(phi, float(q))


@lru_cache(maxsize=4096)
def _moments(phi: Elementwise, q: float) -> Moments:
    root = math.sqrt(q)

    def functions(z: Tensor) -> Tensor:
        value, slope = phi.value_and_slope(root * z)
        return torch.stack((value, value**2, slope**2, slope**4, z * value * slope / root))

    kinks = [kink / root for kink in phi.kinks]
    found = gaussian_expectation(functions, kinks, width=1 / root)
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"{phi.name} grows too fast for Gaussian moments at variance {q:g}")
    return Moments(*found.tolist())


@dataclass(frozen=True)
class SignalTheory:
    """Sizes through a stack of wide layers ``h_l = W_l φ(h_{l−1}) + b_l``, as the theory of infinite width has them.

    Attributes:
        q: ``(depth,)``, variance of the entries of ``h_l``.
        activation_rms: ``(depth,)``, root mean square of ``φ(h_l)``.
        chi: ``(depth,)``, factor of the squared gradient from ``h_{l+1}`` down to ``h_l``.
        gradient_rms: ``(depth,)``, of the gradient at ``h_l``, with that at the last layer as unit.
    """

    q: Tensor
    activation_rms: Tensor
    chi: Tensor
    gradient_rms: Tensor


def signal_through_depth(
    activation: ActivationLike, sigma_w: float, sigma_b: float = 0.0, depth: int = 100, q: float = 1.0
) -> SignalTheory:
    """Follow the variance of pre-activations, and that of gradients, through ``depth`` layers.

    Exact for infinite width, the same for Gaussian and orthogonal weights; at finite width orthogonal weights follow it
    closely and Gaussian ones with a spread that grows with depth over width.

    Args:
        activation: a name, a module or a function of one number.
        sigma_w, sigma_b: weights have variance ``sigma_w² / fan_in`` (or are ``sigma_w`` times orthogonal), biases
            ``sigma_b²``.
        depth: how many layers.
        q: variance of the first pre-activations.

    Raises:
        ValueError: an activation without moments, a negative size, or a depth below one.

    Source:
        Poole et al., "Exponential expressivity in deep neural networks through transient chaos", NeurIPS 2016;
        Schoenholz et al., "Deep information propagation", ICLR 2017.
    """
    phi = as_elementwise(activation)
    check_scales(sigma_w, sigma_b)
    if depth < 1 or not q > 0:
        raise ValueError(f"depth must be at least 1 and q positive, got depth={depth}, q={q}")
    variances, seconds, chis = [], [], []
    for _ in range(depth):
        here = moments(phi, max(q, 1e-280))
        variances.append(q)
        seconds.append(here.second)
        chis.append(sigma_w**2 * here.slope2)
        q = sigma_w**2 * here.second + sigma_b**2
        if not q < 1e280:
            raise ValueError(f"the variance overflows at layer {len(chis)}: sigma_w={sigma_w} is far too large")
    chi = torch.tensor(chis, dtype=torch.float64, device="cpu")
    steps = torch.cat((chi[:-1].log(), torch.zeros(1, dtype=torch.float64, device="cpu")))  # the last layer is the unit
    gradients = torch.exp(steps.flip(0).cumsum(0).flip(0) / 2)
    to_tensor = torch.tensor(variances, dtype=torch.float64, device="cpu")
    return SignalTheory(to_tensor, torch.tensor(seconds, dtype=torch.float64, device="cpu").sqrt(), chi, gradients)


def check_scales(sigma_w: float, sigma_b: float) -> None:
    """Raise ``ValueError`` unless ``sigma_w`` is positive and ``sigma_b`` is not negative, both finite."""
    if not (0 < sigma_w < math.inf and 0 <= sigma_b < math.inf):
        raise ValueError(f"sigma_w must be positive and sigma_b at least 0, got sigma_w={sigma_w}, sigma_b={sigma_b}")
