"""From an image-text model and the name of a method to a video model."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from i2v_kernels.extras import require
from i2v_models.backbone import Method, VideoCLIP, check_vit
from i2v_models.heads import LinearHead, RetrievalHead, TextHead, text_features
from i2v_models.methods import create


def load_clip(model: str, pretrained: str | None) -> tuple[Any, Callable[[list[str]], Tensor]]:
    """An open_clip model and its tokenizer. ``pretrained``: a tag of open_clip, a file, or None for random weights.

    ``ValueError`` in one sentence for a model or weights that are not there, do not fit or are damaged.
    """
    open_clip = require("open_clip", "i2v_models.load_clip")
    known = open_clip.list_models()
    if model not in known and ":" not in model:
        near = difflib.get_close_matches(model, known, n=5) or known[:5]
        raise ValueError(f"model={model!r} is unknown to open_clip; near it: {', '.join(near)}")
    try:
        clip_model, tokenizer = open_clip.create_model(model, pretrained=pretrained), open_clip.get_tokenizer(model)
    except Exception as error:  # whatever a file that holds something else makes of itself
        why = " ".join(f"{type(error).__name__}: {error}".split())[:240]
        if pretrained is None:
            raise ValueError(f"model={model!r} cannot be built: {why}") from error
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "of which there are none for it"
        raise ValueError(
            f"pretrained={pretrained!r} cannot be loaded into {model!r}, which takes a tag of open_clip ({tags}) or a whole "
            f"file of its weights: {why}"
        ) from error
    broken = [name for name, value in clip_model.state_dict().items() if not bool(value.isfinite().all())]
    if pretrained is not None and broken:
        raise ValueError(f"pretrained={pretrained!r} holds weights that are not finite: {', '.join(broken[:3])}")
    return clip_model, tokenizer


def build(
    clip_model: Any,
    method: str | Method = "st_adapter",
    *,
    frames: int = 8,
    head: str | None = "text",
    captions: Sequence[str] = (),
    tokenizer: Callable[[list[str]], Tensor] | None = None,
    kernels: bool = True,
    train_backbone: bool = False,
    checkpointing: bool = False,
    spatial: str = "sdpa",
    **options: Any,
) -> VideoCLIP:
    """Wrap ``clip_model`` (any open_clip model with a ViT) as a video model.

    ``captions`` holds one caption per class: their embeddings are the classifier of ``head="text"``, their number
    the width of ``head="linear"``; ``head="retrieval"`` gives clip embeddings of unit length, to be compared with those of
    ``model.encode_text(tokens)``, ``head=None`` clip embeddings as they are. ``tokenizer`` defaults to CLIP's.
    ``train_backbone`` makes the image tower trainable; with ``head="retrieval"`` the text tower too.
    ``kernels=False`` computes the temporal modules and the patches as the published code does. ``spatial`` is what attends
    within a frame: "sdpa", "flash" (flash-attn) or "module" (the image model's own). ``options`` go to the method
    (``width``, ``adapters``, ...). The model is frozen in place; its parameters and state dict stay what they are.
    """
    visual = check_vit(clip_model)
    if isinstance(method, str):
        method = create(method, visual, frames=frames, kernels=kernels, **options)
    elif options:
        raise ValueError(f"{', '.join(options)} cannot be applied to a method that is already built")
    if head not in ("text", "linear", "retrieval", None):
        raise ValueError(f"head={head!r} is unknown; there are 'text', 'linear', 'retrieval' and None")
    if head in ("text", "linear") and not captions:
        raise ValueError(f"head={head!r} needs one caption per class in captions, got none")
    classifier: nn.Module | None = None
    if head == "text":
        open_clip = require("open_clip", "i2v_models.build")
        tokenizer = tokenizer or open_clip.SimpleTokenizer(context_length=clip_model.context_length)
        classifier = TextHead(text_features(clip_model, captions, tokenizer), clip_model.logit_scale)
    elif head == "linear":
        width = visual.ln_post.normalized_shape[0]
        classifier = LinearHead(width, len(captions), dropout=method.head_dropout, std=method.head_std)
    elif head == "retrieval":
        classifier = RetrievalHead(clip_model.logit_scale)
    device = visual.conv1.weight.device
    how = {"checkpointing": checkpointing, "spatial": spatial, "kernels": kernels}
    trained = {"train_backbone": train_backbone, "train_text": train_backbone and head == "retrieval"}
    model = VideoCLIP(clip_model, method, classifier, **trained, **how)
    return model.to(device)
