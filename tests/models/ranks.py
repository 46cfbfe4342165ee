"""What each of two processes does for test_ranks.py: ``python ranks.py RANK FOLDER``; what it sees goes to rank<RANK>.pt."""

from __future__ import annotations

import copy
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from i2v_models import checkpoint, evaluate, fit
from i2v_models.fit import Trainer
from tests.models.conftest import ClipList
from tests.models.test_fit import config, video_model

RANK, FOLDER = int(sys.argv[1]), Path(sys.argv[2])


class Shares(ClipList):
    """As ClipLoader: the last step of an epoch is filled up with repeats, on one rank with nothing else."""

    def __len__(self) -> int:
        return -(-len(self.label) // (self.batch_size * self.world_size))

    def __iter__(self):
        order = torch.randperm(len(self.label), generator=torch.Generator().manual_seed(self.epoch))
        while self.yielded < len(self):
            first = (self.yielded * self.world_size + self.rank) * self.batch_size
            self.yielded += 1
            places = torch.arange(first, first + self.batch_size)
            yield self.batch(order[places % len(order)], places < len(order))
        self.yielded = 0


def model(**options):
    return video_model("tokshift", train_backbone=True, **options)


def loader(kind=ClipList, **options):
    return kind(batch_size=2, rank=RANK, world_size=2, **options)


def said(call, *errors):
    try:
        call()
    except errors as error:
        return f"{type(error).__name__}: {error}"
    return None


def trained(output: str, shares, **changes):
    here = model()
    log = fit(here, shares, config(output=str(FOLDER / output), **changes))
    return [here.trainable_state_dict(), log]


def own_disks(seen):
    """Rank 0's disk holds step 2 and rank 1's step 4; then rank 0's step 4 and rank 1's nothing."""
    for name, steps in (("behind", (2, 4)), ("alone", (4, 0))):
        for step in range(2, steps[RANK] + 1, 2):
            state, weights = both_states[step]
            checkpoint.save(FOLDER / f"{name}{RANK}", step, weights, state)
            record = (FOLDER / "whole" / "config.json").read_text()
            (FOLDER / f"{name}{RANK}" / "config.json").write_text(record)
        seen[name] = trained(f"{name}{RANK}", loader(), steps=6)


both_states: dict = {}


def remember(seen):
    """A run of six steps, and all its checkpoints on both processes."""
    save = checkpoint.save

    def keep(folder, step, weights, state, **options):
        both_states[step] = copy.deepcopy((state, {name: value.detach() for name, value in weights.items()}))
        return save(folder, step, weights, state, **options)

    checkpoint.save = keep
    seen["whole"] = trained("whole", loader(), steps=6)
    checkpoint.save = save
    found = [both_states]
    dist.broadcast_object_list(found, 0)
    both_states.update(found[0])


def main() -> None:
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/store", rank=RANK, world_size=2)
    seen: dict = {}
    seen["repeats"] = trained("repeats", loader(Shares, count=5), steps=4)
    seen["repeats, accumulated"] = trained("accumulated", loader(Shares, count=5), steps=2, accumulate=2)
    remember(seen)
    own_disks(seen)

    here = model()
    torch.nn.init.normal_(here.head.fc.weight, generator=torch.Generator().manual_seed(0))
    seen["evaluate"] = evaluate(here, loader(Shares, count=5))

    seen["settings"] = said(lambda: fit(model(), loader(), config(lr=0.1 * (1 + RANK))), ValueError)
    seen["how often it saves"] = said(lambda: fit(model(), loader(), config(save_every=2 + RANK)), ValueError)
    seen["data"] = said(lambda: fit(model(), loader(count=8 + 4 * RANK), config()), ValueError)
    seen["no share"] = said(lambda: fit(model(), ClipList(), config()), ValueError)
    other = model()
    with torch.no_grad():
        other.clip.transformer.resblocks[0].ln_1.weight.add_(RANK)
    seen["frozen weights"] = said(lambda: fit(other, loader(), config()), ValueError)
    bare = model().requires_grad_(RANK > 0)
    seen["nothing to train"] = said(lambda: fit(bare, loader(), config()), ValueError)

    broken = loader()
    if RANK:
        broken.label[:] = 9
    seen["label"] = said(lambda: fit(model(), broken, config()), ValueError)
    (FOLDER / "file").touch()
    seen["folder"] = said(lambda: fit(model(), loader(), config(output=str(FOLDER / ("fine" if RANK else "file")))), OSError)
    disk = Trainer(model(), loader(), config(output=str(FOLDER / "disk"), steps=4))
    (FOLDER / "disk" / "log.jsonl").mkdir(exist_ok=True)
    seen["disk"] = said(disk.run, OSError)
    spoilt = Trainer(model(), loader(), config(output=str(FOLDER / "nan"), steps=4))
    if RANK:
        spoilt.model.head.fc.weight.register_hook(lambda grad: grad * (float("nan") if spoilt.step == 2 else 1))
    seen["nan"] = said(spoilt.run, FloatingPointError)

    told = Trainer(model(), loader(), config(output=str(FOLDER / "told"), steps=6, save_every=100))
    if RANK:  # one is told; both save, and both end
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        told.model.head.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM) if told.step == 2 else None)
    try:
        told.run()
    except SystemExit as end:
        seen["told"] = end.code
    torch.save(seen, FOLDER / f"rank{RANK}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
