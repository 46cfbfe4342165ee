"""Top-k in a store: exact, ties by number, the same bits for any blocks and threads, in little memory."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import i2v_kernels as i2v
from i2v_models import checkpoint
from i2v_models.retrieval import FeatureStore, search, top_k
from i2v_models.retrieval.reader import Reader, bytes_of

CLIPS, DIM = 1000, 24


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """A store of a thousand clips has several parts of several tiles, as a large one."""
    monkeypatch.setattr(search, "TILE", 64 * DIM)
    monkeypatch.setattr(search, "TILES", 3)
    monkeypatch.setattr(checkpoint, "_sync", lambda path: None)  # no test here pulls the plug


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def numbers(*shape: int, seed: int = 0, levels: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if levels:  # products and sums are exact, and many are equal
        return torch.randint(-levels, levels + 1, shape, generator=generator).float()
    return torch.randn(shape, generator=generator)


def stored(folder: Path, features: Tensor, block_clips: int = 130, mask=None, weights=None, **how) -> FeatureStore:
    tokens = features.shape[1] if features.ndim == 3 else None
    how = {"dtype": "float32", "tokens": tokens, "mask": mask is not None, "weights": weights is not None} | how
    store = FeatureStore.create(folder, features.shape[-1], **how)
    with store.writer(block_bytes=block_clips * features[0].numel() * store.dtype.itemsize) as writer:
        writer.append([str(i) for i in range(len(features))], features, mask=mask, weights=weights)
    return FeatureStore(folder)


def sorted_by_hand(scores: Tensor, k: int) -> tuple[list[list[float]], list[list[int]]]:
    order = [sorted(range(len(row)), key=lambda clip: (-row[clip], clip))[:k] for row in scores.tolist()]
    return [[row[clip] for clip in clips] for row, clips in zip(scores.tolist(), order)], order


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("k", [1, 7, 100, CLIPS, CLIPS + 5])
def test_exact_with_ties_by_number(tmp_path, dtype, k, threads):
    features, queries = numbers(CLIPS, DIM, levels=2), numbers(5, DIM, seed=1, levels=2)
    store = stored(tmp_path / "store", features, dtype=dtype)
    scores, order = sorted_by_hand(queries @ features.T, k)
    assert any(len(set(row)) < len(row) for row in scores) or k == 1
    for count in (1, 3):
        threads(count)
        found = top_k(queries, store, k)
        assert found.scores.tolist() == scores and found.indices.tolist() == order
        assert found.scores.dtype is torch.float32 and found.indices.dtype is torch.int64
        assert torch.get_num_threads() == count


def test_all_equal_and_infinite_scores(tmp_path):
    store = stored(tmp_path / "store", torch.ones(CLIPS, DIM))
    assert top_k(torch.ones(2, DIM), store, 4).indices.tolist() == [[0, 1, 2, 3]] * 2
    zero = lambda queries, features: torch.where(features[:, 0] > 0, -0.0, 0.0).expand(len(queries), -1)  # noqa: E731
    assert top_k(torch.ones(2, DIM), store, 2, zero).indices.tolist() == [[0, 1]] * 2  # -0.0 is no less than 0.0

    def infinite(queries, features):
        return torch.full((len(queries), len(features)), -torch.inf)

    found = top_k(torch.ones(1, DIM), store, 3, infinite)
    assert found.indices.tolist() == [[0, 1, 2]] and found.scores.tolist() == [[-torch.inf] * 3]


def test_signed_zeros_tie(tmp_path):
    signs = torch.tensor([-0.0, 0.0]).repeat(CLIPS // 2)[:, None].expand(-1, DIM)
    store = stored(tmp_path / "store", signs)
    first = lambda queries, features: features[:, 0].expand(len(queries), -1)  # noqa: E731
    assert top_k(torch.ones(1, DIM), store, 5, first).indices.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_same_bits_for_any_blocks_and_threads(tmp_path, dtype, threads):
    features = numbers(CLIPS, DIM)
    for clips, sizes in ((CLIPS, (CLIPS, 64, 65, 777)), (150, (150, 7, 1))):
        stores = [stored(tmp_path / f"{clips} {size}", features[:clips], size, dtype=dtype) for size in sizes]
        assert [len(store.blocks) for store in stores] == [-(-clips // size) for size in sizes]
        for asked in (numbers(queries, DIM, seed=1) for queries in (1, 3, 40)):
            whole = top_k(asked, stores[0], 50)
            for count in (1, 2):
                threads(count)
                for store in stores:
                    found = top_k(asked, store, 50)
                    assert torch.equal(found.scores, whole.scores) and torch.equal(found.indices, whole.indices)


def test_how_many_are_asked_for_and_added_later_changes_no_score(tmp_path):
    features, asked = numbers(CLIPS, DIM), numbers(3, DIM, seed=1)
    store = stored(tmp_path / "store", features[:777])
    every = top_k(asked, store, 777)
    few = top_k(asked, store, 20)
    assert torch.equal(few.scores, every.scores[:, :20]) and torch.equal(few.indices, every.indices[:, :20])
    with store.writer(block_bytes=10_000) as writer:
        writer.append([str(i) for i in range(777, CLIPS)], features[777:])
    more = top_k(asked, FeatureStore(tmp_path / "store"), CLIPS)
    kept = more.indices < 777
    assert torch.equal(more.scores[kept].view(3, 777), every.scores)


def test_against_one_product_of_all(tmp_path):
    """What is not exact: other than in one large product, but by rounding alone."""
    features, asked = numbers(CLIPS, DIM), numbers(6, DIM, seed=1)
    found = top_k(asked, stored(tmp_path / "store", features), 30)
    want = (asked.double() @ features.double().T).topk(30)
    assert torch.equal(found.indices, want.indices)
    torch.testing.assert_close(found.scores.double(), want.values, rtol=1e-5, atol=1e-5)
    exact = top_k(asked.double(), FeatureStore(tmp_path / "store"), 30)
    assert exact.scores.dtype is torch.float64
    torch.testing.assert_close(exact.scores, want.values, rtol=1e-13, atol=1e-13)
    half = top_k(asked.half(), FeatureStore(tmp_path / "store"), 30)
    assert torch.equal(half.scores, top_k(asked.half().float(), FeatureStore(tmp_path / "store"), 30).scores)


def test_cosine_in_a_store_of_unit_vectors(tmp_path):
    features, asked = numbers(CLIPS, DIM), 9 * numbers(4, DIM, seed=1)
    found = top_k(asked, stored(tmp_path / "store", features, normalize=True), 10)
    want = F.cosine_similarity(asked[:, None], features, dim=-1).topk(10)
    assert torch.equal(found.indices, want.indices)
    torch.testing.assert_close(found.scores, want.values)


def maxsim(queries, features, *, video_mask=None, video_weight=None):
    """Sum over a text's tokens of the best similarity with a valid token of the video; 0 for a video without any."""
    similarity = torch.einsum("qtd,vnd->qvtn", queries, features)
    if video_weight is not None:
        similarity = similarity * video_weight[:, None, :]
    if video_mask is not None:
        similarity = similarity.masked_fill(~video_mask[:, None, :], -torch.inf)
    best = similarity.amax(-1)
    return torch.where(best == -torch.inf, 0.0, best).sum(-1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_any_similarity_over_tokens(tmp_path, masked, weighted, threads):
    features, asked = numbers(150, 5, DIM, levels=2), numbers(4, 3, DIM, seed=1, levels=2)
    mask = numbers(150, 5, seed=2) > 0 if masked else None
    weights = numbers(150, 5, seed=3, levels=3) if weighted else None
    assert mask is None or not mask.any(1).all()  # some have no token at all
    store = stored(tmp_path / "store", features, 33, mask, weights)
    scores, order = sorted_by_hand(maxsim(asked, features, video_mask=mask, video_weight=weights), 20)
    for count in (1, 2):
        threads(count)
        found = top_k(asked, store, 20, maxsim)
        assert found.scores.tolist() == scores and found.indices.tolist() == order


def test_late_interaction_of_tokens(tmp_path, threads):
    features, asked = numbers(150, 5, DIM), numbers(4, 3, DIM, seed=1)
    mask, weights = numbers(150, 5, seed=2) > 0, numbers(150, 5, seed=3).softmax(-1)
    assert not mask.any(1).all()
    store = stored(tmp_path / "store", features, 33, mask, weights)
    how = {"mode": "wti", "text_mask": numbers(4, 3, seed=4) > -1, "text_weight": numbers(4, 3, seed=5).softmax(-1)}
    want = i2v.late_interaction(asked, features, video_mask=mask, video_weight=weights, **how).topk(20)
    for count in (1, 2):
        threads(count)
        found = top_k(asked, store, 20, functools.partial(i2v.late_interaction, **how))
        assert torch.equal(found.indices, want.indices)
        torch.testing.assert_close(found.scores, want.values)


def test_what_a_similarity_is_given(tmp_path, threads):
    """Features in the queries' dtype, zeros after the last clip, one thread of PyTorch, no gradient."""
    threads(2)
    mask = torch.ones(40, 4) > 0
    store, seen = stored(tmp_path / "store", numbers(40, 4, DIM), mask=mask, dtype="bfloat16"), []

    def similarity(queries, features, scale, video_mask):
        seen.append((features.clone(), video_mask.clone()))
        assert torch.get_num_threads() == 1 and not torch.is_grad_enabled()
        return torch.einsum("qd,vnd->qv", queries, features) * scale

    found = top_k(numbers(2, DIM).half().requires_grad_(), store, 3, functools.partial(similarity, scale=0.5))
    assert found.scores.dtype is torch.float16 and not found.scores.requires_grad
    features, masks = (torch.cat(parts) for parts in zip(*seen))
    assert features.dtype is torch.float16 and features.shape == (48, 4, DIM)
    assert torch.equal(features[:40], numbers(40, 4, DIM).bfloat16().half()) and not features[40:].any()
    assert torch.equal(masks.all(1), torch.arange(48) < 40) and not masks[40:].any()


def test_empty_stores_and_no_queries(tmp_path):
    store = FeatureStore.create(tmp_path / "empty", DIM)
    found = top_k(numbers(3, DIM), store, 5)
    assert found.scores.shape == found.indices.shape == (3, 0)
    assert store.names(found.indices[0]) == []
    found = top_k(numbers(0, DIM), stored(tmp_path / "store", numbers(CLIPS, DIM)), 5)
    assert found.scores.shape == found.indices.shape == (0, 5)


def test_progress_is_told(tmp_path, capsys):
    store = stored(tmp_path / "store", numbers(CLIPS, DIM))
    top_k(numbers(1, DIM), store, 5)
    assert capsys.readouterr().err == ""
    top_k(numbers(1, DIM), store, 5, progress=True)
    assert "part 6 of 6" in capsys.readouterr().err


def wrong(result):
    return lambda queries, features: result(len(queries), len(features))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"k": 0}, ValueError, "k must be a whole number, at least 1, got 0"),
        ({"k": 2.0}, ValueError, "k must be a whole number, at least 1, got 2.0"),
        ({"queries": numbers(2, DIM + 1)}, ValueError, rf"queries must be \[Q, {DIM}\].*\[2, {DIM + 1}\]"),
        ({"queries": numbers(DIM)}, ValueError, rf"queries must be \[Q, {DIM}\]"),
        ({"queries": torch.ones(2, DIM, dtype=torch.int64)}, TypeError, "int64"),
        ({"queries": [[1.0]]}, TypeError, "list"),
        ({"queries": numbers(3, DIM) / torch.tensor([[1.0], [0.0], [1.0]])}, ValueError, "query 1 is not finite"),
        ({"similarity": wrong(torch.ones), "queries": torch.tensor(1.0)}, ValueError, "leading dimension"),
        ({"similarity": wrong(lambda q, n: torch.ones(q, n + 1))}, ValueError, r"floating point \[2, 64\].*\[2, 65\]"),
        ({"similarity": wrong(lambda q, n: torch.ones(q, n).long())}, ValueError, "int64"),
        ({"similarity": wrong(lambda q, n: None)}, ValueError, "NoneType"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, arguments, error, says):
    store = stored(tmp_path / "store", numbers(CLIPS, DIM))
    with pytest.raises(error, match=says):
        top_k(**{"queries": numbers(2, DIM), "store": store, "k": 3} | arguments)


@pytest.mark.parametrize("count", [1, 3])
def test_nan_and_errors_come_out_of_the_threads(tmp_path, threads, count):
    threads(count)
    store = stored(tmp_path / "store", numbers(CLIPS, DIM))

    def broken(queries, features):
        scores = queries @ features.T
        scores[1, features[:, 0] == numbers(CLIPS, DIM)[700, 0]] = torch.nan
        return scores

    with pytest.raises(ValueError, match="score of query 1 and clip 700 is NaN"):
        top_k(numbers(3, DIM, seed=1), store, 2, broken)
    with pytest.raises(ZeroDivisionError):
        top_k(numbers(3, DIM), store, 2, lambda queries, features: 1 / 0)
    assert torch.get_num_threads() == count
    tokens = stored(tmp_path / "tokens", numbers(30, 2, DIM))
    with pytest.raises(ValueError, match=r"similarity=None compares one vector a clip.*2 tokens"):
        top_k(numbers(3, DIM), tokens, 2)


def test_damage_is_named_where_it_is_met(tmp_path):
    store = stored(tmp_path / "store", numbers(CLIPS, DIM))
    file = store.folder / store.blocks[3].file
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(ValueError, match=f"{file.name} cannot be read"):
        top_k(numbers(1, DIM), store, 2)


def test_a_file_that_is_cut_short_meanwhile(tmp_path):
    store = stored(tmp_path / "store", numbers(CLIPS, DIM), CLIPS)
    tile = torch.empty(10, DIM)
    with Reader(store) as reader:
        reader.into(500, 10, {"features": bytes_of(tile)})
        assert torch.equal(tile, numbers(CLIPS, DIM)[500:510])
        file = store.folder / store.blocks[0].file
        os.truncate(file, 505 * DIM * 4)
        with pytest.raises(OSError, match=rf"{file.name} ends too early: it was cut short"):
            reader.into(500, 10, {"features": bytes_of(tile)})


def test_no_file_stays_open(tmp_path):
    store = stored(tmp_path / "store", numbers(CLIPS, DIM), 64)
    top_k(numbers(1, DIM), store, 2)  # whatever PyTorch opens once
    before = len(os.listdir("/proc/self/fd"))
    top_k(numbers(1, DIM), store, 2)
    with pytest.raises(ZeroDivisionError):
        top_k(numbers(1, DIM), store, 2, lambda queries, features: 1 / 0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_does_not_grow_with_the_store(tmp_path):
    """Four times the clips, in one block of 160 MB."""
    script = (
        "import sys, torch\nfrom i2v_models.retrieval import FeatureStore, top_k\n"
        "torch.set_num_threads(2)\n"
        "for folder in sys.argv[1:]:\n"
        "    top_k(torch.ones(2, 512), FeatureStore(folder), 10)\n"
        "    status = open('/proc/self/status').read()\n"  # ru_maxrss is no less than that of pytest's process
        "    print(status.partition('VmHWM:')[2].split()[0])\n"
    )
    folders = []
    for clips in (40_000, 160_000):
        store = FeatureStore.create(tmp_path / str(clips), 512)
        with store.writer(block_bytes=1 << 30) as writer:
            writer.append([""] * clips, torch.zeros(clips, 512, dtype=torch.float16))
        folders.append(str(store.folder))
    command = [sys.executable, "-c", script, *folders]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    small, large = (int(line) / 1024 for line in done.stdout.splitlines())
    assert large - small < 60  # MB
