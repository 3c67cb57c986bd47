"""cuDNN takes weights from one block of memory, and must not take the free tensors'."""

import copy

import pytest
import torch
from torch import nn

import orthogonium as og

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.filterwarnings("ignore:RNN module weights")
@pytest.mark.parametrize("made", [nn.RNN, nn.LSTM, nn.GRU])
def test_cudnn_computes_with_the_constrained_weights(made):
    torch.manual_seed(0)
    module = made(5, 6, num_layers=2, bidirectional=True)
    og.convert(module)
    x = torch.randn(7, 3, 5)
    expected = module(x)[0]
    expected.square().sum().backward()
    wanted = [p.grad for p in module.parameters()]
    moved = copy.deepcopy(module).cuda()
    moved.zero_grad()
    moved.flatten_parameters()
    found = moved(x.cuda())[0]
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-5)
    found.square().sum().backward()
    for parameter, gradient in zip(moved.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), gradient, rtol=0, atol=1e-4)
