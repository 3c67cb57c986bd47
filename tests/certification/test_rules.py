"""Each layer with each option that it accepts: no constant below the slopes, no error below what float32 rounds."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orthogonium as og
from orthogonium.certification.forward_error import SizeRecorder, forward_error
from orthogonium.certification.network import analyse
from orthogonium.certification.program import run
from orthogonium.certification.rounding import BINARY64, Arithmetic
from orthogonium.layers import AOLConv2d, SkewOrthoConv1d, SkewOrthoConv2d

LINE, IMAGE, VOLUME = (2, 9), (2, 6, 7), (1, 4, 5, 4)


class Call(nn.Module):
    """A function as a module that is looked into."""

    def __init__(self, function, text):
        super().__init__()
        self.function, self.text = function, text

    def forward(self, x):
        return self.function(x)

    def __repr__(self):
        return self.text


def call(text):
    space = {"torch": torch, "F": F, "nn": nn, "W": torch.randn(7, 7, generator=torch.Generator().manual_seed(5))}
    space["K"] = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(6))
    return Call(eval(f"lambda x: {text}", space), text)


def norm2d(**options):
    layer = nn.BatchNorm2d(2, **options)
    layer.running_mean.copy_(torch.tensor([1.0, -3.0]))
    layer.running_var.copy_(torch.tensor([0.04, 2.0]))
    return layer


def instance2d():
    layer = nn.InstanceNorm2d(2, affine=True, track_running_stats=True)
    layer.running_var.copy_(torch.tensor([0.25, 2.0]))
    nn.init.normal_(layer.weight)
    return layer


def trained(layer, seed=0, dtype=torch.float32):
    """With parameters and running statistics as training leaves them: none at its start."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in (*layer.named_parameters(), *layer.named_buffers()):
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.data = (drawn.square() + 0.01 if name.endswith("var") else drawn).to(dtype)
    return layer


def cancelling(layer):
    """Hidden units that almost oppose each other tap by tap, of scales far apart."""
    with torch.no_grad():
        layer.weight.view(layer.weight.shape[0], -1)[1::2] *= -1
        layer.weight.add_(layer.weight.roll(1, 0), alpha=1 - 1e-3)
        layer.weight[0] *= 1e-5
        layer.log_q.copy_(torch.linspace(-20, 20, len(layer.log_q)))
    return layer


def convex(branch, alpha=0.3, **options):
    return og.ConvexResidual(branch, alpha, **options)


BOTH, MODES = (torch.float32, torch.float64), ("circular", "zeros")
# (module, shape of one input). Tight: the constant is the norm of the operator to 1e-6 (to 1.05 for convolutions).
LINEAR = [
    *((nn.Linear(7, 5, bias=b), (7,)) for b in (True, False)),
    (nn.Linear(7, 5), (3, 7)),
    (og.OrthoLinear(7, 5), (7,)),
    (og.UnitNormLinear(7, 5), (7,)),
    *((nn.AvgPool1d(k, s, p), LINE) for k, s, p in ((2, 2, 0), (3, 1, 1), (3, 2, 1), (4, 3, 2), (2, 3, 0))),
    *((nn.AvgPool1d(3, 2, 1, ceil_mode=c, count_include_pad=i), LINE) for c in (True, False) for i in (True, False)),
    *(
        (nn.AvgPool2d(k, s, p, ceil_mode=c, count_include_pad=i, divisor_override=d), IMAGE)
        for k, s, p in ((2, 2, 0), (3, 2, 1), ((3, 2), (1, 2), (1, 0)))
        for c in (True, False)
        for i in (True, False)
        for d in (None, 1, 3)
    ),
    *((nn.AvgPool3d(2, 1, 1, ceil_mode=c, divisor_override=d), VOLUME) for c in (True, False) for d in (None, 2)),
    *((nn.AdaptiveAvgPool1d(n), LINE) for n in (1, 2, 4, 9, 11)),
    *((nn.AdaptiveAvgPool2d(n), IMAGE) for n in (1, 4, (None, 3), (3, 8))),
    (nn.AdaptiveAvgPool3d(2), VOLUME),
    *(
        (pad(p), LINE)
        for pad in (nn.ReflectionPad1d, nn.ReplicationPad1d, nn.CircularPad1d)
        for p in (1, (3, 0), (2, 4))
    ),
    *((pad((1, 2, 3, 0)), IMAGE) for pad in (nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d, nn.ZeroPad2d)),
    (nn.ReplicationPad3d(1), VOLUME),
    (nn.ReplicationPad2d((-1, -2, 3, 0)), IMAGE),
    *((nn.Upsample(scale_factor=s, mode=m), LINE) for s in (2, 1.5, 0.7) for m in ("nearest", "linear")),
    *((nn.Upsample((9, 5), mode="bilinear", align_corners=a), IMAGE) for a in (True, False)),
    (nn.Upsample(scale_factor=(2, 3), mode="nearest-exact"), IMAGE),
    (norm2d(affine=False), IMAGE),
    (norm2d(eps=0.1), IMAGE),
    (instance2d(), IMAGE),
    *((layer, (4, 4, 4)) for layer in (nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ChannelShuffle(2))),
    *((layer, IMAGE) for layer in (nn.Flatten(), nn.Unflatten(1, (1, 2)), nn.Identity(), nn.Dropout(), nn.Dropout2d())),
    *((call(text), (7,)) for text in ("x @ W", "torch.matmul(x, W)", "3 * x / 4", "x + 1", "1 - x", "F.linear(x, W)")),
    *((call(text), (7,)) for text in ("x * torch.arange(7.) + 2", "x.flip(1)", "x.mean(1, keepdim=True)", "x.sum(-1)")),
    *((call(text), IMAGE) for text in ("x.permute(0, 2, 3, 1)", "x.reshape(x.shape[0], -1)", "x.mean((2, 3))")),
    *((call(text), IMAGE) for text in ("torch.roll(x, 1, 2)", "x[:, :, ::2, 1:]", "F.avg_pool2d(x, 3, 1, 1)")),
    (call("F.pad(x, (1, 2), mode='reflect')"), LINE),
    (call("x.view(x.size(0), -1) * x.shape[1]"), IMAGE),
    (call("torch.stack([x, 2 * x], 1)"), (5,)),
    (call("torch.cat([x, x.mul(3)], dim=1)"), (5,)),
    (call("x[:, :, None] * torch.ones(4)"), (5,)),
    (call("x[:, :1] + torch.zeros(4)"), (5,)),
    *((og.ScaledAvgPool1d(k), LINE) for k in (1, 3, 4)),
    *((og.ScaledAvgPool2d(k), IMAGE) for k in (2, (3, 1), (1, 7))),
    *((og.ScaledAvgPool3d(k), VOLUME) for k in (2, (1, 3, 2))),
    *((og.InvertibleDownsampling2d(f), (2, 6, 4)) for f in (2, (3, 1))),
    *((og.InvertibleUpsampling2d(f), (6, 2, 3)) for f in ((2, 3), (1, 2))),
    *((trained(og.BatchCentering(2, bias=b), dtype=t), s) for b in (True, False) for t in BOTH for s in (IMAGE, (2,))),
    *((trained(og.LayerCentering(n, bias=b)), s) for b in (True, False) for n, s in ((7, (3, 7)), ((6, 7), IMAGE))),
    (trained(og.LayerCentering((2, 6, 7)).double()), IMAGE),
    (trained(og.LayerCentering(1)), (4, 1)),
    *((trained(og.LipschitzBatchNorm(2, bias=b), n, t), IMAGE) for b in (True, False) for n in (0, 3) for t in BOTH),
    *((trained(og.LipschitzBatchNorm(5, eps=100.0), dtype=t), (5,)) for t in BOTH),
    *((call(f"torch.lerp(x, x @ torch.eye(7), {w})"), (7,)) for w in (0.0, 0.25, 1.0, "torch.tensor(0.7)")),
    (call("torch.lerp(x, torch.ones(7), 0.3)"), (7,)),
]
BOUNDED = [  # linear, but the constant may exceed the norm
    *((nn.Conv1d(2, 3, k, s, p, d), LINE) for k, s, p, d in ((3, 1, 1, 1), (2, 2, 0, 1), (3, 2, 2, 2), (4, 3, 1, 1))),
    *((nn.Conv2d(2, 4, 3, s, p, groups=g), IMAGE) for s in (1, 2) for p in (0, 1) for g in (1, 2)),
    *((nn.Conv2d(2, 4, 3, padding=1, padding_mode=m), IMAGE) for m in ("circular", "reflect", "replicate")),
    *((nn.Conv2d(2, 4, (3, 2), padding=p), IMAGE) for p in ("same", "valid")),
    (nn.Conv3d(1, 2, 2, 1, 1), VOLUME),
    *((nn.ConvTranspose1d(2, 3, 3, s, 1, o), LINE) for s, o in ((1, 0), (2, 0), (2, 1))),
    *((nn.ConvTranspose2d(2, 4, 3, 2, 1, groups=g), IMAGE) for g in (1, 2)),
    (nn.ConvTranspose3d(1, 2, 2), VOLUME),
    *((og.OrthoConv2d(2, 8, 3, 2, padding_mode=m), (2, 6, 6)) for m in ("circular", "zeros")),
    *((og.OrthoConvTranspose2d(2, 4, 3, padding_mode=m), IMAGE) for m in ("circular", "zeros")),
    (AOLConv2d(2, 3, 3), IMAGE),
    *((SkewOrthoConv2d(2, 4, 3, groups=2, padding_mode=m), IMAGE) for m in ("circular", "zeros")),
    (SkewOrthoConv1d(2, 1, 5), LINE),
    (call("F.conv2d(x, K, None, 2, 1)"), IMAGE),
    (call("F.conv2d(x, K, padding='same', dilation=2)"), IMAGE),
    (nn.Unfold(3, 1, 1, 2), IMAGE),
    (call("x + F.linear(x, W)"), (7,)),
    *((call(text), IMAGE) for text in ("F.adaptive_avg_pool2d(x, 4)", "F.interpolate(x, scale_factor=2)")),
    *(
        (call(text), IMAGE)
        for text in ("F.unfold(x, 2)", "F.pad(x, (1, 1, 0, 1), 'circular')", "F.avg_pool2d(x, 2, None, 1, True)")
    ),
    (call("F.conv_transpose1d(x, K[:2, :, 0])"), LINE),
    (call("torch.cat([x[:, 1:], x[:, :4]], 1)"), (7,)),
    (call("x.chunk(2, 1)[0] + x.chunk(2, 1)[1]"), (8,)),
    *((convex(og.OrthoLinear(7, 7, dtype=t), a).to(t), (7,)) for a in (0.1, 0.5, 0.99) for t in BOTH),
    (convex(nn.Conv2d(2, 2, 3, padding=1)), IMAGE),
    (convex(og.OrthoConv2d(2, 8, 3, 2), shortcut=og.OrthoConv2d(2, 8, 2, 2)), (2, 6, 6)),
    *((call(f"torch.lerp(x, F.linear(x, W), {w})"), (7,)) for w in (0.5, -1.5, 3, "torch.linspace(-1, 2, 7)")),
    *((call(f"x.lerp(x[:, :1], {w})"), (5,)) for w in (0.2, "torch.ones(1)")),
]
CURVED = [
    *((layer, (6,)) for layer in (nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(-2.0), nn.LeakyReLU())),
    *((layer, (6,)) for layer in (nn.Hardtanh(-2, 3), nn.Tanh(), nn.Sigmoid(), nn.Hardsigmoid(), nn.Hardswish())),
    *((layer, (6,)) for layer in (nn.SiLU(), nn.Mish(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SELU())),
    *(
        (layer, (6,))
        for layer in (nn.ELU(2.0), nn.ELU(0.3), nn.CELU(0.5), nn.CELU(3.0), nn.Softplus(2.0), nn.Softplus())
    ),
    *(
        (layer, (6,))
        for layer in (nn.Softsign(), nn.Tanhshrink(), nn.Softshrink(0.7), nn.LogSigmoid(), nn.PReLU(init=3.0))
    ),
    *((layer, (6,)) for layer in (nn.Threshold(0.5, 0.5), nn.RReLU(0.1, 1.5), nn.AlphaDropout())),
    *((layer, (6,)) for layer in (nn.Softmax(1), nn.Softmax(-1), nn.Softmin(1), nn.LogSoftmax(1), og.MaxMin())),
    (nn.Softmax2d(), IMAGE),
    (og.GroupSort(3), (6,)),
    (nn.PReLU(2, init=1.5), IMAGE),
    *((nn.MaxPool1d(k, s, p, d), LINE) for k, s, p, d in ((2, 2, 0, 1), (3, 1, 1, 1), (3, 2, 1, 2), (4, 3, 2, 1))),
    *(
        (nn.MaxPool2d(k, s, p, ceil_mode=c), IMAGE)
        for k, s, p in ((2, 2, 0), (3, 1, 1), (3, 2, 1))
        for c in (True, False)
    ),
    (nn.MaxPool3d(2, 1), VOLUME),
    *((nn.AdaptiveMaxPool2d(n), IMAGE) for n in (1, 4)),
    *((layer, IMAGE) for layer in (nn.LPPool2d(2, 2), nn.LPPool2d(2, 3, 1))),
    *((call(text), (6,)) for text in ("torch.clamp(x, -1, 1)", "x.abs()", "-x", "x.sort(1).values", "x.topk(3)[0]")),
    *((call(text), (6,)) for text in ("torch.maximum(x, 2 * x.flip(1))", "x.amax(1)", "x.max(1)[0]", "torch.sin(x)")),
    *((call(text), (6,)) for text in ("torch.logsumexp(x, 1)", "torch.linalg.vector_norm(x, dim=1)", "torch.erf(x)")),
    *(
        (call(text), IMAGE)
        for text in ("F.max_pool2d(x, 3, 1, 1)", "F.adaptive_max_pool2d(x, 4)", "F.max_pool2d(x, 2)")
    ),
    *((call(text), LINE) for text in ("F.max_pool1d(x, 3, 2)", "F.avg_pool1d(x, 3, 2)", "F.adaptive_avg_pool1d(x, 4)")),
    *((call(text), (6,)) for text in ("F.leaky_relu(x, -2.0)", "F.elu(x, 2.0)", "F.hardtanh(x)", "F.softplus(x, 2)")),
    *((call(text), (6,)) for text in ("F.celu(x, 0.5)", "F.threshold(x, 1, 1)", "F.softmax(x, 1)", "F.mish(x)")),
    *((call(text), (6,)) for text in ("F.log_softmax(x, dim=-1)", "x.softmax(1)", "F.hardswish(x)", "F.logsigmoid(x)")),
    *((og.L2NormPool1d(k), LINE) for k in (1, 3, 4)),
    *((og.L2NormPool2d(k), IMAGE) for k in (2, (3, 1), (2, 7))),
    *((og.L2NormPool3d(k), VOLUME) for k in (2, (1, 3, 2))),
    *((convex(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), a), (6,)) for a in (0.2, 0.8)),
    *((trained(og.SLLLinear(6, h), dtype=t), (6,)) for h in (1, 3, 6, 9) for t in BOTH),
    *((og.SLLLinear(7), s) for s in ((7,), (2, 7))),
    *((trained(og.SLLConv1d(2, h, k, m), dtype=t), LINE) for h, k in ((3, 3), (1, 5)) for m in MODES for t in BOTH),
    *((trained(og.SLLConv2d(2, h, k, m)), IMAGE) for h, k in ((2, 3), (5, (1, 5))) for m in MODES),
    (trained(og.SLLConv2d(2, 3, 5)), (2, 2, 3)),
    *((trained(og.SLLConv3d(1, 2, (3, 1, 3), m)), VOLUME) for m in MODES),
    *((cancelling(trained(layer)), s) for layer, s in ((og.SLLLinear(6, 8), (6,)), (og.SLLConv1d(2, 4), LINE))),
    *((call(text), (6,)) for text in ("F.dropout(x, training=False)", "F.silu(x)", "F.gelu(x, approximate='tanh')")),
]
CASES = [*((m, s, "linear") for m, s in LINEAR), *((m, s, "bounded") for m, s in BOUNDED)]
CASES += [(m, s, "curved") for m, s in CURVED]


def named(case):
    module, shape, _ = case
    return f"{module}-{'x'.join(map(str, shape))}".replace("\n", " ")[:90]


def points(shape, kind, count=4):
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([0.1, 1.0, 3.0, 30.0], dtype=torch.float64)[:count].view(-1, *(1,) * len(shape))
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64) * scales


def slopes(network, x):
    """The norm of the Jacobian at each point."""

    def single(point):
        out = network.program(point[None])
        return out.flatten()

    return [
        torch.linalg.matrix_norm(
            torch.autograd.functional.jacobian(single, p, vectorize=True).reshape(-1, p.numel()), 2
        )
        for p in x
    ]


def bound_without_shape(module):
    """``None`` where the rule asks for a shape."""
    try:
        return analyse(module).bound
    except TypeError as error:
        if "Pass input_shape" in str(error):
            return None
        raise


@pytest.mark.parametrize("case", CASES, ids=named)
def test_no_constant_is_below_a_slope_and_no_error_below_the_rounding(case):
    module, shape, kind = case
    module.eval()
    network = analyse(module, shape)
    x = points(shape, kind)
    steepest = max(float(s) for s in slopes(network, x[:1] if kind == "linear" else x))
    assert steepest <= network.bound * (1 + 1e-12)  # what the reference itself rounds
    if kind == "linear":
        assert network.bound <= steepest * (1 + 1e-6)
    with torch.no_grad():
        outputs = network.program(x)
        moved = network.program(x.flip(0))
    apart, distance = (outputs - moved).reshape(len(x), -1).norm(dim=1), (x - x.flip(0)).flatten(1).norm(dim=1)
    jump = 1e-8 if "Softplus" in repr(module) else 0.0  # above its threshold, see the rule
    assert (apart <= network.bound * distance * (1 + 1e-12) + jump).all()
    if (alone := bound_without_shape(module)) is not None:
        assert steepest <= alone * (1 + 1e-12)
    # the same weights and inputs in float32
    recorder = SizeRecorder(network)
    narrow = x.float().double()
    values = {}
    run(network.program, narrow, results=values, visit=recorder)
    there = torch.zeros(len(x), dtype=torch.float64)
    fine = forward_error(network, recorder.sizes, there, BINARY64)
    coarse = forward_error(network, recorder.sizes, there, Arithmetic.of(torch.float32), fine)
    program = analyse(module, shape).program
    held = {name: value.float().double() for name, value in program.named_buffers() if value.is_floating_point()}
    if all(torch.equal(value, dict(program.named_buffers())[name]) for name, value in held.items()):
        with torch.no_grad():
            computed = program.float()(narrow.float()).double()
        off = (computed - values[network.output]).reshape(len(x), -1).norm(dim=1)
        assert (off <= coarse[network.output] + fine[network.output]).all()
        assert (coarse[network.output] <= 0.05 * (1 + narrow.flatten(1).norm(dim=1)) * max(1, network.bound)).all()


def test_the_table_is_long():
    assert len(CASES) >= 200
