"""Decoders by name, and the two functions that use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from .dali import DaliDecoder, why_no_dali
from .errors import import_av
from .pyav import PyAVDecoder
from .torchcodec import TorchcodecDecoder, why_no_torchcodec
from .types import Decoder, Size, StrPath, VideoIndex

_BACKENDS: dict[str, tuple[Decoder, Callable[[], str | None], bool]] = {}


def register_backend(
    name: str, decoder: Decoder, why_not: Callable[[], str | None] = lambda: None, automatic: bool = True
) -> None:
    """Make ``decoder`` known as ``backend=name``; of those that can run, ``"auto"`` takes the first registered.

    Args:
        name: its name; a name already taken is replaced.
        decoder: see `Decoder`.
        why_not: tells why the decoder cannot run on this machine, or None if it can.
        automatic: False for one that ``"auto"`` never takes.
    """
    _BACKENDS[name] = decoder, why_not, automatic


def choose_backend(name: str = "auto") -> tuple[str, Decoder, str]:
    """The backend that ``name`` stands for: ``(name, decoder, reason)``.

    Raises:
        ValueError: unknown name.
        ImportError: the backend, or with ``"auto"`` every backend, cannot run; the text says why.
    """
    if name != "auto" and name not in _BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(_BACKENDS)}, got {name!r}")
    obstacles = []
    for known in [known for known in _BACKENDS if _BACKENDS[known][2]] if name == "auto" else [name]:
        decoder, why_not, _ = _BACKENDS[known]
        obstacle = why_not()
        if obstacle is None:
            return known, decoder, "asked for by name" if name != "auto" else "first that can run"
        obstacles.append(f"backend {known!r} cannot run: {obstacle}")
    raise ImportError("; ".join(obstacles))


def index(path: StrPath, *, backend: str = "auto") -> VideoIndex:
    """The table of frames of a video file; reads every packet and decodes one frame, for its rotation.

    Args:
        path: the file.
        backend: name of a decoder, or ``"auto"``.

    Raises:
        VideoError: the file is missing, not a video, damaged so that no frame decodes, ...
        ValueError: unknown backend. ImportError: the decoder is not installed.
    """
    return choose_backend(backend)[1].index(path)


def decode(
    path: StrPath, indices: Sequence[int], size: Size = None, *, index: VideoIndex | None = None, backend: str = "auto"
) -> Tensor:
    """Exactly the frames ``indices``, rotated as for display.

    Args:
        path: the file.
        indices: frame numbers, in any order, repeats allowed.
        size: None for the size in the file, an int for the length of the short side (aspect kept),
            or exactly ``(height, width)``. Scaling is bilinear with antialiasing.
        index: the file's index if it is at hand already; saves reading it again.
        backend: name of a decoder, or ``"auto"``.

    Returns:
        ``[T, H, W, 3]`` uint8 RGB in the order of ``indices``.

    Raises:
        VideoError: the file cannot be used; where only its first frames decode, ``decodable`` says how many.
        IndexError: a frame number outside ``0..count - 1``.
        ValueError: size is not as above, or unknown backend. ImportError: the decoder is not installed.
    """
    return choose_backend(backend)[1].decode(path, indices, size, index=index)


def _why_not_pyav() -> str | None:
    try:
        import_av()
    except ImportError as error:
        return str(error)
    return None


register_backend("pyav", PyAVDecoder(), _why_not_pyav)
register_backend("torchcodec", TorchcodecDecoder(), why_no_torchcodec, automatic=False)
register_backend("torchcodec_cuda", TorchcodecDecoder("cuda"), partial(why_no_torchcodec, "cuda"), automatic=False)
register_backend("dali", DaliDecoder(), why_no_dali, automatic=False)  # not yet verified on a GPU
