"""What each of two processes does for test_ranks.py: ``python ranks.py RANK FOLDER``; what it sees goes to rank<RANK>.pt."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from i2v_models import checkpoint, processes
from i2v_models.fit import Trainer
from i2v_models.tasks.retrieval import evaluate_retrieval
from tests.models.conftest import ClipList
from tests.models.ranks import Shares, loader, said
from tests.models.tasks.test_retrieval import MANY, UNLIKE, config, retrieval, tokenizer, video_model

RANK, FOLDER = int(sys.argv[1]), Path(sys.argv[2])


def trainer(output: str, shares: ClipList, task=None, tuned: bool = False, **changes) -> Trainer:
    model = video_model(train_backbone=tuned)
    return Trainer(model, shares, config(output=str(FOLDER / output), **changes), task=task or retrieval())


def trained(*arguments, **changes):
    one = trainer(*arguments, tuned=True, **changes)
    log = one.run()
    return [one.model.trainable_state_dict(), log]


class Failing:
    """Raises in the ``number``-th call on one process."""

    def __init__(self, call, number: int, error: Exception, rank: int = 1) -> None:
        self.call, self.number, self.error, self.rank, self.calls = call, number, error, rank, 0

    def __call__(self, *arguments):
        self.calls += 1
        if self.rank == RANK and self.calls == self.number:
            raise self.error
        return self.call(*arguments)


def failures(seen: dict) -> None:
    """On one process, at every place of a step of two batches."""
    for name, number in (("forward", 3), ("forward", 4), ("loss", 3), ("loss", 4)):
        task = retrieval()
        setattr(task, name, Failing(getattr(task, name), number, RuntimeError(f"no memory in {name}")))
        seen[f"{name} {number}"] = said(trainer(f"{name}{number}", loader(), task, accumulate=2).run, RuntimeError, ValueError)
    for number in (3, 4):
        broken = loader()
        broken.batch = Failing(broken.batch, number, OSError("no such disk"))
        seen[f"loader {number}"] = said(trainer(f"loader{number}", broken, accumulate=2).run, OSError, ValueError)
    both = retrieval()
    both.loss = Failing(both.loss, 3, OSError("one"), rank=0)
    both.forward = Failing(both.forward, 4, RuntimeError("other"))
    seen["both"] = said(trainer("both", loader(), both, accumulate=2).run, OSError, RuntimeError)


def main() -> None:
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/store", rank=RANK, world_size=2)
    seen: dict = {}
    seen["whole"] = trained("whole", loader(), steps=4)
    seen["repeats"] = trained("repeats", loader(Shares, count=5), steps=4)
    seen["repeats, accumulated"] = trained("accumulated", loader(Shares, count=5), steps=2, accumulate=2)
    seen["evaluate"] = evaluate_retrieval(video_model(), loader(Shares, count=5), MANY, tokenizer())
    other = [[text.upper() + "!" * RANK for text in texts] for texts in UNLIKE]
    seen["captions"] = said(lambda: trainer("captions", loader(), retrieval(other)), ValueError)
    failures(seen)
    told = trainer("told", loader(), steps=6, save_every=100)
    if RANK:  # one is told, and its loader breaks with it; both stay at the step before
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        batch = told.loader.batch

        def end(*arguments):
            if told.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("DataLoader worker is killed by signal")
            return batch(*arguments)

        told.loader.batch = end
    try:
        told.run()
    except SystemExit as stop:
        seen["told"] = [stop.code, checkpoint.load(FOLDER / "told").step]
    seen["joined"] = processes.joined(torch.full((RANK, 2), RANK), [0, 1])
    torch.save(seen, FOLDER / f"rank{RANK}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
