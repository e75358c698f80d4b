"""train_binarizer: recurrent binarisers from embeddings alone."""

import copy
import hashlib
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import are_tensors, check_integer, check_number, check_positive
from .._safetensors import read_safetensors, write_safetensors
from ..nn.binarizer import MAX_SEED, RecurrentBinarizer, finite_rows
from .losses import contrastive_loss, neighbourhood_loss


@torch.inference_mode(False)
@torch.enable_grad()
def train_binarizer(
    embeddings: np.ndarray | Tensor,
    positives: np.ndarray | Tensor | None = None,
    *,
    bits: int = 2,
    dims: int | None = None,
    hidden_dim: int | None = None,
    compatible_with: RecurrentBinarizer | None = None,
    epochs: int = 20,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    temperature: float = 0.05,
    hard_negatives: int = 5,
    queue_size: int = 2048,
    momentum: float = 0.99,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> RecurrentBinarizer:
    """Train a `fastembed.nn.RecurrentBinarizer` on embeddings.

    With `positives` the codes learn which embeddings belong together: each embedding's code is drawn to that of its
    positive, and the other way round, away from its hardest negatives. Keys and negatives come from a momentum copy of
    the binariser, the negatives from the batch and from a queue of earlier batches' keys. Pairs that stand for the
    search wanted (queries and their documents) make codes that may search better than the embeddings themselves.
    Without `positives` the codes learn to keep the neighbourhoods of the embeddings as they are.

    A run with the same arguments, on the same machine with the same number of threads, gives the same bits.

    Args:
        embeddings: [N, D] real and finite, N >= 2; an array or a tensor. Only directions matter.
        positives: [N, D], row by row what belongs to each embedding, of the same kind; None where no pairs are known.
        bits, dims, hidden_dim: `bits`, `out_dims` and `hidden_dim` of the binariser.
        compatible_with: an older binariser for the same embeddings, of as many bits and at most as many dims and hidden
            units. The new one starts from it and also learns to find its codes: those that
            `new.encode(queries, dims=old.out_dims)` gives search the codes that the older one made.
        epochs: passes over the embeddings; 0 returns the untrained binariser.
        batch_size: embeddings in a step; a last, smaller batch is left out.
        learning_rate: of AdamW, falling to 0 along a cosine.
        temperature: cosines are divided by it in the loss.
        hard_negatives: negatives of largest cosine that count for each embedding; with `positives` only.
        queue_size: keys of earlier batches to keep.
        momentum: of the copy that makes the keys, in [0, 1).
        seed: of the initial weights and the order of the batches.
        checkpoint: a file, replaced whole after every epoch; where it is there already, training continues from it and
            ends as if it had never stopped.
        progress: show a bar.

    Returns:
        The binariser, on the CPU and in eval mode.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, too few embeddings, a NaN or infinity, a setting out of range, an older binariser
            that does not fit, a checkpoint that is damaged or of another run, or a learning rate at which training
            diverges.
        OSError: the checkpoint cannot be read or written.

    Source: Gan et al., "Binary Embedding-based Retrieval at Tencent", KDD 2023, arXiv 2302.08714, sections 3.2 and 3.3;
    the queue as in He et al., "Momentum Contrast", arXiv 1911.05722. The optimiser, and the loss without pairs, are
    ours.
    """
    settings = _Settings(
        epochs,
        batch_size,
        learning_rate,
        temperature,
        hard_negatives,
        queue_size,
        momentum,
        seed,
        bits,
        dims,
        hidden_dim,
    )
    if checkpoint is not None and not (folder := Path(checkpoint).absolute().parent).is_dir():
        raise FileNotFoundError(f"checkpoint must be a file in a folder that is there, but there is no {folder}")
    data = _Data.of(embeddings, positives)
    model = RecurrentBinarizer(data.left.shape[1], dims, bits, hidden_dim, seed=seed)
    if compatible_with is not None:
        if not isinstance(compatible_with, RecurrentBinarizer):
            raise TypeError(f"compatible_with must be a RecurrentBinarizer, got {type(compatible_with).__name__}")
        model.start_from(compatible_with)
    else:
        model.calibrate(torch.cat([data.left, data.right]))
    run = _Run(model, data, settings, compatible_with)
    if checkpoint is not None and Path(checkpoint).exists():
        run.restore(checkpoint)
    steps = run.steps_per_epoch * epochs
    with _progress_bar(steps, run.step, progress) as bar:
        while run.epoch < epochs:
            for batch in run.batches():
                bar.set_postfix(loss=f"{run.train_on(batch):.3f}", refresh=False)
                bar.update()
            run.epoch += 1
            run.check_converging()
            if checkpoint is not None:
                run.save(checkpoint)
    return model.eval()


@dataclass(frozen=True)
class _Settings:
    epochs: int
    batch_size: int
    learning_rate: float
    temperature: float
    hard_negatives: int
    queue_size: int
    momentum: float
    seed: int
    bits: int
    dims: int | None
    hidden_dim: int | None

    def __post_init__(self) -> None:
        if self.dims is not None:
            check_integer("dims", self.dims, 1)
        check_integer("epochs", self.epochs, 0)
        check_integer("batch_size", self.batch_size, 2)
        check_integer("hard_negatives", self.hard_negatives, 1)
        check_integer("queue_size", self.queue_size, 0)
        check_integer("seed", self.seed, 0, MAX_SEED)
        check_positive("learning_rate", self.learning_rate)
        check_positive("temperature", self.temperature)
        check_number("momentum", self.momentum)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        # A checkpoint holds them as JSON, which does not take NumPy's numbers.
        for name, value in asdict(self).items():
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())


@dataclass(frozen=True)
class _Data:
    """The two sides of the pairs, of unit length; `right` is `left` where no pairs are known."""

    left: Tensor
    right: Tensor
    paired: bool

    @classmethod
    def of(cls, embeddings: Any, positives: Any) -> "_Data":
        left = _unit_rows("embeddings", embeddings)
        if len(left) < 2:
            raise ValueError(f"embeddings must have at least 2 rows, got {len(left)}")
        if positives is None:
            return cls(left, left, paired=False)
        are_tensors(embeddings=embeddings, positives=positives)
        right = _unit_rows("positives", positives)
        if right.shape != left.shape:
            raise ValueError(f"positives must have the shape of the embeddings, {[*left.shape]}, got {[*right.shape]}")
        return cls(left, right, paired=True)


def _unit_rows(name: str, x: Any) -> Tensor:
    return F.normalize(finite_rows(name, x).cpu().float())


class _Run:
    """The state of a training run: all that a checkpoint has to hold."""

    def __init__(
        self, model: RecurrentBinarizer, data: _Data, settings: _Settings, older: RecurrentBinarizer | None
    ) -> None:
        self.model = model
        self.data = data
        self.settings = settings
        self.batch_size = min(settings.batch_size, len(data.left))
        self.steps_per_epoch = len(data.left) // self.batch_size
        model.train()
        self.key_model = copy.deepcopy(model).requires_grad_(False)
        # What the older binariser makes of either side; None without one.
        self.older_left = None if older is None else _older_codes(older, data.left)
        self.older_right = None if older is None else _older_codes(older, data.right)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
        self.generator = torch.Generator().manual_seed(settings.seed)
        # Keys of either side, newest first, and the rows they are of.
        self.left_queue = torch.empty(0, model.out_dims)
        self.right_queue = torch.empty(0, model.out_dims)
        self.queue_ids = torch.empty(0, dtype=torch.long)
        self.epoch = 0
        self.step = 0

    def batches(self) -> list[Tensor]:
        """Rows of the batches of one epoch."""
        order = torch.randperm(len(self.data.left), generator=self.generator)
        return list(order[: self.steps_per_epoch * self.batch_size].split(self.batch_size))

    def train_on(self, ids: Tensor) -> float:
        for group in self.optimizer.param_groups:
            done = self.step / (self.steps_per_epoch * self.settings.epochs)
            group["lr"] = self.settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        loss = self._loss_of(ids)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for key, parameter in zip(self.key_model.parameters(), self.model.parameters(), strict=True):
                key.lerp_(parameter, 1 - self.settings.momentum)
        self.step += 1
        return loss.item()

    def check_converging(self) -> None:
        """Raise ValueError where weights have grown beyond all bounds. The loss would not tell: NaN has a sign here."""
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            rate = self.settings.learning_rate
            raise ValueError(f"learning_rate must be smaller than {rate}: training diverged in epoch {self.epoch}")

    def _loss_of(self, ids: Tensor) -> Tensor:
        left, right = self.data.left[ids], self.data.right[ids]
        batch = torch.cat([left, right]) if self.data.paired else left
        codes = F.normalize(self.model(batch))
        with torch.no_grad():
            keys = F.normalize(self.key_model(batch))
        left_codes, right_codes = codes[: len(ids)], codes[-len(ids) :]
        left_keys, right_keys = keys[: len(ids)], keys[-len(ids) :]

        loss = self._side_loss(left_codes, ids, right_keys, self.right_queue, self.queue_ids)
        if self.data.paired:
            loss = loss + self._side_loss(right_codes, ids, left_keys, self.left_queue, self.queue_ids)
        if self.older_left is not None and self.older_right is not None:
            # The older codes do not change: those of the queue's rows are at hand without a queue.
            dims = self.older_right.shape[1]
            older = self.older_right[self.queue_ids]
            loss = loss + self._side_loss(
                F.normalize(left_codes[:, :dims]), ids, self.older_right[ids], older, self.queue_ids
            )
            if self.data.paired:
                older = self.older_left[self.queue_ids]
                loss = loss + self._side_loss(
                    F.normalize(right_codes[:, :dims]), ids, self.older_left[ids], older, self.queue_ids
                )

        size = self.settings.queue_size
        self.left_queue = torch.cat([left_keys, self.left_queue])[:size]
        self.right_queue = torch.cat([right_keys, self.right_queue])[:size]
        self.queue_ids = torch.cat([ids, self.queue_ids])[:size]
        return loss

    def _side_loss(self, anchors: Tensor, ids: Tensor, keys: Tensor, queue: Tensor, queue_ids: Tensor) -> Tensor:
        keys, key_ids = torch.cat([keys, queue]), torch.cat([ids, queue_ids])
        temperature = self.settings.temperature
        if self.data.paired:
            return contrastive_loss(anchors, keys, ids, key_ids, temperature, self.settings.hard_negatives)
        embeddings = self.data.left
        return neighbourhood_loss(anchors, keys, embeddings[ids], embeddings[key_ids], ids, key_ids, temperature)

    # ---- checkpoints ----

    def save(self, path: str | os.PathLike[str]) -> None:
        state = {
            "left_queue": self.left_queue,
            "right_queue": self.right_queue,
            "queue_ids": self.queue_ids,
            "generator": self.generator.get_state(),
        }
        for name, module in (("model", self.model), ("key_model", self.key_model)):
            state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
        write_safetensors(path, state, {"epoch": self.epoch, "step": self.step, "run": self._identity()})

    def restore(self, path: str | os.PathLike[str]) -> None:
        state, settings = read_safetensors(path)
        if settings.get("run") != self._identity():
            raise ValueError(f"checkpoint must be of a run with the same data and settings, got {os.fspath(path)}")
        self.epoch, self.step = settings["epoch"], settings["step"]
        self.left_queue, self.right_queue = state.pop("left_queue"), state.pop("right_queue")
        self.queue_ids = state.pop("queue_ids")
        self.generator.set_state(state.pop("generator"))
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "key_model": {}, "optimizer": {}}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.model.load_state_dict(parts["model"])
        self.key_model.load_state_dict(parts["key_model"])
        optimizer = self.optimizer.state_dict()
        for name, value in parts["optimizer"].items():
            index, _, key = name.partition(".")
            optimizer["state"].setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(optimizer)

    def _identity(self) -> dict[str, Any]:
        """What must be equal for two runs to be the same."""
        digest = hashlib.sha256()
        for tensor in (self.data.left, self.data.right, self.older_left, self.older_right):
            if tensor is not None:
                digest.update(str(list(tensor.shape)).encode() + tensor.numpy().tobytes())
        return {**asdict(self.settings), "data": digest.hexdigest()}


def _older_codes(older: RecurrentBinarizer, embeddings: Tensor) -> Tensor:
    return F.normalize(older.encode(embeddings).levels().cpu().float())


def _progress_bar(total: int, initial: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, desc="Training binariser", unit=" step", disable=not shown)
