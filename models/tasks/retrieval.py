"""Videos and captions find one another."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import i2v_kernels as i2v
from i2v_kernels.video import ClipLoader
from i2v_models import processes
from i2v_models.backbone import VideoCLIP
from i2v_models.batches import Clips
from i2v_models.evaluate import averaged
from i2v_models.heads import RetrievalHead, unit
from i2v_models.precision import autocast
from i2v_models.retrieval import retrieval_metrics
from i2v_models.tasks.captions import digest, drawn, read_captions
from i2v_models.tasks.task import MakeLoader, Task, Tokenizer

if TYPE_CHECKING:
    from i2v_models.config import FitConfig, TrainConfig

LARGEST_SCALE = math.log(100)  # of cosines, as CLIP bounds it
APART = -1e4  # a similarity that no softmax sees, and whose gradient is 0 rather than NaN
TEXTS = 64  # captions that are encoded at once


class Retrieval(Task):
    """Symmetric contrastive loss (InfoNCE; CLIP, Radford et al. 2021, figure 3) of clips and captions, for a model with
    ``head="retrieval"``.

    ``captions`` are those of each video, by its number in the loader (``batch.item``); every epoch takes another, by (seed,
    epoch, video) alone, until all were taken. The other clips of a batch are the negatives, on all processes; each of the
    batches of ``accumulate`` has its own. Clips whose captions are the same, as the text tower reads them, are not held
    against each other. A caption longer than the tower's context is cut; the first one is a warning.
    """

    coupled = True
    foreign = ("head", "caption", "label_smoothing")

    def __init__(self, captions: Sequence[Sequence[str]], tokenizer: Tokenizer) -> None:
        self.captions, self.tokenize = captions, Tokens(tokenizer)

    def check(self, model: VideoCLIP) -> None:
        if not isinstance(getattr(model, "head", None), RetrievalHead):
            raise ValueError("the model has no head='retrieval', so it gives no embeddings beside those of captions")
        if not any(parameter.requires_grad for name, parameter in model.named_parameters() if name != "head.logit_scale"):
            raise ValueError(
                f"nothing to train: {type(model.method).__name__} has no parameters; take train_backbone=True or another method"
            )

    def record(self) -> dict[str, Any]:
        return {"task": "retrieval", "captions_digest": digest(self.captions)}

    def forward(self, model: VideoCLIP, clips: Clips, config: FitConfig) -> tuple[Tensor, Tensor, Tensor]:
        """Captions and clips at unit length ``[B, E]``, and a number for each caption, the same for the same."""
        if clips.item is None:
            raise ValueError("the loader does not tell which videos its clips are of (batch.item), so they have no captions")
        items = clips.item.tolist()
        if wrong := [item for item in items if not 0 <= item < len(self.captions)]:
            raise ValueError(f"the loader has a video number {wrong[0]}, captions are of {len(self.captions)} videos")
        device = model.image_mean.device
        tokens = self.tokenize([drawn(self.captions[item], config.seed, clips.epoch, item) for item in items])
        video = model(clips.frames.to(device, non_blocking=True))
        return unit(model.encode_text(tokens.to(device))), video, numbers(tokens).to(device)

    def nothing(self, model: VideoCLIP) -> tuple[Tensor, Tensor, Tensor]:
        device = model.image_mean.device
        none = torch.empty(0, model.embed_dim, device=device)
        return none, none, torch.empty(0, dtype=torch.int64, device=device)

    def loss(self, model: VideoCLIP, outputs: Any, counts: list[int], config: FitConfig) -> Tensor:
        text, video, number = outputs
        row = torch.arange(len(number), device=number.device)
        scale = model.head.logit_scale.exp()
        how: dict[str, Any] = {"scale": scale, "similarity": apart, "group": processes.alone()}
        return i2v.contrastive_loss((text, number, row), (video, number, row), **how) * (sum(counts) / len(counts))

    def stepped(self, model: VideoCLIP) -> None:
        with torch.no_grad():
            model.head.logit_scale.clamp_(0, LARGEST_SCALE)

    @classmethod
    def begin(cls, config: TrainConfig, make_loader: MakeLoader, tokenizer: Tokenizer) -> tuple[Task, ClipLoader]:
        if config.batch_size * processes.count() < 2:
            raise ValueError("batch_size=1 leaves a clip without another to be told from; retrieval needs at least 2")
        found = read_captions(config.data)
        return cls(found.texts, tokenizer), make_loader(found.videos)

    @classmethod
    def of_run(cls, record: Mapping[str, Any], tokenizer: Tokenizer) -> Task:
        return cls((), tokenizer)

    def head(self, config: TrainConfig) -> dict[str, Any]:
        return {"head": "retrieval"}

    def test_data(self, data: str, make_loader: MakeLoader) -> tuple[ClipLoader, list[list[str]]]:
        found = read_captions(data)
        return make_loader(found.videos), found.texts

    def test(self, model: VideoCLIP, loader: ClipLoader, known: Any, precision: str) -> dict[str, Any]:
        return evaluate_retrieval(model, loader, known, self.tokenize, precision=precision, progress=True)

    def told(self, result: dict[str, Any]) -> str:
        lines = []
        for way in ("text_to_video", "video_to_text"):
            found = result[way]
            recall = ", ".join(f"R@{k} {found[f'R@{k}']:.1f} %" for k in (1, 5, 10))
            ranks = f"MdR {found['MdR']:g}, MnR {found['MnR']:.1f}"
            lines.append(f"{way.replace('_', ' ')}: {recall}, {ranks}")
        left_out = f"; left out: {len(result['left_out'])} that cannot be read" if result["left_out"] else ""
        of = f"of {result['texts']} texts and {result['videos']} videos; chance: R@1 {result['chance']:.2g} %{left_out}"
        return "\n".join([*lines, of])


class Tokens:
    """A tokenizer that warns, once, where it cuts a caption."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.told = tokenizer, False

    def __call__(self, captions: list[str]) -> Tensor:
        tokens = self.tokenizer(captions)
        if not self.told:
            context = tokens.shape[1]
            blank = self.tokenizer([""])[0, -1]
            full = [captions[row] for row in (tokens[:, -1] != blank).nonzero().flatten().tolist()]
            cut = [caption for caption in full if self.longer(caption, context)]
            if cut:
                self.told = True
                text = f"captions longer than the {context} tokens of the text tower are cut; the first is {cut[0]!r}"
                warnings.warn(text, stacklevel=2)
        return tokens

    def longer(self, caption: str, context: int) -> bool:
        """Whether there is more of it when more fits: a caption that just fits is whole."""
        more = self.tokenizer([caption, ""], context_length=context + 1)
        return bool(more[0, -1] != more[1, -1])


def numbers(tokens: Tensor) -> Tensor:
    """``[A, L]`` to ``[A]``: the same for the same row, on every process."""
    found = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in np.ascontiguousarray(tokens.cpu().numpy())]
    return torch.from_numpy(np.frombuffer(b"".join(found), np.int64).copy())


def apart(
    text: Tensor, text_number: Tensor, text_row: Tensor, video: Tensor, video_number: Tensor, video_row: Tensor
) -> Tensor:
    """Cosines ``[a, v]`` of embeddings at unit length, but for other clips with the same caption."""
    same = (text_number[:, None] == video_number) & (text_row[:, None] != video_row)
    return (text @ video.T).masked_fill(same, APART)


@torch.no_grad()
def evaluate_retrieval(
    model: VideoCLIP,
    loader: Any,
    captions: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    *,
    precision: str = "fp32",
    progress: bool = False,
) -> dict[str, Any]:
    """Recall and ranks of both directions, as `i2v_models.retrieval.retrieval_metrics` defines them.

    ``loader`` is as for ``evaluate``; ``captions`` are those of each of its videos. A video is the mean of its views'
    embeddings at unit length. A caption that several videos have is one text, for which all of these are right. A video
    that cannot be read is left out, and so are captions that no other has. Where ``loader`` is one process's share, all
    of them call this, encode their share of the texts too, and get the result of the whole.

    Returns ``{"text_to_video": {"R@1", "R@5", "R@10", "MdR", "MnR", "queries"}, "video_to_text": {...}, "texts", "videos",
    "chance", "left_out", "bad"}``; ``chance`` is the R@1, in percent, of similarities by chance, which both directions share.
    ``ValueError``: no video is left; ``FloatingPointError``: an embedding is not finite.
    """
    model.eval()
    device = model.image_mean.device

    def wanted(batch: Any) -> Tensor:
        return torch.as_tensor(batch.valid).cpu().nonzero().flatten()

    def vectors(frames: Tensor, batch: Any, rows: Tensor) -> tuple[Tensor, list[None]]:
        with autocast(device, precision):
            return _finite(model(frames.to(device)), precision), [None] * len(rows)

    found, left_out, bad = averaged(loader, wanted, vectors, {}, progress)
    right: dict[str, list[int]] = {}
    for place, one in enumerate(found):
        for text in dict.fromkeys(captions[one.item]):
            right.setdefault(text, []).append(place)
    video = unit(torch.stack([one.mean for one in found]))
    text = embedded(model, list(right), tokenizer, precision, shared=getattr(loader, "world_size", 1) > 1)
    result: dict[str, Any] = retrieval_metrics(lambda: (part @ video.T for part in text.split(1024)), list(right.values()))
    pairs = sum(map(len, right.values()))
    chance = 100 * pairs / (len(text) * len(video))
    return result | {"texts": len(text), "videos": len(video), "chance": chance, "left_out": left_out, "bad": bad}


def embedded(model: VideoCLIP, texts: list[str], tokenizer: Tokenizer, precision: str, *, shared: bool) -> Tensor:
    """Unit-length embeddings ``[texts, E]`` on the CPU; where it is ``shared``, each process encodes every so many-th part."""
    device = model.image_mean.device
    starts = range(0, len(texts), TEXTS)
    mine = starts[processes.rank() :: processes.count()] if shared else starts
    parts: dict[int, Tensor] = {}
    with processes.together() if shared else nullcontext():
        for start in mine:
            tokens = tokenizer(texts[start : start + TEXTS]).to(device)
            with autocast(device, precision):
                parts[start] = unit(_finite(model.encode_text(tokens), precision)).cpu()
    for others in processes.gathered(parts) if shared else ():
        parts |= others
    return torch.cat([parts[start] for start in starts])


def _finite(x: Tensor, precision: str) -> Tensor:
    if not bool(x.isfinite().all()):
        raise FloatingPointError(f"the model gives NaN or Inf in precision={precision!r}; another one may help")
    return x
