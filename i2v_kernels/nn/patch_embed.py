"""The patch embedding of a ViT, on frames as a decoder gives them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..ops import checks, patch_embed
from ..ops.patch_embed.op import check_three
from .plain import why_not_plain

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class PatchEmbed(nn.Module):
    """``i2v_kernels.patch_embed`` with the parameters of ``nn.Conv2d(3, C, patch, stride=patch)``.

    ``weight [C, 3, ph, pw]`` and ``bias [C]`` have the names, shapes and initialisation of that module, so state dicts pass
    both ways: a model that had been fed normalised frames takes uint8 ones with the weights it has.

    Args:
        channels: C.
        patch_size: side of a patch, or its height and width.
        bias: with a bias; CLIP's has none.
        mean, std: of red, green and blue, CLIP's if not given. They are kept as numbers: the op needs them on the host.

    Shape: ``[B, T, H, W, 3]`` uint8 to ``[B, T, N, C]``.

    Examples:
        >>> import torch
        >>> embed = PatchEmbed(768, 16)
        >>> embed(torch.zeros(1, 8, 224, 224, 3, dtype=torch.uint8)).shape
        torch.Size([1, 8, 196, 768])
    """

    def __init__(
        self,
        channels: int,
        patch_size: int | tuple[int, int],
        bias: bool = True,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        super().__init__()
        checks.integer("PatchEmbed", "channels", channels, low=1)
        sides = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        checks.sizes("PatchEmbed", "patch_size", sides, "ph, pw", low=1)
        checks.flag("PatchEmbed", "bias", bias)
        self._take(nn.Conv2d(3, channels, patch_size, patch_size, bias=bias), mean, std)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> PatchEmbed:
        """The module that takes the conv's place behind normalisation with this mean and std; parameters are shared."""
        reason = cls.why_not(conv)
        if reason is not None:
            raise ValueError(f"PatchEmbed.from_conv: conv={conv!r} is no patch embedding: {reason}")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._take(conv, mean, std)
        return module.train(conv.training)

    def _take(self, conv: nn.Conv2d, mean: Sequence[float], std: Sequence[float]) -> None:
        self.weight, self.bias = conv.weight, conv.bias
        self.mean, self.std = (
            tuple(check_three("PatchEmbed", name, values, positive=name == "std"))
            for name, values in (("mean", mean), ("std", std))
        )

    @staticmethod
    def why_not(conv: nn.Module) -> str | None:
        """None if the module does what this one does for normalised frames, else what about it does not."""
        if type(conv) is not nn.Conv2d:  # parametrised modules and wrappers compute their weight
            return f"it is a {type(conv).__name__}"
        if (what := why_not_plain(conv)) is not None:
            return f"it {what}"
        if conv.in_channels != 3 or conv.groups != 1:
            return f"it mixes {conv.in_channels // conv.groups} channels of {conv.in_channels}, not 3 of 3"
        if conv.stride != conv.kernel_size:
            return f"its stride {conv.stride} is not its kernel's size {conv.kernel_size}"
        if conv.padding not in ((0, 0), "valid") or conv.dilation != (1, 1):
            return f"it has padding={conv.padding!r} and dilation={conv.dilation}"
        return None

    def forward(self, frames: Tensor) -> Tensor:
        return patch_embed(frames, self.weight, self.bias, mean=self.mean, std=self.std)

    def extra_repr(self) -> str:
        channels, _, *patch = self.weight.shape
        return f"{channels}, patch_size={tuple(patch)}, bias={self.bias is not None}, mean={self.mean}, std={self.std}"
