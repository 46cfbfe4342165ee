"""What each of four processes does for test_contrastive_loss.py: ``python contrastive_ranks.py FOLDER``, first as one of four,
then, of the first two, as one of two. What it computes, and what that should be, goes to rank<RANK>.pt.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import i2v_kernels as i2v

RANK, FOLDER = -1, Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("loss", Path(importlib.util.find_spec("open_clip").origin).with_name("loss.py"))
open_clip = importlib.util.module_from_spec(spec)
spec.loader.exec_module(open_clip)  # without the models of the package


def features(counts: list[int]) -> tuple[Tensor, Tensor, slice]:
    """Those of the whole batch, and which are this process's."""
    torch.manual_seed(3)
    text, video = F.normalize(torch.randn(2, sum(counts), 8, dtype=torch.float64), dim=-1)
    first = sum(counts[:RANK])
    return text, video, slice(first, first + counts[RANK])


def leaves(*values: Tensor | float) -> list[Tensor]:
    return [torch.as_tensor(x, dtype=torch.float64).clone().requires_grad_() for x in values]


def with_gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def naive(text: Tensor, video: Tensor, scale: Tensor, bias: Tensor, kind: str) -> Tensor:
    logits = scale * text @ video.t() + bias
    if kind == "sigmoid":
        return -F.logsigmoid(logits * (2 * torch.eye(len(text), dtype=logits.dtype) - 1)).sum() / len(text)
    labels = torch.arange(len(text))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def beside_open_clip(world: int, seen: dict) -> None:
    text, video, own = features([3] * world)
    for name, make in (
        ("ClipLoss", lambda: open_clip.ClipLoss(gather_with_grad=True, rank=RANK, world_size=world)),
        ("local ClipLoss", lambda: open_clip.ClipLoss(True, True, rank=RANK, world_size=world)),
        ("SigLipLoss", lambda: open_clip.SigLipLoss(rank=RANK, world_size=world)),
    ):
        inputs = leaves(text[own], video[own], 9.0, -2.0)
        want = with_gradients(make()(inputs[1], inputs[0], inputs[2], inputs[3]), inputs)
        if name != "ClipLoss":  # of which the value, and the gradients of numbers, are one process's share
            for x in (want[0], want[3], want[4]):
                dist.all_reduce(x)
                x /= world
        for chunk in (None, 2):
            kind = "sigmoid" if name == "SigLipLoss" else "softmax"
            got = i2v.contrastive_loss(inputs[0], inputs[1], scale=inputs[2], bias=inputs[3], kind=kind, chunk=chunk)
            seen[f"{name} of {world}, chunk={chunk}"] = (with_gradients(got, inputs), want)


def of_unlike_shares(seen: dict) -> None:
    """1, 4, 2 and 3 pairs; their features' gradients, over 4, are those of the whole batch."""
    text, video, own = features([1, 4, 2, 3])
    for kind in ("softmax", "sigmoid"):
        inputs = leaves(text, video, 9.0, -2.0)
        want = with_gradients(naive(*inputs, kind), inputs)
        want = [want[0], want[1][own], want[2][own], *want[3:]]
        mine = leaves(text[own], video[own], 9.0, -2.0)
        loss = i2v.contrastive_loss(mine[0], mine[1], scale=mine[2], bias=mine[3], kind=kind, chunk=2)
        got = with_gradients(loss, mine)
        seen[f"unlike shares, {kind}"] = ([got[0], got[1] / 4, got[2] / 4, *got[3:]], want)


def in_groups(seen: dict) -> None:
    """Processes 0 and 1, and 2 and 3, each with a batch of their own; a mask goes with the videos."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    text, video, own = features([3] * 4)
    valid = torch.rand(12, generator=torch.Generator().manual_seed(0)) > 0.3

    def similarity(text: Tensor, video: Tensor, valid: Tensor) -> Tensor:
        return (text @ video.t()).masked_fill(~valid, 0.0)

    first = RANK // 2 * 6
    half = slice(first, first + 6)
    logits = 5 * similarity(text[half], video[half], valid[half])
    labels = torch.arange(6)
    want = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    got = i2v.contrastive_loss(
        text[own], (video[own], valid[own]), scale=5.0, similarity=similarity, chunk=2, group=groups[RANK // 2]
    )
    seen["groups"] = ([got], [want])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.video, self.head = (nn.Linear(8, 8, bias=False, dtype=torch.float64) for _ in range(3))
        for i, layer in enumerate(self.children()):
            nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(i))
        self.log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def similarity(self, text: Tensor, video: Tensor) -> Tensor:
        return self.head(text) @ video.t()

    def forward(self, text: Tensor, video: Tensor, chunk: int) -> Tensor:
        return i2v.contrastive_loss(
            self.text(text), self.video(video), scale=self.log_scale.exp(), similarity=self.similarity, chunk=chunk
        )


def under_ddp(seen: dict) -> None:
    """A model whose head is in the similarity: the averaged gradients are those of the whole batch in one process."""
    text, video, own = features([3] * 4)
    alone = Model()
    logits = alone.log_scale.exp() * alone.similarity(alone.text(text), alone.video(video))
    labels = torch.arange(12)
    want = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    want.backward()
    model = nn.parallel.DistributedDataParallel(Model())
    for _ in range(2):  # a second step, whose hooks must have been called once each
        model.zero_grad()
        loss = model(text[own], video[own], 2)
        loss.backward()
    got = [p.grad for p in model.module.parameters()]
    seen["DistributedDataParallel"] = ([loss.detach(), *got], [want.detach(), *(p.grad for p in alone.parameters())])


def said(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def refused(seen: dict) -> None:
    text, video, own = features([3] * 4)
    text, video = text[own], video[own]
    frozen = video.clone().requires_grad_(RANK < 2)
    seen["another gradient"] = said(lambda: i2v.contrastive_loss(text, frozen, scale=1.0))
    few = slice(3 if RANK == 1 else 0, None)
    seen["no pair"] = said(lambda: i2v.contrastive_loss(text[few], video[few], scale=1.0))


def work() -> None:
    seen: dict = {}
    for world in (4, 2):
        if world > RANK:
            dist.init_process_group("gloo", init_method=f"file://{FOLDER}/store{world}", rank=RANK, world_size=world)
            beside_open_clip(world, seen)
            if world == 4:
                for check in (of_unlike_shares, in_groups, under_ddp, refused):
                    check(seen)
            dist.destroy_process_group()
    torch.save(seen, FOLDER / f"rank{RANK}.pt")


def child(rank: int) -> int:
    """A process that does its part and ends."""
    global RANK
    if process := os.fork():
        return process
    RANK, failed = rank, 1
    try:
        work()
        failed = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(failed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    children = [child(rank) for rank in range(4)]  # what is imported is imported once
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != 0 for process in children))
