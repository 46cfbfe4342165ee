"""Features of clips on disk: a folder of safetensors blocks and an ``index.json`` that names them.

A block holds the features of some ten thousand clips, what belongs to them, and their names: ``features`` `[n, D]` or
`[n, N, D]`, ``mask`` `[n, N]` and ``weights`` `[n, N]` where the store has them, ``names``, all in UTF-8 one after the
other, and ``ends`` `[n]`, where each of them ends. ``index.json`` is replaced after each block, so it lists whole blocks
alone. Nothing in a store is unpickled, and what a file holds is held against what the index says before it is used.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from i2v_kernels.extras import require
from i2v_models import checkpoint

if TYPE_CHECKING:
    from i2v_models.retrieval.writer import Writer

FORMAT, VERSION = "i2v-kernels feature store", 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # safetensors' names for them
FILE = re.compile(r"block-\d+-\d+\.safetensors")  # block-<first clip>-<clips>
READING = "reading a feature store"


class Part(NamedTuple):
    """Neighbouring clips of a store, as they lie in one of its files: `[n, D]` or `[n, N, D]`, `[n, N]`, `[n, N]`."""

    features: Tensor
    mask: Tensor | None
    weights: Tensor | None


class Block(NamedTuple):
    """What the index says of a file."""

    file: str
    clips: int
    bytes: int
    digest: str  # of all its bytes


class FeatureStore:
    """The features of clips in a folder, one vector `[D]` a clip, or `[N, D]` tokens, with a name for each clip.

    Opened as it is at that moment: clips that are added later are seen by whoever opens it anew. It may be larger than memory.
    `len(store)` is the number of clips.

    Args:
        folder: where `FeatureStore.create` put it.
        verify: whether to read every file and hold its digest against the index (`verify()`).

    Attributes: `folder`, `dim` (D), `tokens` (N, None for one vector a clip), `dtype` (torch's), `has_mask`, `has_weights`,
    `normalize`, `model` (what `create` was given), `blocks`.

    `OSError` and `ValueError` name the file that is not there, is of another size than the index says, or holds something else.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.index = _read_index(self.folder)
        while (fault := _fault(self.folder, self.index["blocks"])) is not None:
            before, self.index = self.index, _read_index(self.folder)
            if self.index == before:  # else a writer has put a fuller block in the place of its last one just now
                raise fault
        self.dim: int = self.index["dim"]
        self.tokens: int | None = self.index["tokens"]
        self.dtype = DTYPES[self.index["dtype"]]
        self.has_mask: bool = self.index["mask"]
        self.has_weights: bool = self.index["weights"]
        self.normalize: bool = self.index["normalize"]
        self.model: dict[str, Any] = self.index["model"]
        self.blocks = [Block(**block) for block in self.index["blocks"]]
        self._ends = list(accumulate(block.clips for block in self.blocks))
        tokens = self.tokens or 1
        self.row_bytes = {"features": tokens * self.dim * self.dtype.itemsize}  # of a clip, in each tensor of a block
        self.row_bytes |= {"mask": tokens} if self.has_mask else {}
        self.row_bytes |= {"weights": 4 * tokens} if self.has_weights else {}
        self._checked: set[int] = set()  # blocks whose file holds what it should
        if verify:
            self.verify()

    @classmethod
    def create(
        cls,
        folder: str | Path,
        dim: int,
        *,
        tokens: int | None = None,
        dtype: str | torch.dtype = "float16",
        mask: bool = False,
        weights: bool = False,
        normalize: bool = False,
        model: dict[str, Any] | None = None,
    ) -> FeatureStore:
        """A new store without a clip; `store.writer()` adds them.

        Args:
            folder: made if there is none; must not hold a store.
            dim: D, the length of a vector.
            tokens: N, the most tokens of a clip; None stores one vector `[D]` a clip.
            dtype: "float16", "bfloat16" or "float32", in which features are kept.
            mask: whether clips say which of their tokens are valid; without, each has all N.
            weights: whether each token has a weight (float32).
            normalize: bring each vector to unit length before it is stored, so that dot products are cosines.
            model: what made the features, as JSON can hold it; for whoever encodes the queries.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"dtype={dtype!r} cannot be stored; there are {', '.join(DTYPES)}")
        _check_count("dim", dim)
        if tokens is not None:
            _check_count("tokens", tokens)
        elif mask or weights:
            raise ValueError(f"{'mask' if mask else 'weights'}=True belongs to tokens, but tokens is None")
        folder = Path(folder)
        if (folder / "index.json").exists():
            raise ValueError(f"{folder} already holds a store; open it with FeatureStore({str(folder)!r})")
        index = {"format": FORMAT, "version": VERSION, "dim": dim, "tokens": tokens, "dtype": name}
        index |= {"mask": bool(mask), "weights": bool(weights), "normalize": bool(normalize), "model": model or {}}
        index["blocks"] = []
        checkpoint.check_writable(folder / "index.json")
        checkpoint.write_json(folder / "index.json", index)
        return cls(folder)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __repr__(self) -> str:
        shape = [self.dim] if self.tokens is None else [self.tokens, self.dim]
        return f"FeatureStore({str(self.folder)!r}, {len(self)} clips of {shape} {self.index['dtype']})"

    def writer(self, *, block_bytes: int = 1 << 26) -> Writer:
        """What adds clips: `with store.writer() as writer: writer.append(names, features)`. See `Writer`."""
        from i2v_models.retrieval.writer import Writer

        return Writer(self.folder, block_bytes=block_bytes)

    def read(self, first: int = 0, last: int | None = None) -> Iterator[Part]:
        """Clips `first` to `last` (not included), in as many parts as there are files. Tensors are views of the mapped files:
        not to be written to, and their memory goes when they do."""
        last = len(self) if last is None else last
        if not 0 <= first <= last <= len(self):
            raise IndexError(f"clips {first} to {last} are not within the store's {len(self)}")
        while first < last:
            number, place = self.find(first)
            count = min(last - first, self.blocks[number].clips - place)
            with self.open_block(number) as file:
                tensors = {name: file.get_tensor(name)[place : place + count] for name in self.row_bytes}
                yield Part(tensors["features"], tensors.get("mask"), tensors.get("weights"))
            first += count

    def names(self, clips: Sequence[int] | Tensor) -> list[str]:
        """The names of clips by their numbers, of which only these are read."""
        found = []
        for clip in torch.as_tensor(clips, dtype=torch.int64).tolist():
            if not 0 <= clip < len(self):
                raise IndexError(f"there is no clip {clip}; the store has {len(self)}")
            number, place = self.find(clip)
            with self.open_block(number) as file:
                ends, text = file.get_slice("ends"), file.get_slice("names")
                begin, end = [0, *ends[:1].tolist()] if place == 0 else ends[place - 1 : place + 1].tolist()
                if not 0 <= begin <= end <= text.get_shape()[0]:
                    raise ValueError(f"{self.folder / self.blocks[number].file} is damaged: the name of clip {clip} is outside")
                found.append(self._decoded(number, bytes(text[begin:end].tolist())))
        return found

    def all_names(self) -> Iterator[str]:
        """The names of all clips in order, a file at a time."""
        for number, block in enumerate(self.blocks):
            with self.open_block(number) as file:
                ends, text = file.get_tensor("ends").tolist(), file.get_tensor("names").numpy().tobytes()
            if not all(0 <= begin <= end <= len(text) for begin, end in zip([0, *ends], ends)):
                raise ValueError(f"{self.folder / block.file} is damaged: a name is outside")
            for begin, end in zip([0, *ends], ends):
                yield self._decoded(number, text[begin:end])

    def verify(self) -> None:
        """Read every file; ``ValueError`` names the first whose digest or contents are not what the index says."""
        for number in range(len(self.blocks)):
            self.verify_block(number)

    def verify_block(self, number: int) -> None:
        path = self.folder / self.blocks[number].file
        with open(path, "rb") as content:
            found = hashlib.file_digest(content, new_digest).hexdigest()
        if found != self.blocks[number].digest:
            raise ValueError(f"{path} is damaged: its digest is {found}, but {self.blocks[number].digest} by the store's index")
        with self.open_block(number):
            pass

    def find(self, clip: int) -> tuple[int, int]:
        """The number of the block that holds a clip, and its place there."""
        number = bisect.bisect_right(self._ends, clip)
        return number, clip - (self._ends[number] - self.blocks[number].clips)

    def open_block(self, number: int) -> Any:
        """A block's file, whose tensors have the types and shapes that the index says."""
        safetensors = require("safetensors", READING)
        block = self.blocks[number]
        path = self.folder / block.file
        try:
            file = safetensors.safe_open(path, "pt")
        except FileNotFoundError as error:
            raise OSError(f"{path} is gone: the store was added to since it was opened; open it again") from error
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {checkpoint.first_line(error)}") from error
        if number not in self._checked:
            self._check(file, block)
            self._checked.add(number)
        return file

    def _check(self, file: Any, block: Block) -> None:
        shape = [block.clips, self.dim] if self.tokens is None else [block.clips, self.tokens, self.dim]
        want = {"features": (CODES[self.index["dtype"]], shape), "ends": ("I64", [block.clips])}
        want |= {"mask": ("BOOL", shape[:2])} if self.has_mask else {}
        want |= {"weights": ("F32", shape[:2])} if self.has_weights else {}
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        have = {name: (view.get_dtype(), view.get_shape()) for name, view in views.items()}
        text = have.pop("names", ("missing", []))
        if have != want or text[0] != "U8" or len(text[1]) != 1:
            path = self.folder / block.file
            raise ValueError(f"{path} holds {have | {'names': text}}; by the store's index it should be {want} and names")

    def _decoded(self, number: int, name: bytes) -> str:
        try:
            return name.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.folder / self.blocks[number].file} is damaged: a name is not UTF-8") from error


def new_digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _read_index(folder: Path) -> dict[str, Any]:
    """``index.json`` of a store; ``ValueError`` if it is missing or something else."""
    path = folder / "index.json"
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is not a feature store: it has no index.json")
    try:
        index = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {checkpoint.first_line(error)}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path} is not of a feature store")
    if index.get("version") != VERSION:
        raise ValueError(f"{path} is of version {index.get('version')!r}; this package reads version {VERSION}")
    kinds = {"dim": int, "dtype": str, "mask": bool, "weights": bool, "normalize": bool, "model": dict, "blocks": list}
    wrong = [name for name, kind in kinds.items() if type(index.get(name)) is not kind]
    if index.get("tokens", 0) is not None:
        wrong += ["tokens"] if type(index.get("tokens")) is not int or index["tokens"] < 1 else []
    wrong += [] if wrong or (index["dim"] > 0 and index["dtype"] in DTYPES) else ["dim or dtype"]
    if not wrong:
        wrong += [f"block {number}" for number, block in enumerate(index["blocks"]) if not _is_block(block)]
    if wrong:
        raise ValueError(f"{path} is damaged: {wrong[0]} is missing or is not what it should be")
    return index


def _fault(folder: Path, blocks: list[dict[str, Any]]) -> Exception | None:
    """What is wrong with the first file that is missing or has another size than the index says."""
    for block in blocks:
        path = folder / block["file"]
        try:
            size = path.stat().st_size
        except OSError as error:
            return OSError(f"{path}, which the store's index names, is missing: {checkpoint.first_line(error)}")
        if size != block["bytes"]:
            return ValueError(f"{path} has {size} bytes, but {block['bytes']} by the store's index")
    return None


def _is_block(block: Any) -> bool:
    kinds = {"file": str, "clips": int, "bytes": int, "digest": str}
    if not isinstance(block, dict) or {name: type(value) for name, value in block.items()} != kinds:
        return False
    return FILE.fullmatch(block["file"]) is not None and block["clips"] > 0
