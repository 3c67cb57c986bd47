"""Weight decay where it shrinks weights, and nowhere else."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import orthogonium as og
from orthogonium.linalg import orthogonality_defect
from tests.helpers import contract


def names_of(model, group):
    known = {id(p): name for name, p in model.named_parameters()}
    return [known[id(p)] for p in group["params"]]


def mixed():
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "ours": og.OrthoLinear(4, 4),
            "conv": og.OrthoConv2d(4, 4, 3),
            "theirs": parametrizations.weight_norm(nn.Linear(4, 4)),
            "norm": nn.LayerNorm(4),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
            "embedding": nn.Embedding(5, 4),
        }
    )
    model["tied"] = nn.Linear(4, 5, bias=False)
    model["tied"].weight = model["embedding"].weight
    return model


def test_free_tensors_norms_and_biases_do_not_decay():
    model = mixed()
    decayed, rest = og.parameter_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert names_of(model, decayed) == ["plain.weight", "embedding.weight"]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(names_of(model, rest)) == trainable - {"plain.weight", "embedding.weight"}
    assert all(isinstance(p, nn.Parameter) for group in (decayed, rest) for p in group["params"])
    torch.optim.AdamW([decayed, rest])
    only = og.parameter_groups(nn.LayerNorm(3))
    assert [g["weight_decay"] for g in only] == [0.0]


def test_a_group_for_the_manifold():
    model = mixed()
    kept, decayed, rest = og.parameter_groups(model, manifold="plain.w*")
    assert names_of(model, kept) == ["plain.weight"]
    assert [g["manifold"] for g in (kept, decayed, rest)] == [True, False, False]
    og.RiemannianAdam([kept, decayed, rest])
    by_function = og.parameter_groups(model, manifold=lambda name, p: p is model["plain"].weight)
    assert names_of(model, by_function[0]) == ["plain.weight"]


def test_refusals():
    with pytest.raises(ValueError, match="weight_decay must not be negative, got -1"):
        og.parameter_groups(nn.Linear(2, 2), -1)
    with pytest.raises(ValueError, match=r"manifold='rnn\*' matches no trainable parameter of Linear"):
        og.parameter_groups(nn.Linear(2, 2), manifold="rnn*")
    with pytest.raises(ValueError, match=r"bias of shape \(2,\) is no matrix"):
        og.parameter_groups(nn.Linear(2, 2), manifold="*")
    with pytest.raises(ValueError, match="free tensor of a parametrized weight"):
        og.parameter_groups(og.OrthoLinear(2, 2), manifold="*weight*")


def one_step(layer, **options):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(layer.parameters(), **options)
    layer(torch.randn(8, layer.in_features)).square().mean().backward()
    optimizer.step()
    return layer.weight.detach()


def test_torchs_householder_map_under_adamw_defaults_is_zero_after_one_step():
    """Why this function exists; if torch mends it, the documentation should say so."""
    torch.manual_seed(0)
    layer = parametrizations.orthogonal(nn.Linear(6, 4), orthogonal_map="householder")
    assert torch.linalg.matrix_norm(layer.weight.detach(), 2) == pytest.approx(1.0, abs=1e-5)
    assert one_step(layer).count_nonzero() == 0


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)], ids=str)
@pytest.mark.parametrize("preset", og.PRESETS)
def test_ours_stay_orthogonal_under_adamw_even_without_groups(preset, shape):
    torch.manual_seed(0)
    layer = og.OrthoLinear(*shape, ortho_params=og.PRESETS[preset])
    before = layer.weight.detach().clone()
    weight = one_step(layer)  # the defaults
    assert orthogonality_defect(weight) <= contract(weight)
    assert 0 < (weight - before).norm() <= 0.1
    for _ in range(3):
        weight = one_step(layer, lr=0.1, weight_decay=10.0)  # the free tensor is set to zero by the decay
        assert orthogonality_defect(weight) <= contract(weight)
