"""Rebuild the network of a run from its folder."""

from pathlib import Path

from torch import nn

from orthogonium.training import RunFolder, SavedModel, TrainConfig, load_model
from orthogonium.training.saved_model import read_saved


def load_run(path: Path) -> tuple[nn.Module, TrainConfig | SavedModel]:
    """The network of the run at ``path``, in evaluation mode on the CPU, and its config.

    Raises:
        RunFolderError: ``path`` is not a run folder, or its config is damaged.
        CheckpointError: the checkpoint is damaged or does not fit the config.
    """
    folder = RunFolder.open(path)
    config = read_saved(folder) or folder.read_config()
    model = config.build_model().eval()
    load_model(folder.model, model)
    return model, config
