"""Weights stay orthogonal where the process lets float32 products round to fewer bits."""

import threading

import pytest
import torch
from torch.testing import assert_close

from orthogonium import OrthoConv2d, OrthoLinear, spectral_norm_bound
from orthogonium.initialization import conv_orthogonal_
from orthogonium.layers import singular_values
from orthogonium.linalg import _full_products as full
from orthogonium.linalg import orthogonality_defect, polar, polar_pass_through, skew_frame
from orthogonium.linalg._precision import without_autocast
from orthogonium.optim import LowRankOrthogonal, RiemannianAdam, RiemannianSGD, StiefelMuon
from orthogonium.reparametrizers import PRESETS
from tests.helpers import contract, gaussian, orthogonal_matrix


@pytest.fixture(params=["high", "medium"])
def setting(request):
    """On a CPU without bfloat16 instructions neither changes a product, and these tests say little."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    assert torch.get_float32_matmul_precision() == request.param, "left as it was found"
    torch.set_float32_matmul_precision(before)


def near(shape, size=1e-2):
    return (orthogonal_matrix(shape) + size * gaussian(shape, seed=1)).float()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(preset, setting):
    layer = OrthoLinear(96, 96, ortho_params=PRESETS[preset])
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(1e-2 * gaussian((96, 96)).float())
    for mode in (True, False):
        weight = layer.train(mode).weight.detach()
        assert orthogonality_defect(weight).max() <= contract(weight), f"training={mode}"


def test_convolutions(setting):
    layer = OrthoConv2d(8, 8, 3, padding="same", padding_mode="circular")
    assert (singular_values(layer, (8, 8, 8)) - 1).abs().max() <= 5e-6


def test_gradients(setting):
    matrix, grad = near((128, 128), 0.3).requires_grad_(), gaussian((128, 128), seed=2).float()
    (found,) = torch.autograd.grad(polar(matrix), matrix, grad)
    wide = matrix.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(polar(wide), wide, grad.double())
    assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_functions(setting):
    point = near((160, 160))
    eye = torch.eye(160)
    for made in (polar_pass_through(point), skew_frame(point, eye, "exponential"), skew_frame(point, eye, "cayley")):
        assert orthogonality_defect(made) <= contract(made)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: RiemannianSGD(p, lr=0.1),
        lambda p: RiemannianAdam(p, lr=0.01),
        lambda p: StiefelMuon(p, lr=0.01),
        lambda p: LowRankOrthogonal(p, lr=0.1, rank=4),
        lambda p: LowRankOrthogonal(p, lr=0.1, rank=4, update="geodesic"),
    ],
    ids=["sgd", "adam", "muon", "low rank", "geodesic"],
)
def test_optimizers(make, setting):
    parameter = torch.nn.Parameter(orthogonal_matrix((96, 96), dtype=torch.float32))
    optimizer = make([parameter])
    for step in range(30):
        parameter.grad = gaussian((96, 96), seed=step).float() / 96
        optimizer.step()
    assert orthogonality_defect(parameter.detach()) <= contract(parameter)


def test_initial_convolutions(setting):
    layer = torch.nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular", bias=False)
    conv_orthogonal_(layer.weight)
    assert (singular_values(layer, (16, 8, 8)) - 1).abs().max() <= 5e-6


def test_compiled(setting):
    layer = OrthoLinear(128, 128)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(1e-2 * gaussian((128, 128)).float())
    made = torch.compile(lambda: layer.weight.clone(), backend="aot_eager", fullgraph=True)()
    assert orthogonality_defect(made.detach()) <= contract(made)


def test_bounds(setting):
    for seed in range(5):
        matrix = gaussian((200, 200), seed=seed).float()
        assert spectral_norm_bound(matrix) >= torch.linalg.matrix_norm(matrix.double(), 2)


@pytest.mark.skipif(full._READ is None, reason="a setting for each backend came with torch 2.9")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_setting_is_full_inside_and_returns_with_the_last_thread(device, setting):
    backend = full._BACKENDS[device]
    found = full._read(backend)
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with full.ON[device]:
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=stay)
    with full.ON[device]:
        thread.start()
        assert inside.wait(10)
        assert full._read(backend) == "ieee"
    assert full._read(backend) == "ieee"
    assert full.ON[device].are_needed()
    leave.set()
    thread.join()
    assert full._read(backend) == found


def test_nothing_is_entered_where_products_are_full():
    assert torch.get_float32_matmul_precision() == "highest"
    assert without_autocast(torch.zeros(1)) is without_autocast(torch.zeros(1, dtype=torch.float64))


def test_an_inherited_setting_stays_inherited():
    if full._READ is None:
        pytest.skip("torch 2.9 brought inheritance")
    before = full._read("mkldnn"), full._read("mkldnn", "all")
    full._WRITE("mkldnn", "matmul", "none")
    try:
        torch.backends.fp32_precision = "bf16"
        with full.ON["cpu"]:
            assert full._read("mkldnn") == "ieee"
        assert full._read("mkldnn") == "bf16"
        torch.backends.fp32_precision = "none"
        assert full._read("mkldnn") == "none"
    finally:
        torch.backends.fp32_precision = "none"
        full._WRITE("mkldnn", "matmul", before[0])
