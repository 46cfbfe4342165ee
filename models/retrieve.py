"""Find videos by text: ``python -m i2v_models.retrieve --store DIR --text "a dog runs left"``.

The store is made, and added to, with ``--add``: ``python -m i2v_models.retrieve --store DIR --add VIDEOS --model ViT-B-32
--pretrained TAG``, or with ``--checkpoint RUN`` by a model of one's own. What is killed goes on with the same command.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from i2v_kernels.extras import require
from i2v_kernels.video import ClipLoader, read_sources
from i2v_kernels.video.tables import named_like_a_video
from i2v_models import processes, run, signals
from i2v_models.backbone import VideoCLIP
from i2v_models.batches import bad_videos, valid_part
from i2v_models.build import build
from i2v_models.config import RetrieveConfig, parse
from i2v_models.eval import open_run
from i2v_models.precision import autocast
from i2v_models.progress import Progress
from i2v_models.retrieval import FeatureStore, top_k
from i2v_models.tasks.retrieval import Tokens, embedded
from i2v_models.train import command, load_image_model

FLUSH_SECONDS = 60.0  # of encoding that a kill may cost
SAME = ("method", "frames", "sampling", "digest")  # what must not change within a store
Tokenizer = Any


def load_encoder(config: RetrieveConfig, known: dict[str, Any]) -> tuple[VideoCLIP, Tokenizer, dict[str, Any]]:
    """The model that encodes videos and texts, its tokenizer, and its description: what a store keeps of it.

    ``known`` is the description of the store that there is; the settings of ``config`` come before it. ``ValueError`` if the
    model is none that the store was made by, or cannot encode both.
    """
    folder = config.checkpoint or (known.get("checkpoint") if config.model is None else None)
    if folder is not None:
        model, trained, _ = open_run(folder, device=config.device, pretrained=config.pretrained)
        if trained.task == "classification" and trained.head == "linear":
            raise ValueError(f"checkpoint={folder!r} has head='linear', which does not bring videos to where texts are")
        tokenizer = require("open_clip", "i2v_models.retrieve").get_tokenizer(trained.model)
        about = {"model": trained.model, "pretrained": trained.pretrained, "checkpoint": os.path.abspath(folder)}
        method, frames = trained.method, trained.frames
    else:
        name, pretrained = config.model or known.get("model"), config.pretrained or known.get("pretrained")
        if name is None or pretrained is None:
            missing = "model" if name is None else "pretrained"
            raise ValueError(f"store={config.store!r} names no {missing}; give --model and --pretrained, or --checkpoint")
        if config.model is None and ":" in str(name):  # whoever made the store would have this machine fetch it
            raise ValueError(f"store={config.store!r} names {name!r}, which open_clip fetches; give --model if it is meant")
        image_model = SimpleNamespace(model=name, pretrained=pretrained, device=config.device, seed=0)
        clip_model, tokenizer = load_image_model(image_model)
        method, frames = "frame_mean", config.frames or known.get("frames") or 8
        model = build(clip_model, method, frames=frames, head=None)
        about = {"model": name, "pretrained": pretrained, "checkpoint": None}
    about |= {"method": method, "frames": config.frames or frames}
    about["sampling"] = config.sampling or known.get("sampling") or "tsn_test"
    about["digest"] = run.digest(model.state_dict())
    for key in SAME:
        if key in known and known[key] != about[key]:
            made = f"{known.get('model')}, {known.get('pretrained')}, {known.get('checkpoint') or 'no checkpoint'}"
            raise ValueError(f"store={config.store!r} was made with {key} {known[key]} ({made}); this would be {about[key]}")
    if about["frames"] != frames:
        raise ValueError(f"frames={config.frames} is not what checkpoint={folder!r} was trained with, {frames}")
    return model.eval(), tokenizer, about


def videos_of(source: str) -> list[str]:
    """The videos of a folder and all that are in it, or those of a list, each once."""
    root = Path(source)
    if not root.is_dir():
        return list(dict.fromkeys(video.path for video in read_sources(source).videos))
    inside = (path for path in root.rglob("*") if named_like_a_video(path.name) and path.is_file())
    found = [str(path) for path in inside if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    if not found:
        raise ValueError(f"add={source!r} holds no file that is named like a video")
    return sorted(found)


def add(config: RetrieveConfig, store: FeatureStore, model: VideoCLIP, about: dict[str, Any]) -> dict[str, Any]:
    """Encodes the videos of ``config.add`` that ``store`` has not; ``{"added", "present", "bad": {path: reason}}``.

    Names are paths, as the folder or list gives them. A signal that ends the program waits for the batch at hand.
    """
    present, paths = set(store.all_names()), videos_of(str(config.add))
    wanted = [path for path in paths if path not in present]
    added, bad = 0, {}
    if wanted:
        loader = ClipLoader(
            wanted,
            frames=about["frames"],
            sampling=about["sampling"],
            size=model.image_size[0],
            batch_size=config.batch_size,
            workers=config.workers,
            backend=config.decoder,
            index_cache=config.index_cache,
            on_error="skip",
        )
        flushed, device = time.monotonic(), model.image_mean.device
        with signals.put_off() as signal, store.writer() as writer, Progress(len(loader), "batch") as bar:
            for batch in loader:
                clips = valid_part(batch, 0)
                with torch.no_grad(), autocast(device, config.precision):
                    features = model.encode(clips.frames.to(device))
                writer.append(list(clips.path or ()), features)
                added += len(features)
                if time.monotonic() - flushed > FLUSH_SECONDS:
                    writer.flush()
                    flushed = time.monotonic()
                bar.update()
                if signal():
                    break
        bad = bad_videos(loader)
    return {"added": added, "present": len(paths) - len(wanted), "bad": bad}


def search(config: RetrieveConfig, store: FeatureStore, model: VideoCLIP, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """For each text ``{"text", "cut", "hits": [{"rank", "score", "name"}]}``; scores are cosines, the best first.

    ``cut``: the text is longer than what the model reads, and the rest of it was left out.
    """
    context = tokenizer([""]).shape[1]
    cut = [Tokens(tokenizer).longer(text, context) for text in config.text]
    queries = embedded(model, list(config.text), tokenizer, config.precision, shared=False)
    found = top_k(queries, store, config.top, progress=len(store) > 100_000)
    results = []
    for text, is_cut, scores, indices in zip(config.text, cut, found.scores.tolist(), found.indices):
        named = enumerate(zip(scores, store.names(indices)), 1)
        hits = [{"rank": rank, "score": score, "name": name} for rank, (score, name) in named]
        results.append({"text": text, "cut": is_cut, "hits": hits})
    return results


def told(result: dict[str, Any]) -> str:
    """A result for people."""
    note = " (longer than what the model reads: its end is left out)" if result["cut"] else ""
    lines = [f"{hit['rank']:5}  {hit['score']:7.4f}  {hit['name']}" for hit in result["hits"]]
    return "\n".join([f"{result['text']}{note}", *(lines or ["  the store has no videos"])])


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(RetrieveConfig, "python -m i2v_models.retrieve", argv)
    with command(config.device):
        if processes.count() > 1:
            raise ValueError(f"a store is searched and added to by one process, there are {processes.count()}")
        new = config.add is not None and not (Path(config.store) / "index.json").exists()
        store = None if new else FeatureStore(config.store)
        model, tokenizer, about = load_encoder(config, {} if store is None else store.model)
        if store is None:
            store = FeatureStore.create(config.store, model.embed_dim, dtype=config.dtype, normalize=True, model=about)
        if store.dim != model.embed_dim or store.tokens is not None:
            raise ValueError(f"{store} holds other features than {about['model']}'s, one vector of {model.embed_dim} a clip")
        output: dict[str, Any] = {"store": config.store}
        if config.add is not None:
            output["add"] = add(config, store, model, about)
            store = FeatureStore(config.store)
            if not config.json:
                report(output["add"], store)
        output |= {"videos": len(store), "results": search(config, store, model, tokenizer) if config.text else []}
        if config.json:
            print(json.dumps(output, indent=1))
        else:
            print("\n\n".join(map(told, output["results"])), end="\n" if output["results"] else "")


def report(added: dict[str, Any], store: FeatureStore) -> None:
    for path, reason in added["bad"].items():
        print(f"bad video: {path}: {reason}")
    there = f", {added['present']} were there" if added["present"] else ""
    print(f"{added['added']} videos added{there}, {len(added['bad'])} bad; the store has {len(store)}", flush=True)


if __name__ == "__main__":
    main()
