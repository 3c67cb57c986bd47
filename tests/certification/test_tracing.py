"""Models that change what they compute with while they compute: the bound is of what they do, or they are refused."""

import random

import pytest
import torch
from torch import nn

import orthogonium as og
from orthogonium.certification import lipschitz_bound, plain_network
from tests.certification.test_network_bound import scaled_identity, written


def shrinking(model, x):
    step = torch.ones(())
    for _ in range(3):
        x = x * step
        step *= 0.1
    return x


def test_a_constant_that_changes_counts_as_it_was_at_each_use():
    model, x = written(shrinking), torch.randn(5, 4)
    assert lipschitz_bound(model).bound == pytest.approx(1e-3, rel=1e-6)
    torch.testing.assert_close(plain_network(model)(x.double()).float(), model(x))


def test_a_constant_is_held_once():
    model = written(lambda m, x: (x * m.b + 1) * m.b, b=nn.Parameter(torch.randn(4)))
    assert len(dict(plain_network(model).named_buffers())) == 1


def with_weights_changed_between(model, x):
    y = model.a(x)
    model.a.weight.data.mul_(0.5)
    return model.a(y)


def with_weights_changed_after(model, x):
    y = model.a(x)
    model.a.weight.data.mul_(0.5)
    return y


def through_data(model, x):
    y = model.a(x)
    z = y.data
    z *= 100
    return y


def through_transpose(model, x):
    y = model.a(x).view(-1, 2, 2)
    z = y.mT
    z *= 100
    return y


def assigned_data(model, x):
    y = model.a(x)
    y.data = 100 * y
    return y


def through_an_older_view(model, x):
    y = model.a(x)
    view, other = y.view(-1, 4), y.view(-1, 4)
    view *= 100
    return other


def with_a_number_for_inplace(model, x):
    y = model.a(x)
    nn.functional.leaky_relu(y, 50.0, 1)
    return y


def with_an_option_set_for_one_call(model, x):
    model.slope.negative_slope = 100.0
    y = model.slope(x)
    model.slope.negative_slope = 0.01
    return y


def with_a_bias_for_one_call(model, x):
    bias, model.a.bias = model.a.bias, None
    y = model.a(x)
    model.a.bias = bias
    return y


def with_dropout_switched_on(model, x):
    model.drop.train()
    return model.drop(x)


def counting(model, x):
    model.calls = getattr(model, "calls", 0) + 1
    return x * model.calls


def under_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model.a(x)


def after_an_error(model, x):
    try:
        return 100 * x if len(x) else x
    except TypeError:
        return x


class Noise(nn.Module):
    def forward(self, weight):
        return weight + torch.randn_like(weight)


class Counting(nn.Module):
    calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight * self.calls


class Tripled(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return 3 * result if function is nn.functional.linear else result


class Derived(nn.Linear):
    """Its weight is computed from another tensor when it is read."""

    def __init__(self):
        nn.Module.__init__(self)
        self.in_features = self.out_features = 4
        self.free, self.bias, self.reads = nn.Parameter(torch.eye(4)), None, 0

    @property
    def weight(self):
        self.reads += 1
        return self.free * self.reads


def counted():
    layer = scaled_identity(4, 1.0)
    nn.utils.parametrize.register_parametrization(layer, "weight", Counting())
    return layer


def of_a_subclass():
    layer = scaled_identity(4, 1.0)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Tripled))
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (counted, "another weight each time that it is read"),
        (of_a_subclass, "Tripled, which may compute anything"),
        (Derived, "computes something else the second time"),
    ],
)
def test_weights_that_compute_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        lipschitz_bound(nn.Sequential(make()).eval())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (with_weights_changed_between, "changes weight of a while it computes"),
        (with_weights_changed_after, "changes weight of a while it computes"),
        (through_data, "works in place on a tensor that is read again"),
        (through_transpose, "works in place on a tensor that is read again"),
        (assigned_data, r"assigns to \.data"),
        (with_an_option_set_for_one_call, "changes negative_slope of slope while"),
        (with_a_bias_for_one_call, "changes bias of a while"),
        (with_dropout_switched_on, "puts drop into training mode"),
        (counting, "computes something else the second time"),
        (lambda m, x: x * random.random(), "computes something else the second time"),
        (lambda m, x: x * (1 + 99 * (x.shape[0] % 2)), "depend on the batch"),
        (lambda m, x: x * (1 + 99 * (x.shape[0] == 1)), "depend on the batch"),
        (lambda m, x: x * (1 + 99 * (x.dtype == torch.float32)), "not the same in each evaluation"),
        (lambda m, x: x / x.itemsize, "not the same in each evaluation"),
        (lambda m, x: x * x.stride(1), "not the same in each evaluation"),
        (under_autocast, "computes under autocast"),
        (lambda m, x: 100 * x if isinstance(x, torch.Tensor) else x, "other results than what was traced"),
        (lambda m, x: x if hasattr(x, "lengths") else 100 * x, "other results than what was traced"),
        (after_an_error, "other results than what was traced|cannot be followed"),
        (through_an_older_view, "works in place on a tensor that is read again"),
        (with_a_number_for_inplace, "works in place on a tensor that is read again"),
        (lambda m, x: torch.func.functional_call(m.a, {"weight": 9 * m.a.weight}, (x,)), "changes weight of a"),
        (lambda m, x: x * torch.rand(1), "computes something else the second time"),
        (lambda m, x: x + 0 * torch.rand(1), "draws random numbers"),
        (lambda m, x: m.noisy(x), "another weight each time that it is read"),
        (lambda m, x: nn.functional.softplus(x, threshold=0), r"jumps by 0\.693 at its threshold=0"),
        (lambda m, x: torch.einsum("nc,dc->nd", x, m.a.weight), "as x @ matrix"),
        (lambda m, x: torch.cat(x.split(2, 1), 1), "without taking them apart"),
        (lambda m, x: x.view(-1, 2, 2).sum(2, dtype=torch.int64), r"changes the precision to torch\.int64"),
        (lambda m, x: x.view(-1, 2, 2).mean(2, dtype=torch.float16), r"changes the precision to torch\.float16"),
        (lambda m, x: torch.norm(x, dim=1, dtype=torch.float16), r"changes the precision to torch\.float16"),
        (lambda m, x: nn.functional.pad(x[:, None, :2], (2, -2), mode="circular"), "leaves.*Crop first"),
        (lambda m, x: nn.functional.normalize(x), "unbounded slope"),
        (lambda m, x: x + torch.ones(3), "must match the size"),
    ],
)
def test_what_would_be_missed_is_refused(function, message):
    model = written(function, a=scaled_identity(4, 1.0), noisy=scaled_identity(4, 1.0))
    model.slope, model.drop = nn.LeakyReLU(), nn.Dropout()
    nn.utils.parametrize.register_parametrization(model.noisy, "weight", Noise().eval())
    model.eval()
    with pytest.raises((TypeError, ValueError), match=message):
        lipschitz_bound(model, (4,))


@pytest.mark.parametrize("shape", [(4,), None])
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x[:, torch.arange(x.shape[1]) // 4],
        lambda m, x: x[:, torch.zeros(4, dtype=torch.long, device=x.device)],
        lambda m, x: x[:, torch.arange(4) // x.shape[1]],
    ],
)
def test_an_index_made_from_sizes_may_repeat_entries(function, shape):
    with pytest.raises(TypeError, match="computes a tensor from sizes"):
        lipschitz_bound(written(function), shape)


def unpacked(model, x):
    values, _ = x.view(-1, 2, 2).max(dim=2)
    return values


def sorted_values(model, x):
    values, _ = torch.sort(x, dim=1)
    return values


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (unpacked, 1),
        (sorted_values, 1),
        (lambda m, x: x.topk(2, dim=1)[-2], 1),
        (lambda m, x: torch.max(input=x.view(-1, 2, 2), dim=2).values, 1),
        (lambda m, x: m.a(input=x.type_as(m.a.weight)), 1),
        (lambda m, x: torch.maximum(x[:, :2], x[:, 2:])[:, 1:], 2**0.5),
        (lambda m, x: torch.max(x[:, :2], x[:, 2:])[:, 1:], 2**0.5),
    ],
)
def test_values_of_pairs_and_arguments_by_name(function, expected):
    model = written(function, a=scaled_identity(4, 1.0))
    assert lipschitz_bound(model, (4,)).bound == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda x: x, (4,)), r"torch\.nn\.Module, got function"),
        ((nn.LazyLinear(3).eval(), (4,)), "weight is not initialised yet"),
        ((nn.Linear(4, 3, device="meta").eval(), (4,)), "meta device, without values"),
        ((torch.compile(nn.Linear(4, 3).eval()), (4,)), "the model that torch.compile was given"),
        ((nn.DataParallel(nn.Linear(4, 3)).eval(), (4,)), r"Pass model\.module"),
        ((nn.Linear(4, 3).eval(), 4), r"sizes of one input, such as \(3, 32, 32\), got 4"),
        ((nn.Linear(4, 3).eval(), (4.0,)), r"got \(4\.0,\)"),
        ((nn.Linear(4, 3).eval(), (-4,)), r"at least 0, got \(-4,\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        og.lipschitz_bound(*arguments)
