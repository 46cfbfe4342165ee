"""An open_clip image-text model as a video model: frames through its own ViT blocks, a method's modules around
them.

The image model is used, never edited: its class, its parameters and its ``state_dict`` stay what they were, and
what a method adds lives beside it in a ``Method``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import i2v_kernels as i2v
from i2v_kernels.extras import require
from i2v_kernels.nn import PatchEmbed
from i2v_models.spatial import BACKENDS, spatial_attention

ViT = Any  # open_clip's VisionTransformer and its blocks, which carry no types
Block = Any


class Method(nn.Module):
    """What a transfer method adds to an image ViT. The base class adds nothing: every frame is an image.

    A subclass overrides ``block`` (and ``embed`` if it adds something to the tokens before ``ln_pre``). Its
    parameters carry the published names, with ``transformer.resblocks.<i>`` for what belongs to block ``i``.
    """

    mixes_frames = True  # frames see one another, so padded frames cannot be masked out afterwards
    mean_before_norm = False  # average the frames' tokens, then ln_post (ST-Adapter), not the other way round
    normalize_frames = False  # unit length before averaging frame embeddings (CLIP4Clip)
    head_std = 0.02  # initial weights of a linear head
    head_dropout = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.ln_post: nn.Module | None = None  # a trainable copy of the image model's, where the publication trains it
        self.spatial = "sdpa"  # see spatial_attention

    def embed(self, x: Tensor, frames: int) -> Tensor:
        """Tokens ``[B*T, L, C]`` with position embedding, before ``ln_pre``."""
        return x

    def block(self, index: int, block: Block, x: Tensor, frames: int) -> Tensor:
        """Run block number ``index`` of the image model on ``x [B*T, L, C]``."""
        x = x + self.attend(block, block.ln_1(x))
        return x + mlp(block, block.ln_2(x))

    def attend(self, block: Block, x: Tensor) -> Tensor:
        """The block's attention within a frame, without the residual; ``x [B*T, L, C]`` is normalised."""
        return spatial_attention(block, x, self.spatial)


def per_block(visual: ViT, make: Callable[[], nn.Module]) -> nn.Module:
    """One module per block of ``visual``, under the published names ``resblocks.<i>``."""
    return nn.ModuleDict({"resblocks": nn.ModuleList(make() for _ in visual.transformer.resblocks)})


def by_clip(x: Tensor, frames: int) -> Tensor:
    """``[B*T, L, C]`` seen as ``[B, T, L, C]``."""
    return x.view(x.shape[0] // frames, frames, *x.shape[1:])


def time_attention(block: Block, x: Tensor, frames: int) -> Tensor:
    """The same attention with the same weights, over frames: normalised ``x [B*T, L, C]``, softmax over T per token.

    The packed QKV is read as it lies, and its gradient written so: no token is regrouped, nothing split or stacked.
    """
    attn = block.attn
    channels = x.shape[2]
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    qkv = by_clip(qkv, frames).unflatten(3, (3, attn.num_heads, channels // attn.num_heads))
    out = i2v.temporal_attention(qkv)  # [B, T, L, H, D]
    return block.ls_1(attn.out_proj(out.reshape(x.shape)))


def mlp(block: Block, x: Tensor) -> Tensor:
    """The MLP branch of an open_clip block on normalised tokens, without the residual."""
    return block.ls_2(block.mlp(x))


def check_vit(clip_model: nn.Module) -> ViT:
    """The ViT of an open_clip model; ``TypeError`` or ``NotImplementedError`` says what is missing."""
    visual: Any = getattr(clip_model, "visual", None)
    name = type(visual if visual is not None else clip_model).__name__
    if not hasattr(getattr(visual, "transformer", None), "resblocks") or not hasattr(clip_model, "encode_text"):
        raise TypeError(
            f"clip_model must be an open_clip model with a text tower and a ViT (visual.transformer.resblocks), "
            f"got {name}; ResNet, timm and image-only towers have no such blocks"
        )
    if visual.attn_pool is not None or hasattr(clip_model, "text_decoder"):
        raise NotImplementedError(
            f"{type(clip_model).__name__} must pool by class token or average, not by attention, and have no text decoder; "
            "CoCa models cannot be used"
        )
    if visual.pool_type not in ("tok", "avg"):
        raise NotImplementedError(f"{name} must pool by class token or average, got pool_type={visual.pool_type!r}")
    if not visual.transformer.batch_first:
        raise NotImplementedError(f"{name} must be built with batch_first=True")
    return visual


def embeds_patches(conv: nn.Module, size: tuple[int, int]) -> bool:
    """Whether ``i2v_kernels.patch_embed`` computes this convolution of images of that size."""
    plain = PatchEmbed.why_not(conv) is None
    return plain and all(side % patch == 0 for side, patch in zip(size, conv.kernel_size))


class VideoCLIP(nn.Module):
    """Frames to a clip embedding, and to logits when there is a head.

    ``clip`` is the open_clip model as given, always in ``eval()`` mode (patch dropout would drop other patches in
    every frame) and frozen, unless ``train_backbone`` makes its image tower trainable, ``train_text`` its text tower.
    Nothing is recorded for autograd before the first trainable module. ``checkpointing`` recomputes each block in the
    backward pass. ``spatial`` names what attends within a frame: see ``i2v_models.spatial.spatial_attention``. ``kernels``
    takes uint8 frames to tokens in one op; without it, or where the image model's patches are no plain convolution, frames
    are normalised first.
    """

    head: Any
    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        clip_model: nn.Module,
        method: Method,
        head: nn.Module | None = None,
        *,
        train_backbone: bool = False,
        train_text: bool = False,
        checkpointing: bool = False,
        spatial: str = "sdpa",
        kernels: bool = True,
    ) -> None:
        super().__init__()
        if spatial not in BACKENDS:
            raise ValueError(f"spatial={spatial!r} is unknown; there are {', '.join(BACKENDS)}")
        method.spatial = spatial
        visual = check_vit(clip_model)
        clip_model.requires_grad_(False)
        visual.requires_grad_(train_backbone)
        self.clip, self.method, self.head = clip_model.eval(), method, head
        self.train_text = train_text
        for parameter in self.text_state(keep_vars=True).values() if train_text else ():
            parameter.requires_grad_(isinstance(parameter, nn.Parameter))
        self.train_backbone, self.checkpointing, self.kernels = train_backbone, checkpointing, kernels
        device = visual.conv1.weight.device
        constants = require("open_clip.constants", "i2v_models.VideoCLIP")
        mean = getattr(visual, "image_mean", None) or constants.OPENAI_DATASET_MEAN
        std = getattr(visual, "image_std", None) or constants.OPENAI_DATASET_STD
        self.normalisation = {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
        self.register_buffer("image_mean", torch.tensor(mean, device=device).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(std, device=device).view(3, 1, 1), persistent=False)

    @property
    def visual(self) -> ViT:
        return self.clip.visual

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the frames this model takes."""
        return tuple(self.visual.image_size)

    @property
    def embed_dim(self) -> int:
        """Channels ``E`` of the joint image-text space."""
        proj = self.visual.proj
        return int(self.visual.transformer.width if proj is None else proj.shape[1])

    def train(self, mode: bool = True) -> VideoCLIP:
        super().train(mode)
        self.clip.eval()
        return self

    def images(self, frames: Tensor) -> Tensor:
        """uint8 frames ``[B, T, H, W, 3]`` to the image model's input ``[B*T, 3, H, W]``, with its own mean and
        std.
        """
        self._check(frames)
        images = frames.flatten(0, 1).movedim(-1, 1).to(self.image_mean.dtype)
        return ((images / 255 - self.image_mean) / self.image_std).to(self.visual.conv1.weight.dtype)

    def patches(self, frames: Tensor) -> Tensor:
        """uint8 frames ``[B, T, H, W, 3]`` to the tokens of their patches ``[B*T, N, C]``."""
        self._check(frames)
        conv = self.visual.conv1
        if self.kernels and embeds_patches(conv, self.image_size) and frames.stride(-1) == 1:
            return i2v.patch_embed(frames, conv.weight, conv.bias, **self.normalisation).flatten(0, 1)
        return conv(self.images(frames)).flatten(2).transpose(1, 2)

    def _check(self, frames: Tensor) -> None:
        if frames.dtype != torch.uint8:
            raise TypeError(f"frames must be uint8, got {frames.dtype}")
        if frames.ndim != 5 or frames.shape[-1] != 3 or tuple(frames.shape[2:4]) != self.image_size:
            height, width = self.image_size
            raise ValueError(f"frames must be [B, T, {height}, {width}, 3], got {list(frames.shape)}")

    def tokens(self, frames: Tensor) -> Tensor:
        """uint8 frames ``[B, T, H, W, 3]`` to the last block's tokens ``[B, T, L, C]``, class token first."""
        visual, length = self.visual, frames.shape[1]
        x = self.patches(frames)
        x = torch.cat([visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = x + visual.positional_embedding.to(x.dtype)
        x = visual.ln_pre(self.method.embed(x, length))
        for index, block in enumerate(visual.transformer.resblocks):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.method.block, index, block, x, length, use_reentrant=False)
            else:
                x = self.method.block(index, block, x, length)
        return by_clip(x, length)

    def features(self, frames: Tensor, mask: Tensor | None = None, *, project: bool = False) -> Tensor:
        """One vector per clip: ``[B, C]`` before the projection into the joint space, ``[B, E]`` after it.

        ``mask [B, T]`` is True at valid frames; only methods that keep frames apart take one.
        """
        if mask is not None and self.method.mixes_frames:
            raise ValueError(f"mask is not possible with {type(self.method).__name__}: its frames see one another")
        x = self.tokens(frames)
        if self.visual.pool_type == "tok":
            x = x[:, :, :1]
        if self.method.mean_before_norm:
            x = x.mean(1, keepdim=True)
        x = self._pool(x)
        if project and self.visual.proj is not None:
            x = x @ self.visual.proj
        if project and self.method.normalize_frames:
            x = F.normalize(x, dim=-1)
        if mask is None:
            return x.mean(1)
        weight = mask.to(x.dtype)
        return torch.einsum("btc,bt->bc", x, weight) / weight.sum(1, keepdim=True).clamp(min=1)

    def encode(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """Clip embeddings ``[B, E]`` in the joint image-text space, not normalised."""
        return self.features(frames, mask, project=True)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embeddings ``[A, E]`` of captions ``[A, L]`` (what the tokenizer gives) in the same space, not normalised."""
        return self.clip.encode_text(tokens)

    def text_state(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        """State dict of the text tower: all that is the image-text model's but its image tower and the scale of its logits."""
        state = self.clip.state_dict(keep_vars=keep_vars)
        others = ("visual.", "logit_scale", "logit_bias")
        return {name.removeprefix("text."): value for name, value in state.items() if not name.startswith(others)}

    def forward(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, classes]``; with ``head="retrieval"`` clip embeddings of unit length ``[B, E]``; without a head those
        of ``encode``.
        """
        if self.head is None:
            return self.encode(frames, mask)
        return self.head(self.features(frames, mask, project=self.head.projected))

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """All that training changes, under the published names; the towers' with ``visual.`` and ``text.`` before them."""
        state = {**self.method.state_dict(), **(self.head.state_dict() if self.head is not None else {})}
        if self.train_backbone:
            state |= {f"visual.{name}": value for name, value in self.visual.state_dict().items()}
        if self.train_text:
            state |= {f"text.{name}": value for name, value in self.text_state().items()}
        return state

    def load_trainable_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy such a state in; ``ValueError`` names what is missing, unknown or of another shape."""
        own = self.trainable_state_dict()
        wrong = [f"{name} missing" for name in own.keys() - state.keys()]
        wrong += [f"{name} unknown" for name in state.keys() - own.keys()]
        wrong += [
            f"{name} is {list(state[name].shape)}, model has {list(own[name].shape)}"
            for name in own.keys() & state.keys()
            if own[name].shape != state[name].shape
        ]
        if wrong:
            raise ValueError("state does not fit this model: " + "; ".join(sorted(wrong)[:8]))
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])

    def _pool(self, x: Tensor) -> Tensor:
        """``[..., L, C]`` to ``[..., C]``, as the image model does it."""
        ln_post = self.method.ln_post or self.visual.ln_post
        if self.visual.pool_type == "tok":
            return ln_post(x[..., 0, :])
        if self.visual.final_ln_after_pool:
            return ln_post(x[..., 1:, :].mean(-2))
        return ln_post(x[..., 1:, :]).mean(-2)
