import torch

from orthogonium.certification.matrix_norms import _row_distances_upper_bound


def test_row_distances():
    matrix = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    expected = torch.tensor([[0.0, 5.0, 0.0], [5.0, 0.0, 5.0], [0.0, 5.0, 0.0]], dtype=torch.float64)
    distances = _row_distances_upper_bound(matrix)
    assert (distances >= expected).all()
    torch.testing.assert_close(distances, expected, rtol=1e-13, atol=0)
    tiny = torch.tensor([[0.0], [1e-200]], dtype=torch.float64)  # its square underflows
    assert _row_distances_upper_bound(tiny)[0, 1] >= 1e-200
