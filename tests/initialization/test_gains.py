"""Gains against published and independently computed figures."""

import math
import warnings

import mpmath
import pytest
import torch
from mpmath import mpf
from torch import nn

import orthogonium as og
from orthogonium.initialization import ISOMETRY_SPREAD, UnstableVarianceWarning, criticality, fixed_point, gain
from orthogonium.initialization._elementwise import NAMED, Elementwise
from orthogonium.initialization._quadrature import gaussian_expectation
from orthogonium.initialization.mean_field import moments

SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

# (value, slope, kinks) in arbitrary precision, written from the definitions
EXACT = {
    "tanh": (mpmath.tanh, lambda x: mpmath.sech(x) ** 2, []),
    "sigmoid": (lambda x: 1 / (1 + mpmath.exp(-x)), lambda x: mpmath.sech(x / 2) ** 2 / 4, []),
    "relu": (lambda x: max(x, mpf(0)), lambda x: mpf(x > 0), []),
    "selu": (
        lambda x: mpf(SELU_SCALE) * (x if x > 0 else mpf(SELU_ALPHA) * mpmath.expm1(x)),
        lambda x: mpf(SELU_SCALE) * (1 if x > 0 else mpf(SELU_ALPHA) * mpmath.exp(x)),
        [],
    ),
    "softsign": (lambda x: x / (1 + abs(x)), lambda x: 1 / (1 + abs(x)) ** 2, []),
    "elu": (lambda x: x if x > 0 else mpmath.expm1(x), lambda x: mpf(1) if x > 0 else mpmath.exp(x), []),
    "gelu": (lambda x: x * mpmath.ncdf(x), lambda x: mpmath.ncdf(x) + x * mpmath.npdf(x), []),
    "silu": (
        lambda x: x / (1 + mpmath.exp(-x)),
        lambda x: (1 + x / (1 + mpmath.exp(x))) / (1 + mpmath.exp(-x)),
        [],
    ),
    "mish": (
        lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x))),
        lambda x: (
            mpmath.tanh(mpmath.log1p(mpmath.exp(x)))
            + x * mpmath.sech(mpmath.log1p(mpmath.exp(x))) ** 2 / (1 + mpmath.exp(-x))
        ),
        [],
    ),
    "hardtanh": (lambda x: max(min(x, mpf(1)), mpf(-1)), lambda x: mpf(abs(x) < 1), [-1, 1]),
}

# criterion "critical", "variance", "gradient"; six digits after the point
TABLE = {
    "tanh": (1, 1.592537, 1.467414),
    "sigmoid": (10.149264, 1.846229, 4.722646),
    "relu": (math.sqrt(2), 1.414214, 1.414214),
    "selu": (0.690486, 1.000000, 0.966026),
    "softsign": (1, 2.337533, 2.095781),
    "elu": (1, 1.245198, 1.223429),
    "gelu": (2, 1.533530, 1.481114),
    "silu": (2, 1.676532, 1.623320),
    "mish": (5 / 3, 1.486848, 1.444755),  # mish'(0) = tanh(ln 2) = 0.6
    "hardtanh": (1, 1.392036, 1.210287),
}


def exact_moments(name, q):
    """``E φ²`` and ``E φ'²`` with 30 digits."""
    value, slope, kinks = EXACT[name]
    with mpmath.workdps(30):
        root = mpmath.sqrt(mpf(q))
        edges = sorted({mpf(k) for k in range(-15, 16, 3)} | {mpf(k) / root for k in kinks} | {mpf(-1), mpf(1)})
        return [
            mpmath.quad(lambda z, f=f: f(root * z) ** 2 * mpmath.npdf(z), edges, method="gauss-legendre")
            for f in (value, slope)
        ]


@pytest.mark.parametrize("q", [1.0, 0.3])
@pytest.mark.parametrize("name", EXACT)
def test_moments_agree_with_thirty_digits(name, q):
    found = moments(Elementwise(name), q)
    second, slope2 = exact_moments(name, q)
    assert abs(found.second / second - 1) < 1e-12
    assert abs(found.slope2 / slope2 - 1) < 1e-12


@pytest.mark.parametrize("q", [1e-6, 1.0, 45.624278, 1e6])
def test_moments_of_rectifiers_and_sigmoid_in_closed_form(q):
    relu = moments(Elementwise("relu"), q)
    expected = [math.sqrt(q / (2 * math.pi)), q / 2, 0.5, 0.5, 0.5]
    for found, exact in zip(vars(relu).values(), expected, strict=True):
        assert abs(found / exact - 1) < 1e-13
    assert abs(moments(Elementwise("sigmoid"), q).mean - 0.5) < 1e-14  # by symmetry
    erf = moments(Elementwise("erf"), q)  # arcsine law
    assert abs(erf.second / (2 / math.pi * math.asin(2 * q / (1 + 2 * q))) - 1) < 1e-12


def test_polynomials_and_unknown_kinks_are_integrated_exactly():
    powers = torch.arange(0, 13, 2, dtype=torch.float64)
    found = gaussian_expectation(lambda z: z[None] ** powers[:, None])
    exact = torch.tensor([1, 1, 3, 15, 105, 945, 10395], dtype=torch.float64)
    torch.testing.assert_close(found, exact, rtol=1e-14, atol=0)
    kink = 0.123456789  # nobody says where
    with mpmath.workdps(30):
        reference = mpmath.npdf(mpf(kink)) - mpf(kink) * (1 - mpmath.ncdf(mpf(kink)))
    found = gaussian_expectation(lambda z: (z - kink).clamp_min(0)[None])
    assert abs(float(found) / reference - 1) < 1e-13


@pytest.mark.parametrize("name", TABLE)
def test_gains_of_the_table(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnstableVarianceWarning)
        critical = gain(name)
    found = (critical, gain(name, criterion="variance"), gain(name, criterion="gradient"))
    for value, expected in zip(found, TABLE[name], strict=True):
        assert abs(value - expected) < 5.1e-7  # six digits, rounded


@pytest.mark.parametrize(
    ("name", "sigma_w", "chi"),
    [("tanh", 5 / 3, 1.2098), ("sigmoid", 1, 0.0557), ("relu", 2**0.5, 1), ("selu", 0.75, 1.0037)],
)
def test_chi_at_the_gains_of_torch(name, sigma_w, chi):
    assert sigma_w == pytest.approx(nn.init.calculate_gain(name))
    assert abs(fixed_point(name, sigma_w).chi - chi) < 5.1e-5


def test_sigmoid_is_critical_at_one_place():
    point = criticality("sigmoid")
    assert abs(point.q - 45.624278) < 5e-7
    assert point.stability == "stable"
    assert abs(point.sigma_w**2 * point.second_moment / point.q - 1) < 1e-12
    assert abs(fixed_point("sigmoid", point.sigma_w).q / point.q - 1) < 1e-9


def test_tanh_settles_where_experiments_find_it():
    assert abs(math.sqrt(fixed_point("tanh", 5 / 3).second_moment) - 0.6513) < 5e-5
    hundred_steps = og.initialization.signal_through_depth("tanh", 5 / 3, depth=101, q=(5 / 3) ** 2)
    assert abs(hundred_steps.gradient_rms[0] / 1.03e4 - 1) < 0.005  # three digits


@pytest.mark.parametrize(("depth", "sigma_w"), [(10, 1.039084), (100, 1.011555), (1000, 1.003573)])
def test_isometry_of_a_given_depth(depth, sigma_w):
    point = criticality("tanh", depth)
    assert abs(point.sigma_w - sigma_w) < 5.1e-7
    assert gain("tanh", depth=depth) == point.sigma_w
    assert abs(depth * point.spread / ISOMETRY_SPREAD - 1) < 1e-9
    assert abs(point.chi - 1) < 1e-12
    assert point.stability == "stable"
    settled = fixed_point("tanh", point.sigma_w, point.sigma_b)
    assert abs(settled.q / point.q - 1) < 1e-6


def test_half_stable_points_of_gelu_and_silu():
    point = criticality("gelu", bias=True)
    assert abs(point.sigma_w**2 - 1.98305826) < 5e-9
    assert abs(point.sigma_b**2 - 0.17292239) < 5e-9
    assert abs(point.q - (3 + math.sqrt(17)) / 2) < 1e-9
    assert point.stability == "half-stable"
    silu = criticality("silu", bias=True)
    assert abs(silu.q - 14.32017362) < 5e-8
    assert abs(silu.sigma_w**2 - 1.98800468) < 5e-9


@pytest.mark.parametrize("name", ["gelu", "silu", "mish"])
def test_unstable_variances_are_warned_of_and_true(name):
    with pytest.warns(UnstableVarianceWarning, match=f"{name} is critical at sigma_w") as caught:
        point = criticality(name)
    assert caught[0].filename == __file__
    assert point.stability == "unstable"
    with pytest.warns(UnstableVarianceWarning) as caught:
        gain(name)
    assert caught[0].filename == __file__
    balance = gain(name, criterion="variance")  # holds variance one, until the smallest disturbance
    assert fixed_point(name, 0.99 * balance).q == 0
    with pytest.raises(ValueError, match="grow without end"):
        fixed_point(name, 1.01 * balance)


def test_gelu_dies_below_and_explodes_above():
    theory = og.initialization.signal_through_depth
    died, exploded = (theory("gelu", sigma_w, depth=100).q[-1] for sigma_w in (1.5, 1.6))
    assert died < 1e-3
    assert exploded > 1e3


def test_stability_in_words():
    stability = {name: criticality(name).stability for name in ("tanh", "relu", "selu", "softsign", "hardtanh", "elu")}
    neutral = {name for name, word in stability.items() if word == "neutral"}
    assert neutral == {"relu"}
    assert set(stability.values()) == {"neutral", "stable"}
    assert criticality("gelu", q=10.0).stability == "stable"
    assert criticality("tanh", q=0.5).q == 0.5


def test_criteria_differ_and_mean_what_they_say():
    values = {criterion: gain("sigmoid", criterion=criterion) for criterion in og.initialization.gains.CRITERIA}
    assert len({round(value, 9) for value in values.values()}) == 5
    assert values["lipschitz"] == pytest.approx(4, abs=1e-14)
    assert gain("sigmoid", "gaussian", "lipschitz") == pytest.approx(2, abs=1e-14)
    assert gain("relu", criterion="centred") == pytest.approx(math.sqrt(2 / (1 - 1 / math.pi)), abs=1e-12)
    x = mpmath.findroot(lambda x: 2 * mpmath.npdf(x) - x * x * mpmath.npdf(x), 1.4)  # gelu'' = 0
    assert gain("gelu", criterion="lipschitz") == pytest.approx(
        float(1 / (mpmath.ncdf(x) + x * mpmath.npdf(x))), abs=1e-13
    )


def test_functions_modules_and_names_agree():
    expected = gain("elu")
    assert gain(nn.ELU()) == gain(torch.nn.functional.elu) == expected
    assert gain(lambda x: torch.where(x > 0, x, torch.expm1(x)), criterion="variance") == pytest.approx(
        gain("elu", criterion="variance"), abs=1e-13
    )
    shifted = gain(lambda x: torch.relu(x - 0.3) - torch.relu(-x - 0.3), criterion="variance")  # soft threshold
    assert shifted == pytest.approx(gain(nn.Softshrink(0.3), criterion="variance"), abs=1e-12)
    assert gain(nn.PReLU(init=0.5)) == pytest.approx(math.sqrt(2 / 1.25), abs=1e-12)


def test_kinks_and_jumps_are_found():
    function = lambda x: torch.relu(x - 0.7) + torch.where(x < -1.3, -1.0, 0.0) * x**0  # noqa: E731
    kinks = Elementwise(function).kinks
    assert len(kinks) == 3
    for found, expected in zip(kinks, (-1.3, 0, 0.7), strict=True):
        assert abs(found - expected) < 1e-15
    assert Elementwise("tanh").kinks == Elementwise("gelu").kinks == (0.0,)


@pytest.mark.parametrize("module", [og.MaxMin(), og.GroupSort(3)])
def test_reordering_activations_have_gain_one(module):
    for criterion in og.initialization.gains.CRITERIA:
        assert gain(module, criterion=criterion) == pytest.approx(1, abs=1e-13)
    assert criticality(module).stability == "neutral"
    assert gain(module, depth=1000) == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize(
    ("activation", "match"),
    [
        ("softmax", "every output depends on all inputs"),
        (nn.Softmax(1), "every output depends on all inputs"),
        (nn.GLU(), "multiplies one half"),
        (lambda x: x.softmax(-1), "mixes its inputs"),
        (lambda x: x - x.mean(), "mixes its inputs"),
        (lambda x: x[..., ::2], "shape"),
        (lambda x: x + torch.rand_like(x), "random"),
        (torch.log, "not finite"),
        (nn.LayerNorm(7), "cannot be applied to each entry"),
        (nn.PReLU(3), "cannot be applied to each entry"),
        ("tanhh", "unknown activation 'tanhh'. Known: linear"),
        ("softplus", "no critical point without bias"),
        (torch.round, "slope zero"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,  # addresses differ between workers
)
def test_what_has_no_gain_is_refused_with_a_reason(activation, match):
    with pytest.raises(ValueError, match=match):
        gain(activation)


def test_arguments_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r'depth=10 means nothing for criterion="variance"'):
        gain("tanh", criterion="variance", depth=10)
    with pytest.raises(ValueError, match="10 Gaussian layers are none at any gain"):
        gain("tanh", "gaussian", depth=10)
    with pytest.raises(ValueError, match="weights must be one of orthogonal, gaussian, got 'uniform'"):
        gain("tanh", "uniform")
    with pytest.raises(ValueError, match="criterion must be one of"):
        gain("tanh", criterion="best")
    with pytest.raises(ValueError, match="give one of them"):
        criticality("tanh", 10, bias=True)
    with pytest.raises(ValueError, match="tanh needs no bias"):
        criticality("tanh", bias=True)
    with pytest.raises(ValueError, match="depth must be an integer of at least 1, got 0"):
        criticality("tanh", 0)
    with pytest.raises(ValueError, match=r"100 layers of relu are no isometry.*looks_linear_"):
        criticality("relu", 100)
    with pytest.raises(ValueError, match="jumps, so it has no Lipschitz constant"):
        gain("hardshrink", criterion="lipschitz")
    with pytest.raises(ValueError, match=r"slope of .* grows without end"):
        gain(torch.square, criterion="lipschitz")
    with pytest.raises(TypeError, match=r"got the class"):
        gain(nn.ReLU)
    with pytest.raises(TypeError, match="must return a float64 tensor"):
        gain(lambda x: x.float())


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv_transpose3d", "relu", "leaky_relu"])
def test_calculate_gain_agrees_with_torch_where_torch_is_right(name):
    assert og.calculate_gain(name) == pytest.approx(nn.init.calculate_gain(name), abs=1e-13)


def test_calculate_gain_of_torch_names_and_parameters():
    assert og.calculate_gain("tanh") == pytest.approx(1, abs=1e-13)
    assert og.calculate_gain("leaky_relu", 0.2) == pytest.approx(nn.init.calculate_gain("leaky_relu", 0.2), abs=1e-13)
    assert og.calculate_gain("elu", 0.5) == pytest.approx(gain(nn.ELU(0.5)), abs=1e-13)
    assert og.calculate_gain("elu", 0.5) != og.calculate_gain("elu")
    with pytest.raises(ValueError, match="tanh takes no param, got 2"):
        og.calculate_gain("tanh", 2)
    with pytest.raises(TypeError, match="param must be a number, got True"):
        og.calculate_gain("leaky_relu", True)
    with pytest.raises(TypeError, match="must be a name"):
        og.calculate_gain(torch.tanh)


def test_every_name_has_a_variance_gain():
    for name in NAMED:
        second = moments(Elementwise(name), 1.0).second
        assert gain(name, criterion="variance") == pytest.approx(second**-0.5, rel=1e-14)


def test_nothing_outside_is_touched():
    module = nn.PReLU().train()
    with torch.no_grad(), torch.inference_mode():
        gain(module)
    assert module.training
    assert module.weight.dtype == torch.float32
    assert module.weight.grad is None
    before = torch.get_rng_state()
    gain(nn.Sigmoid(), criterion="variance")
    assert torch.equal(torch.get_rng_state(), before)
