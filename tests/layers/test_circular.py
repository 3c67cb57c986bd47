"""Circular padding and its adjoint against torch's own."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.testing import assert_close

from orthogonium.layers._circular import circular_fold, circular_pad

CASES = [
    ((2, 3, 5), [(1, 2)]),
    ((3, 5), [(5, 0)]),
    ((2, 3, 4, 5), [(1, 1), (1, 1)]),
    ((2, 3, 4, 5), [(0, 3), (5, 0)]),
    ((2, 3, 4, 5), [(4, 4), (0, 0)]),
    ((2, 3, 3, 4, 2), [(1, 2), (0, 1), (2, 2)]),
    ((3, 3, 4, 2), [(1, 0), (2, 1), (0, 2)]),
    ((0, 3, 4, 4), [(1, 1), (1, 1)]),
]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(x, pads):
    return F.pad(x, [p for pair in reversed(pads) for p in pair], mode="circular")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "pads"), CASES, ids=str)
def test_padding_is_that_of_torch_to_the_bit(shape, pads, dtype):
    x = randn(*shape).to(dtype)
    padded = circular_pad(x, pads)
    assert padded.dtype == dtype
    assert torch.equal(padded, reference(x, pads) if x.numel() else padded.new_empty(padded.shape))


@pytest.mark.parametrize(("shape", "pads"), CASES, ids=str)
def test_folding_is_the_adjoint(shape, pads):
    x = randn(*shape)
    wide = randn(*circular_pad(x, pads).shape, seed=1)
    assert_close((circular_pad(x, pads) * wide).sum(), (x * circular_fold(wide, pads)).sum())


@pytest.mark.parametrize(("shape", "pads"), CASES, ids=str)
def test_folding_axis_by_axis_gives_the_same_bits(shape, pads):
    wide = randn(*circular_pad(randn(*shape), pads).shape, seed=1)
    assert torch.equal(circular_fold(wide, pads), torch.func.vmap(lambda t: circular_fold(t, pads))(wide[None])[0])


@pytest.mark.parametrize(("shape", "pads"), CASES[:-1], ids=str)
def test_gradients_are_those_of_torch(shape, pads):
    x = randn(*shape).requires_grad_()
    direction = randn(*circular_pad(x, pads).shape, seed=1)
    (expected,) = torch.autograd.grad(reference(x, pads), x, direction)
    assert_close(torch.autograd.grad(circular_pad(x, pads), x, direction)[0], expected)


@pytest.mark.parametrize("run", [circular_pad, circular_fold])
def test_derivatives_of_both_orders(run):
    pads = [(1, 2), (2, 0)]
    x = randn(1, 2, 6, 4).requires_grad_()
    assert gradcheck(lambda x: run(x, pads), x)
    assert gradgradcheck(lambda x: run(x, pads).square(), x)


@pytest.mark.parametrize("run", [circular_pad, circular_fold])
def test_transforms(run):
    pads = [(1, 2), (2, 0)]
    x, tangent = randn(3, 2, 6, 4), randn(3, 2, 6, 4, seed=1)
    f = lambda x: run(x, pads)  # noqa: E731
    assert_close(torch.func.vmap(f)(x.unsqueeze(1)).squeeze(1), f(x))
    expected = f(tangent)  # both maps are linear
    assert_close(torch.func.jvp(f, (x,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        assert_close(forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent, expected)
    jacobian = torch.func.jacrev(f)(x).flatten(4).flatten(0, 3)
    assert_close(jacobian @ tangent.flatten(), expected.flatten())
    hessian_vector = torch.func.jvp(torch.func.grad(lambda x: (f(x) ** 3).sum()), (x,), (tangent,))[1]
    adjoint = circular_fold if run is circular_pad else circular_pad
    assert_close(hessian_vector, adjoint(6 * f(x) * expected, pads))


@pytest.mark.parametrize("run", [circular_pad, circular_fold])
def test_compiles_and_exports_in_one_graph(run):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return run(x, [(1, 2), (2, 0)]).sin()

    x = randn(3, 2, 6, 4).requires_grad_()
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), Layer()(x))
    assert_close(torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(Layer()(x).sum(), x))
    assert_close(torch.export.export(Layer(), (x.detach(),)).module()(x), Layer()(x))


def test_channels_last_and_other_layouts():
    x = randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    padded = circular_pad(x, [(1, 1), (1, 1)])
    assert padded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(padded, reference(x, [(1, 1), (1, 1)]))
    (grad,) = torch.autograd.grad(padded, x, padded.detach())
    assert grad.is_contiguous(memory_format=torch.channels_last)
    turned = randn(5, 4, 3, 2).permute(3, 2, 1, 0)
    assert torch.equal(circular_pad(turned, [(1, 1), (1, 1)]), reference(turned, [(1, 1), (1, 1)]))
    expanded = randn(2, 1, 4, 5).expand(2, 3, 4, 5)
    assert_close(circular_fold(expanded, [(1, 1), (1, 1)]), circular_fold(expanded.clone(), [(1, 1), (1, 1)]))


def test_on_the_meta_device_and_under_autocast():
    assert circular_pad(torch.empty(2, 3, 4, 4, device="meta"), [(1, 1), (1, 1)]).shape == (2, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert circular_pad(torch.ones(1, 1, 4), [(1, 1)]).dtype == torch.float32


def test_the_gradient_handed_in_is_left_alone():
    x = randn(1, 1, 4, 4).requires_grad_()
    direction = randn(1, 1, 6, 6, seed=1)
    before = direction.clone()
    torch.autograd.grad(circular_pad(x, [(1, 1), (1, 1)]), x, direction)
    assert torch.equal(direction, before)


def test_a_border_longer_than_the_side_is_refused_by_torch():
    with pytest.raises(RuntimeError, match="wrap"):
        circular_pad(torch.ones(1, 1, 3), [(4, 0)])
