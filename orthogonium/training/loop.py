"""The training loop: the same seed gives the same weights, interrupted or not."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from orthogonium.training.checkpoint import CheckpointError, load_tensors, save_tensors
from orthogonium.training.config import TrainConfig
from orthogonium.training.data import Split
from orthogonium.training.losses import MarginCrossEntropy

_WARMUP = 0.1  # share of the steps over which the learning rate rises


class TrainingDiverged(Exception):
    """The loss became NaN or infinite; the message says when and what to change."""


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch did: mean loss, and accuracies in [0, 1] on both parts of the data."""

    epoch: int
    loss: float
    train_accuracy: float
    eval_accuracy: float


@dataclass
class Snapshot:
    """All that a run needs to go on, bit by bit, after ``epoch`` finished epochs; tensors on the CPU."""

    epoch: int
    model: dict[str, Tensor]
    state: dict[str, Tensor]  # of the optimiser and the random generator
    history: list[EpochRecord] = field(default_factory=list)


class Trainer:
    """Train ``model`` on ``split`` as ``config`` says, with Adam and a cosine learning rate.

    After every epoch :attr:`snapshot` holds a consistent copy of the run; an interrupt in the middle of a
    step cannot damage it.

    Args:
        model: gets trained in place; moved to ``device`` beforehand by the caller.
        config: batch size, learning rate, loss and seed.
        split: on the same device.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, split: Split) -> None:
        self.model, self.config, self.split = model, config, split
        self.loss = MarginCrossEntropy(config.temperature, config.offset)
        self.parameters = dict(model.named_parameters())
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=config.learning_rate, betas=(0.9, 0.99))
        self.generator = torch.Generator().manual_seed(config.seed)
        self.batch_size = min(config.batch_size, len(split.x_train))
        self.history: list[EpochRecord] = []
        self.snapshot = self._take_snapshot()

    @property
    def finished(self) -> bool:
        return len(self.history) >= self.config.epochs

    def run(self, after_epoch: Callable[[EpochRecord], None] | None = None) -> None:
        """Train from where the run stands to the last epoch.

        Raises:
            TrainingDiverged: the loss is not finite. :attr:`snapshot` still holds the last good epoch.
        """
        while not self.finished:
            record = self._epoch(len(self.history))
            self.history.append(record)
            self.snapshot = self._take_snapshot()
            if after_epoch is not None:
                after_epoch(record)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from ``snapshot``, which must fit the model."""
        self.model.load_state_dict(snapshot.model)
        self.optimizer.state.clear()
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {
                "step": snapshot.state[f"{name}/step"].clone(),
                "exp_avg": snapshot.state[f"{name}/exp_avg"].to(parameter, copy=True),
                "exp_avg_sq": snapshot.state[f"{name}/exp_avg_sq"].to(parameter, copy=True),
            }
        self.generator.set_state(snapshot.state["generator"])
        self.history = list(snapshot.history)
        self.snapshot = snapshot

    def _epoch(self, epoch: int) -> EpochRecord:
        self.model.train()
        x, y = self.split.x_train, self.split.y_train
        order = torch.randperm(len(x), generator=self.generator).to(x.device)
        batches = order[: len(x) // self.batch_size * self.batch_size].split(self.batch_size)
        total_loss, right = 0.0, 0
        for number, batch in enumerate(batches):
            rate = self._learning_rate(epoch * len(batches) + number, self.config.epochs * len(batches))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            noise = self.config.noise * torch.randn(x[batch].shape, generator=self.generator)
            logits = self.model(x[batch] + noise.to(x.device))
            loss = self.loss(logits, y[batch])
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingDiverged(
                    f"the loss became {value} in epoch {epoch + 1}, step {number + 1}. "
                    f"Try a learning rate below {self.config.learning_rate:g}"
                )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total_loss += value
            right += int((logits.argmax(1) == y[batch]).sum())
        self.model.eval()
        with torch.no_grad():
            eval_right = int((self.model(self.split.x_eval).argmax(1) == self.split.y_eval).sum())
        return EpochRecord(
            epoch + 1,
            total_loss / len(batches),
            right / (len(batches) * self.batch_size),
            eval_right / len(self.split.y_eval),
        )

    def _learning_rate(self, step: int, steps: int) -> float:
        """Linear rise, then half a cosine down to zero."""
        rise = min(1.0, (step + 1) / (_WARMUP * steps))
        return self.config.learning_rate * rise * (1 + math.cos(math.pi * step / steps)) / 2

    def _take_snapshot(self) -> Snapshot:
        state: dict[str, Tensor] = {"generator": self.generator.get_state()}
        for name, parameter in self.parameters.items():
            zeros = torch.zeros_like(parameter)  # what Adam starts from
            fresh = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros}
            for key, value in (self.optimizer.state.get(parameter) or fresh).items():
                state[f"{name}/{key}"] = value.detach().cpu().clone()
        model = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        return Snapshot(len(self.history), model, state, list(self.history))


def save_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Write what :func:`load_snapshot` needs to go on, next to the model's own checkpoint."""
    tensors = {f"model/{name}": tensor for name, tensor in snapshot.model.items()}
    tensors |= {f"state/{name}": tensor for name, tensor in snapshot.state.items()}
    history = json.dumps([vars(record) for record in snapshot.history])
    save_tensors(path, tensors, {"epoch": str(snapshot.epoch), "history": history})


def load_snapshot(path: Path, trainer: Trainer) -> Snapshot:
    """Read a snapshot of the same run that ``trainer`` is set up for.

    Raises:
        CheckpointError: the file is damaged or belongs to another run.
    """
    like = {f"model/{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    like["state/generator"] = trainer.generator.get_state()
    for name, parameter in trainer.parameters.items():
        like[f"state/{name}/step"] = torch.tensor(0.0)
        like[f"state/{name}/exp_avg"] = like[f"state/{name}/exp_avg_sq"] = parameter
    tensors, extra = load_tensors(path, like)
    try:
        history = [EpochRecord(**record) for record in json.loads(extra["history"])]
        epoch = int(extra["epoch"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has no readable history: {error}") from error
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "state": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    return Snapshot(epoch, parts["model"], parts["state"], history)
