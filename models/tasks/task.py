"""What trainer and commands ask of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from i2v_kernels.video import ClipLoader
from i2v_models.backbone import VideoCLIP
from i2v_models.batches import Clips

if TYPE_CHECKING:
    from i2v_models.config import FitConfig, TrainConfig

Tokenizer = Callable[[list[str]], Tensor]
MakeLoader = Callable[[Any], ClipLoader]  # of sources as ClipLoader takes them


class Task:
    """What a model is trained for: its data, its head, its loss and its test.

    ``Trainer`` calls ``forward`` for the valid clips of a batch and then ``loss``. In between, where the loss is ``coupled``,
    it brings together what ``forward`` gave on all processes. Neither talks to other processes itself, so that one which
    fails leaves none waiting.
    """

    coupled = False  # the loss of a clip depends on those of other processes
    foreign: tuple[str, ...] = ()  # settings of a training run that mean nothing here

    # What Trainer calls.

    def check(self, model: VideoCLIP) -> None:
        """``ValueError`` if ``model`` cannot learn this."""

    def record(self) -> dict[str, Any]:
        """What is kept in ``config.json``, and has to be the same when a run is resumed and on all processes."""
        return {}

    def forward(self, model: VideoCLIP, clips: Clips, config: FitConfig) -> Any:
        """What the loss is made of: tensors with a row for each clip. Runs under autocast; ``ValueError`` names clips that it
        cannot be made of.
        """
        raise NotImplementedError

    def nothing(self, model: VideoCLIP) -> Any:
        """What ``forward`` would give for no clip, if the loss is ``coupled``."""
        raise NotImplementedError

    def loss(self, model: VideoCLIP, outputs: Any, counts: list[int], config: FitConfig) -> Tensor:
        """The sum of the clips' losses.

        If it is ``coupled``, ``outputs`` are of the clips of all processes, ``counts[0]`` of the first one, and so on, and
        this is their sum over the number of processes.
        """
        raise NotImplementedError

    def stepped(self, model: VideoCLIP) -> None:
        """Called after each step of the optimizer."""

    # What the commands call.

    @classmethod
    def begin(cls, config: TrainConfig, make_loader: MakeLoader, tokenizer: Tokenizer) -> tuple[Task, ClipLoader]:
        """The task of a new run, and the loader of its clips."""
        raise NotImplementedError

    @classmethod
    def of_run(cls, record: Mapping[str, Any], tokenizer: Tokenizer) -> Task:
        """The task of the run with this ``config.json``; ``ValueError`` names what is missing there."""
        raise NotImplementedError

    def head(self, config: TrainConfig) -> dict[str, Any]:
        """The arguments of ``build`` that make the model one for this task."""
        raise NotImplementedError

    def test_data(self, data: str, make_loader: MakeLoader) -> tuple[ClipLoader, Any]:
        """The loader of a test, and what else ``test`` has to know of the data: plain, and the same on all processes."""
        raise NotImplementedError

    def test(self, model: VideoCLIP, loader: ClipLoader, known: Any, precision: str) -> dict[str, Any]:
        """The result, as it is written to ``eval.json``."""
        raise NotImplementedError

    def told(self, result: dict[str, Any]) -> str:
        """The result for people."""
        raise NotImplementedError
