"""Copies neighbouring clips of a store into memory that is used again and again.

A search reads every byte once, in order. To map files for that costs as much as a copy out of the system's memory into a buffer
that caches hold, since each page of a map is entered and removed again; and a file that is cut short meanwhile is an error
here, where a map would end the process.
"""

from __future__ import annotations

import json
import os
import struct
from types import TracebackType

import torch
from torch import Tensor

from i2v_models.retrieval.store import FeatureStore


class Reader:
    """Reads from ``store``, for one thread; a context manager that closes the file at hand."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self._number, self._file = -1, -1  # of the block that is open
        self._begins: dict[str, int] = {}  # of its tensors, in bytes

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def into(self, first: int, count: int, memory: dict[str, memoryview]) -> None:
        """``count`` clips from ``first`` on to where ``memory`` begins: for each tensor of a block that is wanted its bytes.

        ``OSError`` and ``ValueError`` name a file that is not, or no longer, what it should be.
        """
        done = 0
        while done < count:
            number, place = self.store.find(first + done)
            if number != self._number:
                self._open(number)
            some = min(count - done, self.store.blocks[number].clips - place)
            for name, size in self.store.row_bytes.items():
                self._copy(memory[name][done * size : (done + some) * size], self._begins[name] + place * size)
            done += some

    def _open(self, number: int) -> None:
        self.__exit__(None, None, None)
        path = self.store.folder / self.store.blocks[number].file
        with self.store.open_block(number):  # says what is wrong with the file
            self._file, self._number = os.open(path, os.O_RDONLY), number
        (length,) = struct.unpack("<Q", os.pread(self._file, 8, 0))
        header = json.loads(os.pread(self._file, length, 8))
        self._begins = {name: 8 + length + header[name]["data_offsets"][0] for name in self.store.row_bytes}

    def _copy(self, memory: memoryview, begin: int) -> None:
        done = 0
        while done < len(memory):
            count = os.preadv(self._file, [memory[done:]], begin + done)
            if count == 0:
                raise OSError(f"{self.store.folder / self.store.blocks[self._number].file} ends too early: it was cut short")
            done += count


def bytes_of(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(x.view(-1).view(torch.uint8).numpy())
