"""Pooling, normalisation, shuffles and residual blocks: the norm of the Jacobian, in both modes, and after training."""

import copy

import pytest
import torch
from torch import nn

import orthogonium as og

SHAPES = {
    "average1d": (lambda: og.ScaledAvgPool1d(3), (2, 2, 7)),
    "average2d": (lambda: og.ScaledAvgPool2d((2, 3)), (2, 2, 4, 6)),
    "average3d": (lambda: og.ScaledAvgPool3d(2), (1, 2, 4, 2, 3)),
    "norm1d": (lambda: og.L2NormPool1d(3), (2, 2, 7)),
    "norm2d": (lambda: og.L2NormPool2d((2, 3)), (2, 2, 5, 6)),
    "norm3d": (lambda: og.L2NormPool3d(2), (1, 2, 4, 2, 3)),
    "down": (lambda: og.InvertibleDownsampling2d((2, 3)), (2, 2, 4, 6)),
    "up": (lambda: og.InvertibleUpsampling2d((2, 3)), (2, 12, 2, 3)),
    "batch_centering": (lambda: og.BatchCentering(3), (4, 3, 5)),
    "batch_centering_flat": (lambda: og.BatchCentering(3, momentum=None, bias=False), (4, 3)),
    "batch_norm": (lambda: og.LipschitzBatchNorm(3), (4, 3, 2, 2)),
    "layer_centering": (lambda: og.LayerCentering((3, 4)), (2, 3, 4)),
    "convex": (lambda: og.ConvexResidual(nn.Sequential(og.OrthoLinear(6, 6), og.MaxMin())), (2, 6)),
    "sll_dense": (lambda: og.SLLLinear(5, 7), (2, 5)),
    "sll_circular": (lambda: og.SLLConv2d(2, 5), (1, 2, 4, 3)),
    "sll_zeros": (lambda: og.SLLConv2d(3, 2, (3, 1), "zeros"), (1, 3, 4, 3)),
    "sll_1d": (lambda: og.SLLConv1d(3, kernel_size=5), (1, 3, 6)),
    "sll_3d": (lambda: og.SLLConv3d(1, 2), (1, 1, 3, 3, 3)),
}
ISOMETRIES = {"down", "up"}
TIGHT = {"average1d", "average2d", "average3d", "norm1d", "norm2d", "norm3d", "layer_centering", "batch_centering"}


def norm_at(layer, x):
    """The Jacobian's largest singular value over the whole batch, state left as it was."""
    state = copy.deepcopy(layer.state_dict())
    jacobian = torch.autograd.functional.jacobian(layer, x).reshape(-1, x.numel())
    layer.load_state_dict(state)
    return torch.linalg.svdvals(jacobian)


@pytest.mark.parametrize("name", SHAPES)
def test_the_jacobian_never_expands(name):
    torch.manual_seed(0)
    make, shape = SHAPES[name]
    layer = make().double()
    optimizer = torch.optim.SGD([*layer.parameters(), torch.zeros(1, requires_grad=True)], lr=3.0)
    rounding = 1e-12
    for step in range(4):
        for mode in (True, False):
            layer.train(mode)
            for scale in (1e-3, 1.0, 30.0):
                values = norm_at(layer, scale * torch.randn(shape, dtype=torch.float64))
                assert values[0] <= 1 + rounding
                if name in TIGHT:
                    assert values[0] >= 1 - rounding
                if name in ISOMETRIES:
                    assert values[-1] >= 1 - rounding
        layer.train()
        optimizer.zero_grad()
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        (layer(x) - 1).square().sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
        optimizer.step()
        assert step or all(p.grad.abs().sum() > 0 for p in layer.parameters() if p.ndim)


@pytest.mark.parametrize("name", SHAPES)
def test_it_exports_with_the_same_outputs(name):
    torch.manual_seed(0)
    make, shape = SHAPES[name]
    model = nn.Sequential(make())
    x = torch.randn(shape)
    model(x), model(2 * x + 1)
    plain = og.export(model)
    assert not any(type(module).__module__.startswith("orthogonium") for module in plain.modules())
    torch.testing.assert_close(plain(x), model.eval()(x), rtol=0, atol=1e-6)
    torch.export.export(plain, (x,))


def test_norm_pooling_keeps_the_norm_and_has_a_gradient_at_zero():
    x = torch.randn(2, 3, 4, 6)
    pooled = og.L2NormPool2d((2, 3))(x)
    assert pooled.shape == (2, 3, 2, 2)
    torch.testing.assert_close(pooled[0, 0, 0, 0], torch.linalg.norm(x[0, 0, :2, :3]))
    torch.testing.assert_close(torch.linalg.norm(pooled), torch.linalg.norm(x))
    zero = torch.zeros(1, 1, 2, 2, requires_grad=True)
    og.L2NormPool2d(2)(zero).sum().backward()
    assert torch.equal(zero.grad, torch.zeros_like(zero))


def test_shuffles_are_those_of_torch_and_inverse_to_each_other():
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(og.InvertibleDownsampling2d(2)(x), nn.PixelUnshuffle(2)(x))
    assert torch.equal(og.InvertibleUpsampling2d((2, 3))(og.InvertibleDownsampling2d((2, 3))(x)), x)


@pytest.mark.parametrize("made", [og.BatchCentering, og.LipschitzBatchNorm])
def test_running_statistics_are_right_from_the_first_batch_and_travel(made):
    torch.manual_seed(0)
    layer = made(3)
    batches = [torch.randn(8, 3, 5) + 10 for _ in range(4)]
    layer(batches[0])
    torch.testing.assert_close(layer.running_mean, batches[0].mean((0, 2)))
    for batch in batches[1:]:
        layer(batch)
    torch.testing.assert_close(layer.running_mean, torch.stack(batches).mean((0, 1, 3)))
    for _ in range(200):  # what was seen long ago is forgotten
        layer(batches[0] - 20)
    torch.testing.assert_close(layer.running_mean, batches[0].mean((0, 2)) - 20, rtol=0, atol=1e-4)
    other = made(3)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(batches[0]), layer.eval()(batches[0]))
    before = layer.running_mean.clone()
    layer(batches[1])
    assert torch.equal(layer.running_mean, before)
    layer.reset_running_stats()
    assert layer.running_mean.abs().max() == 0


@pytest.mark.parametrize("made", [og.BatchCentering, og.LipschitzBatchNorm])
def test_an_empty_batch_leaves_running_statistics_alone(made):
    layer = made(3)
    layer(torch.randn(8, 3))
    before = copy.deepcopy(layer.state_dict())
    assert layer(torch.empty(0, 3)).shape == (0, 3)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_lipschitz_batch_norm_evens_out_channels():
    torch.manual_seed(0)
    layer = og.LipschitzBatchNorm(3, momentum=None)
    x = torch.randn(4096, 3) * torch.tensor([0.5, 2.0, 8.0])
    layer(x)
    found = layer(x).std(0)
    torch.testing.assert_close(found / found[0], torch.ones(3), rtol=0.05, atol=0)
    assert float(layer.factors().detach().abs().max()) == pytest.approx(1)
    wide = og.LipschitzBatchNorm(3)
    wide(100 * x)
    assert wide.factors().abs().max() < 0.1  # as batch norm: no need to be as large as one


@pytest.mark.parametrize("batches", [0, 3])
def test_lipschitz_batch_norm_does_not_grow_differences_between_training_batches(batches):
    torch.manual_seed(0)
    layer, sizes = og.LipschitzBatchNorm(6).double(), torch.logspace(-1, 1, 6, dtype=torch.float64)
    for _ in range(batches):
        layer(torch.randn(8, 6, dtype=torch.float64) * sizes)
    x, step = torch.randn(8, 6, dtype=torch.float64) * sizes, 1e-6

    def called(inputs):
        return copy.deepcopy(layer)(inputs).detach()

    moves = step * torch.eye(48, dtype=torch.float64).view(48, 8, 6)
    columns = [(called(x + move) - called(x - move)).flatten() / (2 * step) for move in moves]
    assert torch.linalg.matrix_norm(torch.stack(columns), 2) <= 1 + 1e-8


def test_swaps_for_whole_models():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.pool, self.average = nn.BatchNorm2d(4), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)
            self.same, self.act, self.norm = nn.MaxPool2d(3, 1, 1), nn.GELU(), nn.LayerNorm([4, 3, 3])

        def forward(self, x):
            return self.norm(self.act(self.same(self.average(self.pool(self.bn(x))))))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 4, 12, 12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.0)
    model(x)
    mean, shape = model.bn.running_mean.clone(), model(x).shape
    report = og.convert(model, swaps=og.surgery.LIPSCHITZ_SWAPS)
    swapped = {row.name for row in report.rows if row.action == "swapped"}
    assert swapped == {"bn", "pool", "average", "act", "norm"}
    assert model(x).shape == shape
    assert not torch.equal(model.bn.running_mean, mean)
    odd = nn.Sequential(nn.MaxPool2d(3, 2, 1))
    expected = odd(torch.randn(1, 1, 7, 7)).shape
    og.convert(odd, swaps=og.surgery.LIPSCHITZ_SWAPS)
    assert odd(torch.randn(1, 1, 7, 7)).shape == expected
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    og.convert(encoder, swaps=og.surgery.LIPSCHITZ_SWAPS)
    assert type(encoder.norm1) is nn.LayerNorm


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"momentum must be in \(0, 1\] or None, got 0"):
        og.BatchCentering(3, momentum=0)
    with pytest.raises(ValueError, match="eps must be positive"):
        og.LipschitzBatchNorm(3, eps=0)
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\), got 1"):
        og.ConvexResidual(nn.Identity(), alpha=1)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        og.SLLConv2d(3, kernel_size=2)
    with pytest.raises(ValueError, match="padding_mode must be 'circular' or 'zeros', got 'reflect'"):
        og.SLLConv2d(3, padding_mode="reflect")
    with pytest.raises(ValueError, match="kernel_size must be at least 1"):
        og.ScaledAvgPool2d(0)


def test_convex_residual_under_autocast():
    block = og.layers.ConvexResidual(og.OrthoLinear(4, 4))
    with torch.autocast("cpu", torch.bfloat16):  # the branch is rounded, the shortcut is not
        block(torch.randn(2, 4)).float().sum().backward()
    assert block.logit.grad is not None
