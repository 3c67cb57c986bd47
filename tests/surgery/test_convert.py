import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import is_parametrized

import orthogonium as og
from orthogonium.linalg import orthogonality_defect
from tests.helpers import contract
from tests.surgery.zoo import mlp


def rows(report):
    return {row.name: row for row in report.rows}


def test_the_report_says_what_happened_and_prints():
    torch.manual_seed(0)
    model = mlp()
    plain = copy.deepcopy(model)
    report = og.convert(model, og.POLAR_ORTHO_PARAMS)
    assert [row.action for row in report.rows] == ["orthogonal"] * 3
    for index in (0, 2, 4):
        given = plain[index].weight.detach()
        moved = torch.linalg.norm(model[index].weight.detach() - given) / torch.linalg.norm(given)
        assert rows(report)[f"{index}.weight"].distance == pytest.approx(float(moved), rel=1e-5)
    text = str(report)
    assert "0.weight" in text
    assert "24×12" in text
    assert "3 changed, 0 left" in text


def test_the_bound_before_and_after():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight.mul_(10)
    report = og.convert(model)
    truth = 10 * 0.1
    assert report.bound_before > truth
    assert 1 <= report.bound_after <= 1 + 1e-5
    assert model.training
    unknown = og.convert(nn.Sequential(nn.Linear(3, 3), nn.Embedding(3, 3)))
    assert unknown.bound_after is None
    assert "bound unknown → unknown" in str(unknown)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("0", None, {"0.weight"}),
        (None, "0", {"2.weight", "4.weight"}),
        (["0*", "2*"], "*2*", {"0.weight"}),
        (
            lambda path, module: module.out_features == 16 if isinstance(module, nn.Linear) else False,
            None,
            {"2.weight"},
        ),
        ("4.weight", None, {"4.weight"}),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    model = mlp()
    report = og.convert(model, include=include, exclude=exclude)
    assert {row.name for row in report.changed} == expected
    assert {row.detail for row in report.left} == {"not selected by include and exclude"}
    assert {f"{name}.weight" for name, module in model.named_modules() if is_parametrized(module)} == expected


def test_a_function_is_asked_by_the_full_name_of_a_weight():
    def asked(path, module):
        return path == "2.weight"

    assert [row.name for row in og.convert(mlp(), include=asked).changed] == ["2.weight"]
    assert list(og.orthogonalize_model(mlp(), include=asked).drift) == ["2.weight"]
    assert "2.weight" not in {row.name for row in og.convert(mlp(), include=lambda p, m: not asked(p, m)).changed}


def test_an_include_that_matches_nothing_is_refused():
    for function in (og.convert, og.orthogonalize_model):
        with pytest.raises(ValueError, match=r"include='encoder\*' matches no weight of Sequential"):
            function(mlp(), include="encoder*")
        with pytest.raises(TypeError, match=r"include must be name patterns or a function, got \[3\]"):
            function(mlp(), include=[3])
    with pytest.raises(TypeError, match="exclude must be name patterns or a function, got 3"):
        og.convert(nn.Linear(2, 2), exclude=3)
    with pytest.raises(TypeError, match=r"manifold must be name patterns or a function, got \[3\]"):
        og.parameter_groups(mlp(), manifold=[3])


def test_single_weights_can_be_left():
    model = nn.LSTM(3, 4)
    og.convert(model, exclude="*weight_ih*")
    assert is_parametrized(model, "weight_hh_l0")
    assert not is_parametrized(model, "weight_ih_l0")


def test_what_is_constrained_already_stays():
    model = nn.Sequential(og.OrthoLinear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    report = og.convert(model)
    assert rows(report)["0.weight"].detail == "constrained already"
    assert rows(report)["1.weight"].detail == "parametrized already, by _WeightNorm"
    assert [row.name for row in report.changed] == ["2.weight"]
    assert og.convert(model).changed == []


def test_frozen_weights_stay():
    model = mlp()
    model[2].weight.requires_grad_(False)
    report = og.convert(model)
    assert rows(report)["2.weight"].detail.startswith("frozen")
    assert not is_parametrized(model[2])


def test_a_module_in_two_places_is_converted_once():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    report = og.convert(model, exclude="1")
    assert [row.name for row in report.changed] == ["0.weight"]
    assert model[0] is model[2]
    assert og.convert(nn.Sequential(twice := nn.Linear(4, 4), twice), exclude="1").changed == []


def test_lazy_modules_wait():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    report = og.convert(model)
    assert rows(report)["0.weight"].detail.startswith("lazy")
    model(torch.ones(2, 3))
    assert [row.name for row in og.convert(model).changed] == ["0.weight"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_modules_stay():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, torch.qint8)
    report = og.convert(model)
    assert rows(report)["0.weight"].detail.startswith("quantised")


def test_on_the_meta_device_constraints_are_laid_out_for_a_checkpoint():
    torch.manual_seed(0)
    source, state = mlp(), None
    state = source.state_dict()
    with torch.device("meta"):
        model = mlp()
    report = og.convert(model)
    assert [row.distance for row in report.rows] == [None] * 3
    model.to_empty(device="cpu").load_state_dict(state)
    og.convert(source)
    x = torch.randn(2, 12)
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    model = mlp().to(dtype)
    og.convert(model)
    assert model(torch.randn(2, 12, dtype=dtype)).dtype == dtype
    if dtype == torch.float64:
        assert orthogonality_defect(model[0].weight.detach()) <= contract(model[0].weight)


def test_subclasses_with_a_forward_of_their_own_are_left():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    report = og.convert(nn.Sequential(Scaled(3, 3)))
    assert report.rows[0].detail == "Scaled has a forward of its own"


def test_weights_computed_by_hooks_are_left():
    pruned = prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)
    report = og.convert(nn.Sequential(pruned))
    assert report.rows[0].detail.startswith("weight is no parameter")


def test_ties_to_something_unknown_leave_both():
    class Table(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

    layer = nn.Linear(4, 4)
    model = nn.ModuleList([layer, Table(layer.weight)])
    report = og.convert(model)
    assert rows(report)["0.weight"].detail == "tied to 1.weight, which cannot take the same constraint"
    assert report.changed == []
    assert layer.weight is model[1].weight
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5)
    head.weight = embedding.weight
    assert og.convert(nn.ModuleList([embedding, head]), exclude="1").changed == []


def test_what_each_kernel_becomes():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "plain": nn.Conv2d(4, 4, 3, padding=1),
            "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
            "shortcut": nn.Conv2d(4, 8, 1, stride=2),
            "shared_factor": nn.Conv1d(4, 4, 3, stride=2, dilation=2, padding=2),
            "reflect": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "pointwise_per_channel": nn.Conv2d(4, 4, 1, groups=4),
        }
    )
    found = {row.name.split(".")[0]: row for row in og.convert(model).rows}
    assert {name: row.action for name, row in found.items()} == {
        "plain": "orthogonal",
        "depthwise": "almost orthogonal",
        "shortcut": "orthogonal",
        "shared_factor": "almost orthogonal",
        "reflect": "left",
        "pointwise_per_channel": "orthogonal",
    }
    assert "repeats pixels" in found["reflect"].detail
    assert model["depthwise"].weight.abs().amin() > 0  # no mere shift


def test_swaps_replace_modules_everywhere():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 6), relu, nn.Linear(6, 6), relu, nn.Sequential(nn.Tanh()))
    report = og.convert(model.eval(), swaps={nn.ReLU: lambda old: og.MaxMin(), nn.Tanh: lambda old: None})
    assert isinstance(model[1], og.MaxMin)
    assert model[1] is model[3]
    assert not model[1].training
    assert rows(report)["1"].action == "swapped"
    assert rows(report)["4.0"].action == "left"
    kept = nn.Sequential(nn.ReLU())
    assert og.convert(kept, swaps={nn.ReLU: lambda old: og.MaxMin()}, exclude="0").changed == []
    assert type(kept[0]) is nn.ReLU
    assert (
        "cannot be swapped in place" in og.convert(nn.ReLU(), swaps={nn.ReLU: lambda old: og.MaxMin()}).rows[0].detail
    )


def test_a_broken_weight_is_refused_before_anything_changes():
    model = mlp()
    with torch.no_grad():
        model[4].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"4\.weight holds NaN or Inf"):
        og.convert(model)
    assert not any(is_parametrized(module) for module in model.modules())
    og.convert(model, exclude="4.weight")


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="init must be 'project' or 'reset', got 'keep'"):
        og.convert(mlp(), init="keep")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        og.convert(3)
    with pytest.raises(TypeError, match="ortho_params must be"):
        og.convert(mlp(), "polar")


def test_one_free_tensor_keeps_its_parameter():
    model = mlp()
    before = dict(model.named_parameters())
    og.convert(model)
    assert model[0].parametrizations.weight.original is before["0.weight"]
