"""Data-parallel training on two processes gives the weights of training on one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from orthogonium.layers import OrthoLinear
from orthogonium.reparametrizers import PRESETS
from tests.helpers import gaussian

INPUTS, TARGETS = gaussian((8, 4)), gaussian((8, 3), seed=1)


def model_of(preset):
    torch.manual_seed(0)
    parts = OrthoLinear(4, 4, ortho_params=PRESETS[preset]), nn.Tanh(), OrthoLinear(4, 3, ortho_params=PRESETS[preset])
    return nn.Sequential(*parts).double()


def train(model, inputs, targets):
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()


def work(rank, folder, presets):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for preset in presets:
        model = model_of(preset)
        if rank == 1:  # DDP sends the first rank's tensors to all
            for layer in (model[0], model[2]):
                layer.reset_parameters()
        train(DistributedDataParallel(model), INPUTS[rank::2], TARGETS[rank::2])
        torch.save(model.state_dict(), f"{folder}/{preset}_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_ranks_are_one(tmp_path):
    presets = ["default", "cholesky", "exp"]
    mp.spawn(work, (str(tmp_path), presets), nprocs=2)
    for preset in presets:
        alone = model_of(preset)
        train(alone, INPUTS, TARGETS)
        for rank in range(2):
            state = torch.load(tmp_path / f"{preset}_{rank}.pt", weights_only=True)
            for name, value in alone.state_dict().items():
                torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-13)
