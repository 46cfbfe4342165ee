"""Adds clips to a feature store, block by block, so that it may be killed at any moment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor

from i2v_kernels.extras import require
from i2v_models import checkpoint, run
from i2v_models.retrieval.store import FILE, Block, FeatureStore, new_digest


class Writer:
    """Adds clips to the store in ``folder``; one at a time does. As a context manager it writes the rest when it ends well.

    A block is written beside its place and renamed, and then the index, so a kill loses no more than what was appended since
    the last `flush`. The last block is filled up before another begins, whoever appended to it: how often it was flushed or
    killed does not show in the files. ``block_bytes`` is the size of a block's features; so much of them is held in memory.
    """

    def __init__(self, folder: str | Path, *, block_bytes: int = 1 << 26) -> None:
        if block_bytes < 1:
            raise ValueError(f"block_bytes must be at least 1, got {block_bytes}")
        self.store = store = FeatureStore(folder)
        self._lock = run.hold(store.folder, "store")
        try:
            self.store = store = FeatureStore(folder)  # as it is now that nobody else writes
            self._remove_leftovers()
            self.block_clips = max(1, block_bytes // (store.dim * (store.tokens or 1) * store.dtype.itemsize))
            self._names: list[str] = []
            self._parts: list[dict[str, Tensor]] = []
            self._stored = 0  # of those names and parts, the first so many are the store's last block
            if store.blocks and store.blocks[-1].clips < self.block_clips:  # a larger one is of another block_bytes
                self._take_back()
        except BaseException:
            run.let_go(self._lock)
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            run.let_go(self._lock)

    def __len__(self) -> int:
        """Clips that are stored, and those that the next `flush` will store."""
        return len(self.store) + len(self._names) - self._stored

    def append(
        self, names: Sequence[str], features: Tensor, *, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Clips in order.

        Args:
            names: a text for each.
            features: `[n, D]`; in a store of tokens `[n, m, D]`, m at most its N where it has a mask. Any floating dtype.
            mask: `[n, m]` bool, True at valid tokens, in a store with a mask. None: all m are.
            weights: `[n, m]`, in a store with weights.

        `ValueError` and `TypeError` name what does not fit, and the clip whose features are not finite in the store's dtype.
        Then nothing of the call is added.
        """
        store = self.store
        names = list(names)
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise TypeError(f"names must be texts, got {wrong[0]!r}")
        part = {"features": self._features(names, features)}
        length = features.shape[1] if store.tokens else 0
        if mask is not None and not store.has_mask:
            raise ValueError("mask is given, but the store has none")
        if (weights is not None) != store.has_weights:
            raise ValueError(f"weights must be {'given' if store.has_weights else 'None'}, as the store was created")
        if store.has_mask:
            mask = torch.ones(len(names), length, dtype=torch.bool) if mask is None else mask.detach().cpu()
            if mask.dtype is not torch.bool or list(mask.shape) != [len(names), length]:
                raise ValueError(f"mask must be bool [{len(names)}, {length}], got {mask.dtype} {list(mask.shape)}")
            part["mask"] = F.pad(mask, (0, store.tokens - length))
        if weights is not None:
            weights = weights.detach().cpu().float()
            if list(weights.shape) != [len(names), length] or not bool(weights.isfinite().all()):
                raise ValueError(f"weights must be finite and [{len(names)}, {length}], got {list(weights.shape)}")
            part["weights"] = F.pad(weights, (0, store.tokens - length))
        begin = 0
        while begin < len(names):
            end = min(len(names), begin + self.block_clips - len(self._names))
            self._names += names[begin:end]
            self._parts.append({name: value[begin:end] for name, value in part.items()})
            if len(self._names) == self.block_clips:
                self.flush()
            begin = end

    def flush(self) -> None:
        """Write what was appended; from then on it is in the store."""
        if len(self._names) > self._stored:
            self._write()

    def _features(self, names: list[str], features: Tensor) -> Tensor:
        """As they will lie in the store, in memory of their own."""
        store = self.store
        if not features.is_floating_point():
            raise TypeError(f"features must be floating point, got {features.dtype}")
        shape, lengths = list(features.shape), range(1, (store.tokens or 0) + 1)
        if store.tokens is None:
            fits, want = shape == [len(names), store.dim], f"[{len(names)}, {store.dim}]"
        else:
            lengths = lengths if store.has_mask else lengths[-1:]
            fits = len(shape) == 3 and shape == [len(names), shape[1], store.dim] and shape[1] in lengths
            want = f"[{len(names)}, {'at most ' * store.has_mask}{store.tokens}, {store.dim}]"
        if not fits:
            raise ValueError(f"features must be {want}, one for each name, got {shape}")
        features = features.detach().cpu()
        if store.normalize:
            features = F.normalize(features.float(), dim=-1)
        features = features.to(store.dtype, copy=True)
        finite = features.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            clip = names[int((~finite).nonzero()[0])]
            raise ValueError(f"features of {clip!r} are not finite in {store.dtype}")
        if store.tokens is not None:
            features = F.pad(features, (0, 0, 0, store.tokens - shape[1]))
        return features

    def _write(self) -> None:
        """All that waits as the store's last block, in place of the one that holds the first of it."""
        store, clips = self.store, len(self._names)
        names = [name.encode() for name in self._names]
        tensors = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        self._parts = [tensors.copy()]
        tensors["names"] = torch.frombuffer(bytearray(b"".join(names) or b"\0"), dtype=torch.uint8)
        tensors["ends"] = torch.tensor([len(name) for name in names]).cumsum(0)
        content = require("safetensors.torch", "writing a feature store").save(tensors)
        digest = new_digest()
        digest.update(content)
        first = len(store) - self._stored
        block = Block(f"block-{first:09d}-{clips}.safetensors", clips, len(content), digest.hexdigest())
        with checkpoint.replacing(store.folder / block.file) as temporary:
            temporary.write_bytes(content)
        before = store.blocks[:-1] if self._stored else store.blocks
        index = store.index | {"blocks": [block._asdict() for block in [*before, block]]}
        checkpoint.write_json(store.folder / "index.json", index)
        if self._stored:
            checkpoint.remove(store.folder / store.blocks[-1].file)
        self.store, self._stored = FeatureStore(store.folder), clips
        if clips == self.block_clips:
            self._names, self._parts, self._stored = [], [], 0

    def _take_back(self) -> None:
        """The store's last block, which is not full, as what was appended first."""
        number = len(self.store.blocks) - 1
        self.store.verify_block(number)
        last = self.store.blocks[number].clips
        self._names = self.store.names(range(len(self.store) - last, len(self.store)))
        for part in self.store.read(len(self.store) - last):
            self._parts.append({name: value.clone() for name, value in part._asdict().items() if value is not None})
        self._stored = last

    def _remove_leftovers(self) -> None:
        """Blocks that no index came to name, and what was being written when a writer was killed."""
        named = {block.file for block in self.store.blocks}
        for path in self.store.folder.iterdir():
            whole = path.name.removeprefix(".").removesuffix(".tmp")
            if path.name not in named and (FILE.fullmatch(whole) or path.name == ".index.json.tmp"):
                checkpoint.remove(path)
