import pytest
import torch

from orthogonium.training import load_digits


def rows(x):
    return {tuple(row) for row in x.tolist()}


def test_test_split_is_a_stratified_quarter_of_all_images():
    split = load_digits()
    assert (len(split.x_train), len(split.x_eval)) == (1347, 450)
    assert split.x_train.dtype == torch.float32
    assert split.y_train.dtype == torch.int64
    assert split.x_train.min() >= 0
    assert split.x_train.max() == 1
    assert not rows(split.x_train) & rows(split.x_eval)
    counts = torch.bincount(split.y_eval)
    assert counts.min() >= 43
    assert counts.max() <= 46


def test_validation_is_carved_out_of_the_training_part_and_never_sees_the_test_part():
    test, validation = load_digits(), load_digits("validation")
    assert rows(validation.x_train) | rows(validation.x_eval) == rows(test.x_train)
    assert not rows(validation.x_train) & rows(validation.x_eval)


def test_the_split_depends_on_its_seed_only():
    assert torch.equal(load_digits().x_eval, load_digits().x_eval)
    assert not torch.equal(load_digits().x_eval, load_digits(split_seed=1).x_eval)


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="'test' or 'validation', got 'train'"):
        load_digits("train")
