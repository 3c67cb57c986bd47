import json

import pytest
import torch

from orthogonium.training import TrainConfig


def test_round_trip_through_json():
    config = TrainConfig(width=16, learning_rate=0.5, seed=7)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_model_depends_on_the_seed_alone_and_leaves_the_global_state():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = TrainConfig(width=8, depth=2, seed=3).build_model()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second, other = (TrainConfig(width=8, depth=2, seed=s).build_model() for s in (3, 4))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert any(
        not torch.equal(a, b) for a, b in zip(first.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"preset": "magic"}, ValueError, r"unknown preset 'magic'\. Known: default,"),
        ({"model": "rnn"}, ValueError, r"unknown model 'rnn'\. Known: mlp, cnn"),
        ({"epochs": -3}, ValueError, "epochs must lie in 1 … 1000000, got -3"),
        ({"width": 7}, ValueError, r"width must be even, got 7\. Use 8"),
        ({"learning_rate": 0.0}, ValueError, r"learning_rate must be above 0, got 0\.0"),
        ({"model": "cnn", "depth": 2}, ValueError, "depth must be at least 4"),
        ({"noise": float("nan")}, ValueError, "noise must be at least 0, got nan"),
        ({"seed": -1}, ValueError, "seed must lie in 0"),
        ({"epochs": 2.5}, TypeError, r"epochs must be int, got 2\.5"),
        ({"epochs": True}, TypeError, "epochs must be int, got True"),
        ({"evaluate_on": "train"}, ValueError, "unknown evaluate_on 'train'"),
    ],
)
def test_bad_values_are_named(values, error, message):
    with pytest.raises(error, match=message):
        TrainConfig(**values)


def test_foreign_configs_are_refused():
    good = TrainConfig().to_dict()
    with pytest.raises(ValueError, match="format_version 99"):
        TrainConfig.from_dict({**good, "format_version": 99})
    with pytest.raises(ValueError, match=r"unknown \['colour'\]"):
        TrainConfig.from_dict({**good, "colour": 1})
    with pytest.raises(ValueError, match=r"misses \['width'\]"):
        TrainConfig.from_dict({k: v for k, v in good.items() if k != "width"})
    with pytest.raises(ValueError, match="JSON object"):
        TrainConfig.from_dict([1, 2])
