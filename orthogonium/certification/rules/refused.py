"""Modules whose ℓ2 Lipschitz constant does not exist or is not known, each with its reason and what to do."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from orthogonium.certification.rules.registry import Refused, lipschitz_rule

_STATISTICS = (
    "divides by statistics of its input, so that it has no useful Lipschitz constant: about 1/√eps where an input is "
    "nearly constant. Use BatchNorm, whose statistics are fixed in evaluation, or a learned scale"
)
_RANDOM = "is random or depends on positions that another layer chose. Use MaxPool or AvgPool"
_JUMPS = "jumps, so that it has no Lipschitz constant. Use a continuous activation such as Softshrink or ReLU"
_GROWS = "grows faster than any multiple of its input or has an unbounded slope, so that no constant exists"
_SEQUENCE = (
    "multiplies states by gates that depend on the input, so that no constant holds for all inputs. Certify the layers "
    "after it, from features that you take as the input"
)
_REASONS: dict[str, tuple[Any, ...]] = {
    _STATISTICS: (
        *(nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm, nn.CrossMapLRN2d),
        *(F.layer_norm, F.group_norm, F.local_response_norm, F.rms_norm, F.instance_norm),
        *(torch.layer_norm, torch.group_norm, torch.rms_norm),
    ),
    _RANDOM: (
        *(nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d),
        *(F.max_unpool1d, F.max_unpool2d, F.max_unpool3d, F.fractional_max_pool2d, F.gumbel_softmax),
    ),
    _JUMPS: (
        *(nn.Hardshrink, F.hardshrink, torch.sign, torch.round, torch.floor, torch.ceil, torch.trunc),
        *("sign", "round", "floor", "ceil", "trunc"),
    ),
    _GROWS: (
        *(torch.exp, torch.log, torch.sqrt, torch.rsqrt, torch.square, torch.pow, torch.reciprocal, torch.tan),
        *("exp", "log", "sqrt", "rsqrt", "square", "pow", "reciprocal", "tan", "__pow__"),
        *(torch.prod, torch.cumprod, "prod", "cumprod"),
        *(nn.GLU, F.glu, nn.CosineSimilarity, F.cosine_similarity, F.normalize),
    ),
    _SEQUENCE: (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell),
    "compares its inputs by a product that depends on them, so that its slope grows with their size: dot-product "
    "attention has no Lipschitz constant on all of the space. Certify the layers after it": (
        *(nn.MultiheadAttention, F.multi_head_attention_forward, F.scaled_dot_product_attention),
        *(nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder),
        *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
    ),
    "maps integers, between which there is no ℓ2 distance. Take embedded vectors as the input and certify the rest": (
        *(nn.Embedding, nn.EmbeddingBag, F.embedding, F.embedding_bag),
    ),
    "multiplies two inputs, whose product is not Lipschitz. Use a linear layer on their concatenation": (
        *(nn.Bilinear, F.bilinear),
    ),
    "multiplies its operands: two that depend on the input are not Lipschitz. Write a product with a constant as "
    "x @ matrix, or with torch.nn.functional.linear": (
        *(torch.bmm, "bmm", torch.baddbmm, torch.addmm, torch.einsum, torch.tensordot),
    ),
    "only distributes the model that it holds. Pass model.module": (
        *(nn.DataParallel, nn.parallel.DistributedDataParallel),
    ),
}  # fmt: skip


def _refuse(reason: str) -> None:
    @lipschitz_rule(*_REASONS[reason])
    def _refused(*args: Any, **kwargs: Any) -> float:
        raise Refused(reason)


for _reason in _REASONS:
    _refuse(_reason)
