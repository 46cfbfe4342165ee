"""The mean attention of a row of queries over the relative places that it can reach, and the weights that lie there.

Of ``2 * height - 1`` relative rows a row of queries reaches ``height``, which follow each other; a group of its queries, in
columns that follow each other, reaches ``R = width + group - 1`` relative columns. So attention scattered to ``height * 2 * R``
cells (2: of the previous and the next frame) times as many weights, a slice of memory, is the output: at ``R / width`` times
the flops that a gathered weight for each pair of patches would take.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..products import add_product

WIDEST = 8  # queries of a group: more of them share a product, fewer waste less of it


@dataclass(frozen=True)
class Cells:
    """A patch grid, and how its columns are grouped."""

    height: int
    width: int

    @property
    def group(self) -> int:
        """Columns of a group: the most that divide the width, if there are several."""
        found = next(n for n in range(min(WIDEST, self.width), 0, -1) if self.width % n == 0)
        return found if found > 2 else self.width

    @property
    def groups(self) -> int:
        return self.width // self.group

    @property
    def columns(self) -> int:
        """W, and some that stay zero, so that rows of 16 bits begin at multiples of 16 bytes wherever they can."""
        return -(-(self.width + self.group - 1) // 4) * 4

    @property
    def count(self) -> int:
        """Cells of a query."""
        return self.height * 2 * self.columns

    def shape(self, frames: int) -> tuple[int, ...]:
        """Of the cells of so many frames."""
        return self.height, self.groups, frames, self.group, self.height, 2, self.columns

    @property
    def reach(self) -> int:
        """Relative columns that a group reaches."""
        return self.width + self.group - 1

    def of(self, cells: Tensor, clips: int, frame: int, side: int) -> Tensor:
        """``[clips, height, groups, group, height, width]``: the cells of the pairs of patches, query row and column, key row
        and column from the last on, of a frame of each clip and the previous (0) or the next one (1): a diagonal view.
        """
        row, group, a_frame, query, key_row, a_side, _ = cells.stride()
        shape = (clips, self.height, self.groups, self.group, self.height, self.width)
        strides = (cells.shape[2] // clips * a_frame, row, group, query + 1, key_row, 1)
        return cells.as_strided(shape, strides, frame * a_frame + side * a_side)

    def arranged(self, previous: Tensor, following: Tensor, group: int) -> Tensor:
        """The weights that a group reaches, ``[2 * height - 1, 2, columns, C]``."""
        out = previous.new_empty(2 * self.height - 1, 2, self.columns, previous.shape[1])
        out[:, :, self.reach :] = 0
        for side, weight in enumerate((previous, following)):
            out[:, side, : self.reach] = self._places(weight, group)
        return out

    def disarranged(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The adjoint of ``arranged`` for all groups: what stands for one weight in several is added."""
        found = []
        for side in range(2):
            total = sums.new_zeros((2 * self.height - 1) * (2 * self.width - 1), sums.shape[-1])
            for group in range(self.groups):
                self._places(total, group).add_(sums[group, :, side, : self.reach])
            found.append(total)
        return found[0], found[1]

    def _places(self, weight: Tensor, group: int) -> Tensor:
        places = weight.unflatten(0, (2 * self.height - 1, 2 * self.width - 1))
        return places[:, group * self.group : group * self.group + self.reach]

    def patches(self, tokens: Tensor, prefix: int, row: int, group: int) -> Tensor:
        """``[B, T, group, C]``: the tokens of a group of queries, a view."""
        first = prefix + row * self.width + group * self.group
        return tokens[:, :, first : first + self.group]


def scatter(grid: Cells, mean: Tensor, cells: Tensor, frame: int, side: int) -> None:
    """``mean [clips, P, P]`` of queries and keys, these from the last on, into the cells."""
    into = grid.of(cells, len(mean), frame, side)
    into.copy_(mean.view(into.shape))


def gather(grid: Cells, cells: Tensor, clips: int, frame: int, side: int) -> Tensor:
    """The adjoint of ``scatter``: ``[clips, P, P]``."""
    patches = grid.height * grid.width
    return grid.of(cells, clips, frame, side).reshape(clips, patches, patches)


def outputs(grid: Cells, cells: Tensor, previous: Tensor, following: Tensor, out: Tensor, prefix: int) -> None:
    """Writes the patches of ``out [B, T, N, C]`` from the cells of its frames."""
    for group in range(grid.groups):
        weights = grid.arranged(previous, following, group)
        for row in range(grid.height):
            product = cells[row, group].view(-1, grid.count) @ _reached(grid, weights, row)
            into = grid.patches(out, prefix, row, group)
            into.copy_(product.view(into.shape))


def cell_gradients(grid: Cells, grad: Tensor, previous: Tensor, following: Tensor, prefix: int, d_cells: Tensor) -> None:
    """The gradient of the cells of the frames of ``grad [B, T, N, C]``, into ``d_cells``."""
    for group in range(grid.groups):
        weights = grid.arranged(previous, following, group)
        for row in range(grid.height):
            rows = grid.patches(grad, prefix, row, group).reshape(-1, grad.shape[-1])
            torch.mm(rows, _reached(grid, weights, row).t(), out=d_cells[row, group].view(-1, grid.count))


def add_weight_gradients(grid: Cells, grad: Tensor, cells: Tensor, prefix: int, sums: Tensor) -> None:
    """Adds to ``sums [groups, 2 * height - 1, 2, columns, C]``."""
    for row in range(grid.height):
        for group in range(grid.groups):
            rows = grid.patches(grad, prefix, row, group).reshape(-1, grad.shape[-1])
            add_product(_reached(grid, sums[group], row), cells[row, group].view(-1, grid.count).t(), rows)


def _reached(grid: Cells, weights: Tensor, row: int) -> Tensor:
    """``[count, C]``: those that a row of queries reaches, a view."""
    return weights[row : row + grid.height].flatten(0, 2)
