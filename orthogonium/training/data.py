"""The handwritten digits that come with scikit-learn, split the same way every time."""

from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = 10
FEATURES = 64


@dataclass(frozen=True)
class Split:
    """Inputs ``(N, 64)`` in [0, 1] float32 and labels ``(N,)`` int64, to train on and to evaluate on."""

    x_train: Tensor
    y_train: Tensor
    x_eval: Tensor
    y_eval: Tensor

    def to(self, device: torch.device | str) -> "Split":
        return Split(*(t.to(device) for t in (self.x_train, self.y_train, self.x_eval, self.y_eval)))


def load_digits(evaluate_on: str = "test", split_seed: int = 0) -> Split:
    """1,797 images of 8 × 8 pixels, divided by 16 so that they lie in [0, 1]; three quarters to train on.

    Args:
        evaluate_on: ``"test"`` for the quarter held out; ``"validation"`` to hold out a quarter of the
            training part instead and never touch the test part, for tuning.
        split_seed: of the stratified split. Results are comparable under the same one only.

    Raises:
        ValueError: ``evaluate_on`` is neither.
        ModuleNotFoundError: scikit-learn is missing.

    Source:
        Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI Machine Learning Repository,
        1998, as bundled with scikit-learn.
    """
    if evaluate_on not in ("test", "validation"):
        raise ValueError(f"evaluate_on must be 'test' or 'validation', got {evaluate_on!r}")
    from sklearn.datasets import load_digits as bundled
    from sklearn.model_selection import train_test_split

    images, labels = bundled(return_X_y=True)
    x_train, x_eval, y_train, y_eval = train_test_split(
        images / 16, labels, test_size=0.25, stratify=labels, random_state=split_seed
    )
    if evaluate_on == "validation":
        x_train, x_eval, y_train, y_eval = train_test_split(
            x_train, y_train, test_size=0.25, stratify=y_train, random_state=split_seed
        )
    return Split(
        torch.tensor(x_train, dtype=torch.float32),
        torch.tensor(y_train, dtype=torch.int64),
        torch.tensor(x_eval, dtype=torch.float32),
        torch.tensor(y_eval, dtype=torch.int64),
    )
