import torch

from orthogonium.certification.operators import row_distances


def test_row_distances():
    matrix = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    expected = torch.tensor([[0.0, 5.0, 0.0], [5.0, 0.0, 5.0], [0.0, 5.0, 0.0]], dtype=torch.float64)
    distances = row_distances(matrix)
    assert (distances >= expected).all()
    torch.testing.assert_close(distances, expected, rtol=1e-13, atol=0)
    tiny = torch.tensor([[0.0], [1e-200]], dtype=torch.float64)  # its square underflows
    assert row_distances(tiny)[0, 1] >= 1e-200
