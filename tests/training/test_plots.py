import torch
from matplotlib.image import imread

from orthogonium.training import EpochRecord
from orthogonium.training.layer_spectra import LayerSpectrum
from orthogonium.training.plots import plot_certified_accuracy, plot_singular_values, plot_training

BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def has_colour(path, colour):
    """Whether some pixels of the picture have nearly this colour (dots are translucent)."""
    pixels = torch.tensor(imread(path))[..., :3].mul(255).round().int()
    return int((pixels - torch.tensor(colour)).abs().le(64).all(-1).sum()) > 20


def test_certified_and_attacked_curves_are_drawn(tmp_path):
    radii = torch.linspace(0, 2, 41)
    certified = (1 - radii).clamp_min(0)
    path = tmp_path / "a.png"
    plot_certified_accuracy(path, radii, certified, {0.0: 1.0, 1.0: 0.2}, (0.1, 0.5, 1.0))
    assert has_colour(path, BLUE)
    assert has_colour(path, ORANGE)
    plot_certified_accuracy(path, radii, torch.zeros(41), {}, (0.1,))
    assert not has_colour(path, ORANGE)


def test_training_curves_are_drawn_even_for_one_perfect_epoch(tmp_path):
    plot_training(tmp_path / "a.png", [EpochRecord(1, 0.5, 1.0, 1.0)], "test")
    plot_training(tmp_path / "b.png", [EpochRecord(i + 1, 1 / (i + 1), 0.5, 0.4) for i in range(9)], "test")
    assert has_colour(tmp_path / "b.png", BLUE)
    assert has_colour(tmp_path / "b.png", ORANGE)


def test_singular_values_are_drawn_exact_or_not(tmp_path):
    exact = LayerSpectrum("0", (4, 4), torch.ones(4, dtype=torch.float64), 0.0)
    wrong = LayerSpectrum("2", (1, 4), torch.tensor([0.1], dtype=torch.float64), 0.99)
    plot_singular_values(tmp_path / "a.png", [exact])
    plot_singular_values(tmp_path / "b.png", [exact, wrong])
    assert has_colour(tmp_path / "a.png", BLUE)
    assert has_colour(tmp_path / "b.png", BLUE)
