"""What every optimiser on the manifold promises, over one table of them."""

import copy
import io

import pytest
import torch
from torch import nn

import orthogonium as og
from orthogonium.linalg import NonFiniteError, orthogonality_defect, tangent_projection
from orthogonium.optim import LowRankOrthogonal, RiemannianAdam, RiemannianSGD, StiefelMuon
from tests.helpers import contract, gaussian, orthogonal_matrix

OPTIMIZERS = {
    "sgd": lambda params, **k: RiemannianSGD(params, **{"lr": 0.1, **k}),
    "sgd_nesterov_cayley": lambda params, **k: RiemannianSGD(
        params, **{"lr": 0.05, "momentum": 0.9, "nesterov": True, "retraction": "cayley", **k}
    ),
    "sgd_geodesic": lambda params, **k: RiemannianSGD(
        params, **{"lr": 0.05, "momentum": 0.9, "retraction": "geodesic", **k}
    ),
    "adam": lambda params, **k: RiemannianAdam(params, **{"lr": 0.03, **k}),
    "muon": lambda params, **k: StiefelMuon(params, **{"lr": 0.03, **k}),
    "low_rank": lambda params, **k: LowRankOrthogonal(params, **{"lr": 0.03, "rank": 3, **k}),
    "low_rank_columns": lambda params, **k: LowRankOrthogonal(
        params, **{"lr": 0.03, "rank": 3, "sampling": "columns", "momentum": 0.5, **k}
    ),
    "low_rank_geodesic": lambda params, **k: LowRankOrthogonal(
        params, **{"lr": 0.05, "rank": 3, "update": "geodesic", "adaptive": False, **k}
    ),
}
each = pytest.mark.parametrize("name", OPTIMIZERS)


def target_of(point):
    """An orthogonal matrix that can be reached from ``point`` by turning it: of the same determinant."""
    step = tangent_projection(point, gaussian(tuple(point.shape), dtype=point.dtype, seed=7))
    return og.linalg.geodesic_retraction(point, 0.7 * step)


def parameter(shape, dtype=torch.float32, seed=0):
    return nn.Parameter(orthogonal_matrix(shape, dtype=dtype, seed=seed))


def loss_of(points, targets):
    return sum((p - t).square().sum() for p, t in zip(points, targets, strict=True))


def run(optimizer, points, targets, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(points, targets)
        loss.backward()
        optimizer.step()
    return loss.item()


@each
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (2, 4, 4)], ids=str)
def test_finds_the_target_and_stays_orthogonal(name, shape):
    torch.manual_seed(0)
    point = parameter(shape)
    targets = [target_of(point.detach())]
    first = loss_of([point], targets).item()
    last = run(OPTIMIZERS[name]([point]), [point], targets, 150)
    assert last <= 0.05 * first
    assert (orthogonality_defect(point.detach()) <= contract(point)).all()


@each
def test_many_large_steps_keep_the_contract(name):
    """Random gradients, long steps: what would drift does."""
    torch.manual_seed(0)
    points = [parameter((8, 8)), parameter((10, 5), seed=1)]
    optimizer = OPTIMIZERS[name](points, lr=0.5)
    for _ in range(250):
        for point in points:
            point.grad = torch.randn_like(point)
        optimizer.step()
        for point in points:
            assert orthogonality_defect(point.detach()) <= contract(point)


@each
def test_a_start_or_a_reload_that_is_not_orthogonal_is_projected(name):
    point = nn.Parameter(gaussian((5, 5), dtype=torch.float32))
    optimizer = OPTIMIZERS[name]([point], lr=0.0, check_every=2)
    for _ in range(3):  # checked at the first and third step
        point.grad = torch.zeros_like(point)
        optimizer.step()
        assert orthogonality_defect(point.detach()) <= contract(point)
        if optimizer.state[point]["step"] == 2:
            with torch.no_grad():
                point.mul_(1.1)


def test_tolerance_decides_about_projection():
    for tolerance, expected in ((1.0, 1.1), (1e-3, 1.0)):
        point = nn.Parameter(1.1 * torch.eye(4))
        point.grad = torch.zeros(4, 4)
        LowRankOrthogonal([point], lr=0.0, rank=1, tolerance=tolerance).step()  # touches a plane alone
        assert torch.linalg.svdvals(point.detach())[0].item() == pytest.approx(expected, abs=1e-6)


@each
def test_batched_steps_are_the_separate_ones(name):
    """Four matrices of one shape, one of another, a stacked pair."""

    def trained(foreach):
        torch.manual_seed(0)
        points = [parameter((4, 4), torch.float64, seed=s) for s in range(4)]
        points += [parameter((6, 3), torch.float64, seed=9), parameter((2, 4, 4), torch.float64, seed=10)]
        targets = [target_of(p.detach()) for p in points]
        optimizer = OPTIMIZERS[name](points, foreach=foreach, **({"rank": 4} if "low_rank" in name else {}))
        for group in optimizer.param_groups:
            group["sampling"] = "columns"  # of full rank: no random subspace matters
        run(optimizer, points, targets, 5)
        return torch.cat([p.detach().flatten() for p in points])

    together, alone = trained(True), trained(False)
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)
    start = torch.cat([parameter((4, 4), torch.float64, seed=s).detach().flatten() for s in range(4)])
    assert (together[:64] - start).abs().max() > 1e-2


@each
def test_state_dict_round_trip_continues_bit_for_bit(name):
    torch.manual_seed(0)
    points = [parameter((5, 5)), nn.Parameter(torch.ones(3))]

    def make(points):
        return OPTIMIZERS[name]([{"params": points[:1]}, {"params": points[1:], "manifold": False}])

    targets = [target_of(points[0].detach()), torch.zeros(3)]
    optimizer = make(points)
    run(optimizer, points, targets, 3)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in points]
    twin = make(twins)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    copied, copied_points = copy.deepcopy((optimizer, points))
    for some, theirs in ((optimizer, points), (twin, twins), (copied, copied_points)):
        torch.manual_seed(1)
        run(some, theirs, targets, 3)
    for theirs in (twins, copied_points):
        assert all(torch.equal(p, q) for p, q in zip(points, theirs, strict=True))


@each
def test_plain_groups_leave_the_manifold_alone(name):
    """Biases and ordinary matrices are optimised without a constraint, and weight decay acts there only."""
    torch.manual_seed(0)
    square, bias, matrix = parameter((4, 4)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 3))
    groups = [{"params": [square]}, {"params": [bias, matrix], "manifold": False}]
    optimizer = OPTIMIZERS[name](groups, weight_decay=0.5)
    before = [p.detach().clone() for p in (square, bias, matrix)]
    for p in (square, bias, matrix):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    lr = optimizer.param_groups[0]["lr"]
    assert torch.allclose(square, before[0], atol=1e-6)
    assert torch.allclose(bias, before[1] * (1 - 0.5 * lr))
    assert torch.allclose(matrix, before[2] * (1 - 0.5 * lr))
    targets = [target_of(before[0]), torch.full((3,), 0.5), torch.full((2, 3), 0.5)]
    optimizer = OPTIMIZERS[name](groups)
    first = loss_of([square, bias, matrix], targets)
    assert run(optimizer, [square, bias, matrix], targets, 100) <= 0.1 * first


def test_plain_groups_are_torchs_own_optimizers():
    for ours, theirs in (
        (lambda p: RiemannianSGD(p, lr=0.1, momentum=0.9, manifold=False), lambda p: torch.optim.SGD(p, 0.1, 0.9)),
        (
            lambda p: RiemannianAdam(p, lr=0.1, weight_decay=0.1, manifold=False),
            lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
        ),
    ):
        start = gaussian((3, 4), seed=1)
        points = [nn.Parameter(start.clone()), nn.Parameter(start.clone())]
        for point, optimizer in zip(points, (ours(points[:1]), theirs(points[1:])), strict=True):
            run(optimizer, [point], [torch.zeros(3, 4)], 7)
        assert torch.allclose(points[0], points[1], rtol=1e-12)


@each
def test_blocks_are_matrices_of_their_own(name):
    """The gates of a recurrent weight: as separate parameters, and not as one tall matrix."""
    torch.manual_seed(0)
    gates = [parameter((3, 3), torch.float64, seed=s) for s in range(4)]
    stacked = nn.Parameter(torch.cat([g.detach() for g in gates]))
    targets = [target_of(g.detach()) for g in gates]
    options = {"rank": 3, "sampling": "columns"} if "low_rank" in name else {}
    for points, goals, blocks in ((gates, targets, 1), ([stacked], [torch.cat(targets)], 4)):
        run(OPTIMIZERS[name](points, blocks=blocks, **options), points, goals, 5)
    assert torch.allclose(stacked, torch.cat([g.detach() for g in gates]), rtol=0, atol=1e-12)


@each
def test_closures_and_maximize(name):
    torch.manual_seed(0)
    point, weights = parameter((4, 4)), gaussian((4, 4), dtype=torch.float32, seed=3)
    optimizer = OPTIMIZERS[name]([point], maximize=True)
    values = []

    def closure():
        optimizer.zero_grad()
        value = (point * weights).sum()
        value.backward()
        values.append(value.item())
        return value

    returned = [optimizer.step(closure).item() for _ in range(150)]
    assert returned == values
    assert values[-1] >= 0.8 * torch.linalg.svdvals(weights)[:-1].sum()  # whatever the determinant allows


@each
def test_a_bad_gradient_is_named_and_changes_nothing(name):
    good, bad = parameter((4, 4)), parameter((5, 3), seed=1)
    optimizer = OPTIMIZERS[name]([good, bad])
    good.grad, bad.grad = torch.ones(4, 4), torch.full((5, 3), torch.inf)
    before = [good.detach().clone(), bad.detach().clone()]
    with pytest.raises(NonFiniteError, match=r"shape \(5, 3\)"):
        optimizer.step()
    assert torch.equal(good, before[0])
    assert torch.equal(bad, before[1])
    bad.grad = None  # and one without a gradient is skipped
    optimizer.step()
    assert not torch.equal(good, before[0])
    assert torch.equal(bad, before[1])


@each
def test_refusals(name):
    make, point = OPTIMIZERS[name], parameter((4, 4))
    with pytest.raises(ValueError, match=r"shape \(3,\) is no matrix.*manifold"):
        make([nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match="bfloat16"):
        make([nn.Parameter(torch.eye(3, dtype=torch.bfloat16))])
    for options in ({"lr": -1.0}, {"check_every": 0}, {"blocks": 3}, {"tolerance": 0.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            make([point], **options)
    optimizer = make([point])
    with pytest.raises(ValueError, match="no matrix"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "manifold": False})


def test_refusals_of_some():
    point = parameter((4, 4))
    with pytest.raises(ValueError, match="retraction must be one of polar, cayley, geodesic"):
        RiemannianSGD([point], retraction="qr")
    bad: list[dict] = [{"rank": 0}, {"update": "qr"}, {"sampling": "rows"}, {"betas": (0.9, 1.0)}, {"momentum": 1.0}]
    for options in [*bad, {"betas": (0.9,)}]:
        with pytest.raises(ValueError, match=next(iter(options))):
            LowRankOrthogonal([point], **options)


def test_a_muon_step_turns_every_direction_of_a_square_matrix_alike():
    point = parameter((6, 6), torch.float64)
    point.grad = gaussian((6, 6), seed=3)
    before = point.detach().clone()
    StiefelMuon([point], lr=0.1).step()
    turned = torch.linalg.svdvals(point.detach() @ before.T - torch.eye(6))
    assert ((turned - 0.1).abs() <= 2e-3).all()  # 1 % of soft_polar, and the curvature


def test_one_optimizer_for_a_recurrent_classifier():
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": nn.RNN(3, 8, batch_first=True), "head": nn.Linear(8, 2)})
    optimizer = LowRankOrthogonal(og.parameter_groups(model, manifold="rnn.weight_hh_*"), lr=1e-2, rank=2)
    x, y = torch.randn(32, 10, 3), torch.randint(0, 2, (32,))
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model["head"](model["rnn"](x)[0][:, -1]), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    weight = model["rnn"].weight_hh_l0.detach()
    assert orthogonality_defect(weight) <= contract(weight)
    assert orthogonality_defect(model["rnn"].weight_ih_l0.detach()) > 0.01


def test_options_that_need_more_state_may_change_during_training():
    """As when a schedule cycles the momentum, or raises the rank."""
    for make, changes in (
        (RiemannianSGD, {"momentum": 0.9}),
        (LowRankOrthogonal, {"momentum": 0.9, "rank": 3, "adaptive": False}),
        (LowRankOrthogonal, {"rank": 1, "sampling": "columns"}),
    ):
        torch.manual_seed(0)
        point = nn.Parameter(torch.eye(6))
        optimizer = make([point], lr=0.01)
        for step in range(6):
            if step == 3:
                optimizer.param_groups[0].update(changes)
            point.grad = torch.randn(6, 6)
            before = point.detach().clone()
            optimizer.step()
            assert not torch.equal(point, before)
            assert orthogonality_defect(point.detach()) <= contract(point)


@pytest.mark.parametrize("make", [RiemannianSGD, RiemannianAdam, StiefelMuon, LowRankOrthogonal])
def test_empty_parameters_and_unknown_options(make):
    empty, point = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.eye(4))
    optimizer = make([empty, point], lr=0.1)
    empty.grad, point.grad = torch.empty(0, 4), torch.randn(4, 4)
    optimizer.step()
    assert orthogonality_defect(point.detach()) <= contract(point)
    with pytest.raises(TypeError, match="block"):
        make([point], block=2)
    for manifold in (True, False):  # the square of a complex number is no size
        with pytest.raises(TypeError, match=r"is torch\.complex64, and these steps are for real numbers"):
            make([{"params": [nn.Parameter(torch.eye(4, dtype=torch.complex64))], "manifold": manifold}])
