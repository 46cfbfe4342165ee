"""How far a long job is: a bar on a terminal, lines in a file or a pipe."""

from __future__ import annotations

import sys
import time

from i2v_kernels.extras import require

SECONDS = 10.0  # between lines


class Progress:
    """``total`` units of which ``done`` were done before; ``update(text)`` after each."""

    def __init__(self, total: int, unit: str, *, done: int = 0, show: bool = True) -> None:
        self.total, self.unit, self.done, self.show = total, unit, done, show
        self.begun, self.before, self.told, self.text = time.monotonic(), done, -SECONDS, ""
        tqdm = require("tqdm", "showing progress").tqdm
        self.bar = tqdm(total=total, initial=done, unit=unit, disable=not (show and sys.stderr.isatty()))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, text: str = "") -> None:
        self.done, self.text = self.done + 1, text or self.text
        self.bar.set_postfix_str(self.text, refresh=False)
        self.bar.update()
        now, last = time.monotonic() - self.begun, self.done >= self.total
        if not self.show or not self.bar.disable or (now - self.told < SECONDS and not last):
            return
        self.told = now
        left = round(now / (self.done - self.before) * (self.total - self.done))
        parts = [f"{self.unit} {self.done} of {self.total}", self.text, f"{left // 60}:{left % 60:02d} left"]
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)
