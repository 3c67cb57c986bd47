from orthogonium.training.checkpoint import CheckpointError, load_model, save_model
from orthogonium.training.config import MODELS, RECIPES, TrainConfig
from orthogonium.training.data import Split, load_digits
from orthogonium.training.evaluation import Evaluation, evaluate
from orthogonium.training.loop import EpochRecord, Trainer, TrainingDiverged
from orthogonium.training.losses import MarginCrossEntropy, MulticlassHinge
from orthogonium.training.run_folder import RunFolder, RunFolderError
from orthogonium.training.saved_model import SavedModel, save_run

__all__ = [
    "MODELS",
    "RECIPES",
    "CheckpointError",
    "EpochRecord",
    "Evaluation",
    "MarginCrossEntropy",
    "MulticlassHinge",
    "RunFolder",
    "RunFolderError",
    "SavedModel",
    "Split",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
    "evaluate",
    "load_digits",
    "load_model",
    "save_model",
    "save_run",
]
