import pytest
import torch

from orthogonium.training import CheckpointError, Split, TrainConfig, Trainer, TrainingDiverged
from orthogonium.training.loop import load_snapshot, save_snapshot

CONFIG = TrainConfig(width=8, depth=2, epochs=4, batch_size=16, learning_rate=0.02)


@pytest.fixture(scope="module")
def split():
    """Ten classes, each a noisy corner of a 64-dimensional cube."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 10
    corners = torch.rand(10, 64, generator=generator).round()
    x = corners[y] + 0.1 * torch.randn(120, 64, generator=generator)
    return Split(x[:80], y[:80], x[80:], y[80:])


def trainer(split, config=CONFIG):
    return Trainer(config.build_model(), config, split)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_learns(split):
    run = trainer(split, TrainConfig(width=16, depth=2, epochs=30, batch_size=16, learning_rate=0.02))
    run.run()
    assert run.history[-1].eval_accuracy >= 0.95
    assert run.history[-1].loss < run.history[0].loss / 2
    assert [record.epoch for record in run.history] == list(range(1, 31))


def test_the_same_seed_gives_the_same_run_whatever_the_global_state(split):
    first = trainer(split)
    first.run()
    torch.manual_seed(123)
    second = trainer(split)
    second.run()
    assert first.history == second.history
    assert same_weights(first.model, second.model)
    other = trainer(split, TrainConfig(**{**vars(CONFIG), "seed": 1}))
    other.run()
    assert other.history != first.history


@pytest.mark.parametrize("stop_in_step", [0, 7, 13])
def test_an_interrupt_in_any_step_loses_nothing_but_the_epoch(split, tmp_path, stop_in_step):
    whole = trainer(split)
    whole.run()
    broken = trainer(split)
    calls = 0

    def stop(module, inputs):
        nonlocal calls
        calls += module.training
        if calls == stop_in_step + 1:
            raise KeyboardInterrupt

    handle = broken.model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    handle.remove()
    assert broken.snapshot.epoch == stop_in_step // 5
    save_snapshot(tmp_path / "state.safetensors", broken.snapshot)
    resumed = trainer(split)
    resumed.restore(load_snapshot(tmp_path / "state.safetensors", resumed))
    resumed.run()
    assert resumed.history == whole.history
    assert same_weights(resumed.model, whole.model)


def test_a_snapshot_does_not_change_with_the_model(split):
    run = trainer(split)
    before = {name: tensor.clone() for name, tensor in run.snapshot.model.items()}
    kept = run.snapshot
    run.run()
    assert all(torch.equal(kept.model[name], tensor) for name, tensor in before.items())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_epoch(split):
    poisoned = Split(split.x_train.clone(), *(split.y_train, split.x_eval, split.y_eval))
    run = trainer(poisoned)

    def poison(record):
        if record.epoch == 2:
            poisoned.x_train.fill_(float("nan"))

    with pytest.raises(TrainingDiverged, match=r"became nan in epoch 3, step 1\. Try a learning rate below 0\.02"):
        run.run(poison)
    assert run.snapshot.epoch == 2
    assert all(torch.isfinite(tensor).all() for tensor in run.snapshot.model.values() if tensor.is_floating_point())


def test_a_snapshot_of_another_run_is_refused(split, tmp_path):
    run = trainer(split)
    run.run()
    save_snapshot(tmp_path / "a.safetensors", run.snapshot)
    other = trainer(split, TrainConfig(**{**vars(CONFIG), "width": 16}))
    with pytest.raises(CheckpointError, match="another model"):
        load_snapshot(tmp_path / "a.safetensors", other)
