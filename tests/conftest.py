"""Settings of the whole test run."""

import torch

torch.set_num_threads(1)  # workers run side by side; threads of each would fight for the same cores
