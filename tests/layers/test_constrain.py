"""The constraint on convolutions and attention of torch itself."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import remove_parametrizations

from orthogonium.layers import OrthoConv2d, OrthoConvTranspose2d, OrthoLSTM, orthogonal, singular_values
from orthogonium.layers.constrain import almost_orthogonal
from orthogonium.linalg import orthogonality_defect
from orthogonium.parametrizations.compiled_evaluation import remembered_weight
from tests.helpers import contract
from tests.operators import allowance, spectrum

CONVOLUTIONS = {
    "1d": lambda: (nn.Conv1d(4, 6, 3, padding=1), (9,)),
    "1d_strided": lambda: (nn.Conv1d(4, 9, 5, stride=2, padding=2), (9,)),
    "2d": lambda: (nn.Conv2d(3, 5, 3, padding=1), (6, 7)),
    "2d_same": lambda: (nn.Conv2d(5, 3, (4, 3), padding="same", bias=False), (5, 6)),
    "2d_circular": lambda: (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (5, 6)),
    "2d_circular_strided": lambda: (nn.Conv2d(3, 8, 4, stride=2, padding=1, padding_mode="circular"), (6, 8)),
    "2d_valid_strided": lambda: (nn.Conv2d(3, 8, 3, stride=2), (7, 8)),
    "2d_groups_dilated": lambda: (nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2), (6, 5)),
    "2d_downsampling": lambda: (nn.Conv2d(4, 4, 1, stride=2, bias=False), (6, 5)),
    "3d": lambda: (nn.Conv3d(2, 4, (3, 1, 2), padding=(1, 0, 1)), (4, 3, 3)),
    "transposed_1d": lambda: (nn.ConvTranspose1d(6, 4, 3, stride=2, padding=1, output_padding=1), (5,)),
    "transposed_2d": lambda: (nn.ConvTranspose2d(8, 3, 2, stride=2), (3, 4)),
    "transposed_2d_overlapping": lambda: (nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1, groups=2), (3, 4)),
    "transposed_3d": lambda: (nn.ConvTranspose3d(4, 2, 3, padding=1), (3, 3, 3)),
}


def operator(module, sides):
    """``(outputs, inputs)`` in float64, from the response of the torch module to every impulse."""
    plain = copy.deepcopy(module)
    with torch.no_grad():
        kernel = plain.weight.detach().double()
        shape = (module.in_channels, *sides)
        impulses = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).view(-1, *shape)
        if module.transposed:
            function = getattr(F, f"conv_transpose{len(sides)}d")
            more = (module.stride, module.padding, module.output_padding, module.groups, module.dilation)
            return function(impulses, kernel, None, *more).flatten(1).T
        return plain._conv_forward(impulses, kernel, None).flatten(1).T


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_operator_of_a_torch_convolution_never_expands(name):
    torch.manual_seed(0)
    module, sides = CONVOLUTIONS[name]()
    assert orthogonal(module) is module
    optimizer = torch.optim.SGD(module.parameters(), lr=10.0)
    x = torch.randn(2, module.in_channels, *sides)
    for _ in range(3):
        matrix = operator(module, sides)
        values = spectrum(matrix)
        assert values[-1] <= 1 + allowance(matrix, torch.float32)
        assert values[-1] >= 0.9  # and not by shrinking
        optimizer.zero_grad()
        module(x).square().sum().sub(1).square().backward()
        optimizer.step()


def test_circular_padding_makes_it_orthogonal_altogether():
    module = orthogonal(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))
    matrix = operator(module, (5, 6))
    assert abs(spectrum(matrix) - 1).max() <= allowance(matrix, torch.float32)


def test_an_orthogonal_kernel_stays_what_it_is():
    donor = OrthoConv2d(4, 6, 3, padding=1)
    plain = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")
    with torch.no_grad():
        plain.weight.copy_(donor.weight)
    kernel = plain.weight.detach().clone()
    torch.testing.assert_close(orthogonal(plain).weight, kernel, rtol=0, atol=1e-6)


def test_the_layer_is_the_torch_class_plus_this_call():
    ours = OrthoConvTranspose2d(8, 4, 4, stride=2, padding=1, padding_mode="zeros")
    plain = nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1)
    orthogonal(plain).load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(plain(x), ours(x))


def test_image_sides_are_checked_where_the_bound_depends_on_them():
    module = orthogonal(nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="circular"))
    module(torch.randn(1, 8, 6, 6))
    for found in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with pytest.raises(ValueError, match="an image side of 7"):
            found(torch.randn(1, 8, 7, 7))
    remove_parametrizations(module, "weight")
    module(torch.randn(1, 8, 7, 7))


def test_what_has_no_orthogonal_kernel_is_refused():
    for mode in ("reflect", "replicate"):
        with pytest.raises(ValueError, match=f"padding_mode='{mode}' repeats pixels"):
            orthogonal(nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode))
    with pytest.raises(ValueError, match="no orthogonal kernel maps 4 to 8 channels"):
        orthogonal(nn.Conv2d(4, 8, 1, stride=2))
    with pytest.raises(ValueError, match="circular padding"):
        orthogonal(nn.Conv2d(4, 4, 3, padding=2, padding_mode="circular"))
    with pytest.raises(ValueError, match="is for matrices"):
        orthogonal(nn.Conv2d(4, 4, 3), blocks=2)


def test_after_removal_it_loads_checkpoints_as_torch_does():
    module = orthogonal(nn.Conv2d(4, 6, 3, padding=1))
    remove_parametrizations(module, "weight")
    plain = nn.Conv2d(4, 6, 3, padding=1)
    module.load_state_dict(plain.state_dict())
    assert torch.equal(module.weight, plain.weight)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_almost_orthogonal_kernels_never_expand(stride, transposed):
    torch.manual_seed(0)
    made = nn.ConvTranspose2d if transposed else nn.Conv2d
    module = made(6, 6, 3, stride=stride, padding=1, groups=6)
    almost_orthogonal(module)
    matrix = operator(module, (5, 6))
    assert 0.3 <= spectrum(matrix)[-1] <= 1 + allowance(matrix, torch.float32)


def test_singular_values_of_a_constrained_torch_convolution():
    module = orthogonal(nn.Conv2d(3, 12, 4, stride=2, padding=1, padding_mode="circular"))
    values = singular_values(module, (3, 6, 8))
    assert (values - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("dims", [None, (12, 20)])
def test_attention_per_head(dims):
    torch.manual_seed(0)
    more = {} if dims is None else {"kdim": dims[0], "vdim": dims[1]}
    module = nn.MultiheadAttention(16, 4, batch_first=True, **more)
    names = ["in_proj_weight"] if dims is None else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    given = {name: getattr(module, name).detach().double().unflatten(0, (-1, 4)) for name in names}
    for name in names:
        orthogonal(module, name)
    orthogonal(module.out_proj)
    for name in names:
        heads = getattr(module, name).detach().unflatten(0, (-1, 4))
        assert orthogonality_defect(heads).max() <= contract(heads)
        u, _, vh = torch.linalg.svd(given[name], full_matrices=False)
        torch.testing.assert_close(heads.double(), u @ vh, rtol=0, atol=2e-6)
    q, k, v = (torch.randn(2, 5, width) for width in (16, *(dims or (16, 16))))
    trained = module(q, k, v)[0]
    trained.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    module.eval()
    with torch.no_grad():  # torch's fused path
        torch.testing.assert_close(module(q, k, v)[0], trained)


def test_blocks_of_any_matrix():
    module = orthogonal(nn.Linear(5, 12), blocks=3)
    found = module.weight.detach().unflatten(0, (3, 4))
    assert orthogonality_defect(found).max() <= contract(found)
    whole = orthogonal(nn.LSTM(5, 6), "weight_hh_l0", blocks=1)
    assert orthogonality_defect(whole.weight_hh_l0.detach()) <= contract(whole.weight_hh_l0)


def test_what_compiled_evaluation_looks_up_lies_in_memory_as_announced():
    module = orthogonal(nn.Conv2d(3, 8, 3, padding=1)).eval()
    constraint = module.parametrizations.weight[0]
    free = list(module.parametrizations.weight.parameters())
    found = remembered_weight(free, constraint.number, list(module.weight.shape))
    assert found.stride() == torch.empty_like(found, memory_format=torch.contiguous_format).stride()
    assert torch.equal(found, module.weight)


MODULES = [lambda: OrthoConv2d(4, 4, 3), lambda: orthogonal(nn.Linear(4, 3)), lambda: OrthoLSTM(3, 4)]


@pytest.mark.parametrize("make", MODULES)
def test_a_deep_copy_outlives_removal_from_its_original(make):
    module = make()
    name = next(iter(module.parametrizations))
    twin = copy.deepcopy(module)
    both = nn.ModuleList([twin, twin])
    again = copy.deepcopy(both)
    assert again[0] is again[1]
    remove_parametrizations(module, name)
    for found in (twin, again[0]):
        expected = getattr(module, name)
        assert torch.equal(getattr(found, name), expected)
        remove_parametrizations(found, name)
        assert torch.equal(getattr(found, name), expected)


def test_deep_copies_keep_ties():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    pair = copy.deepcopy(nn.ModuleList([orthogonal(first), orthogonal(second)]))
    assert pair[0].parametrizations.weight.original is pair[1].parametrizations.weight.original
    assert pair[0].parametrizations.weight.original is not first.parametrizations.weight.original
