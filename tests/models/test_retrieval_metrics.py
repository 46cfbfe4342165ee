"""Metrics of retrieval against sorting by hand, ranking by pairs, and the published recipes where they agree."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from i2v_models.retrieval import metrics, retrieval_metrics

KEYS = ["R@1", "R@5", "R@10", "MdR", "MnR", "queries"]


def scores(texts: int, videos: int, seed: int = 0, levels: int | None = None) -> np.ndarray:
    """Scores without a tie, or with many where there are only ``levels`` of them."""
    draw = np.random.default_rng(seed)
    if levels:
        return draw.integers(0, levels, (texts, videos)).astype(np.float32)
    return draw.permutation(texts * videos).reshape(texts, videos).astype(np.float32)


def by_hand(similarity: np.ndarray, text_video: list[list[int]], group: bool = False) -> dict[str, dict[str, float]]:
    """Every list of candidates in order, wrong ones first where they tie: the place of the first right one."""

    def place(candidates: list[tuple[float, bool]]) -> int:
        order = sorted(candidates, key=lambda candidate: (-candidate[0], candidate[1]))
        better = [right for _, right in order].index(True)
        return better + 1

    texts, videos = similarity.shape
    for_texts = [
        place([(similarity[text, video], video in right) for video in range(videos)])
        for text, right in enumerate(text_video)
        if right
    ]
    for_videos = []
    for video in range(videos):
        own = [text for text in range(texts) if video in text_video[text]]
        if group:
            owners = sorted({right[0] for right in text_video})
            lists = [(owner, [similarity[t, video] for t in range(texts) if owner in text_video[t]]) for owner in owners]
            candidates = [(max(values), owner == video) for owner, values in lists]
        else:
            candidates = [(similarity[text, video], text in own) for text in range(texts)]
        if own:
            for_videos.append(place(candidates))
    ranks = {"text_to_video": for_texts, "video_to_text": for_videos}
    return {
        name: {f"R@{k}": 100 * sum(rank <= k for rank in found) / len(found) for k in (1, 5, 10)}
        | {"MdR": float(np.median(found)), "MnR": sum(found) / len(found), "queries": len(found)}
        for name, found in ranks.items()
    }


def same(one: dict, other: dict) -> None:
    assert list(one) == list(other) == ["text_to_video", "video_to_text"]
    for name in one:
        assert list(one[name]) == KEYS
        assert one[name] == pytest.approx(other[name], rel=1e-12), name


@pytest.mark.parametrize("levels", [None, 3, 40], ids=["no ties", "many ties", "some ties"])
def test_pairs_on_the_diagonal(levels):
    similarity = scores(37, 37, 1, levels)
    same(retrieval_metrics(similarity), by_hand(similarity, [[i] for i in range(37)]))


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("levels", [None, 4])
def test_several_captions_of_a_video(levels, group):
    owner = np.random.default_rng(3).integers(0, 11, 60)  # in no order; video 11 has none
    similarity = scores(60, 12, 2, levels)
    found = retrieval_metrics(similarity, owner, group_captions=group)
    same(found, by_hand(similarity, [[i] for i in owner.tolist()], group))
    assert found["text_to_video"]["queries"] == 60
    assert found["video_to_text"]["queries"] == len(set(owner.tolist())) < 12


@pytest.mark.parametrize("levels", [None, 4])
def test_several_videos_of_a_caption_and_texts_without_any(levels):
    draw = np.random.default_rng(5)
    text_video = [sorted(draw.choice(15, draw.integers(0, 4), replace=False).tolist()) for _ in range(25)]
    assert [] in text_video
    similarity = scores(25, 15, 6, levels)
    want = by_hand(similarity, text_video)
    same(retrieval_metrics(similarity, text_video), want)
    twice = [right + right[:1] for right in text_video]
    same(retrieval_metrics(similarity, twice), want)


def published_one_each(similarity: np.ndarray) -> dict[str, float]:
    """CLIP4Clip's and DRL's recipe: where, in every sorted row, the score of the diagonal stands."""
    places = np.nonzero(np.sort(-similarity, axis=1) == np.diag(-similarity)[:, None])[1]
    return {f"R@{k}": 100 * np.mean(places < k) for k in (1, 5, 10)} | {"MdR": np.median(places) + 1, "MnR": places.mean() + 1}


def published_several(similarity: np.ndarray, owner: np.ndarray) -> list[dict[str, float]]:
    """X-Pool's recipe: places by sorting twice, and from video to text the best of every video's captions."""
    place = torch.tensor(similarity).argsort(dim=1, descending=True).argsort(dim=1).numpy()
    best = np.stack([similarity[owner == video].max(0) for video in range(similarity.shape[1])])
    back = torch.tensor(best.T.copy()).argsort(dim=1, descending=True).argsort(dim=1).numpy()
    found = place[np.arange(len(owner)), owner], back.diagonal()
    return [
        {f"R@{k}": 100 * np.mean(places < k) for k in (1, 5, 10)} | {"MdR": np.median(places) + 1, "MnR": places.mean() + 1}
        for places in found
    ]


def test_published_recipes_agree_where_nothing_ties():
    similarity = scores(50, 50, 7) + 2000 * np.eye(50, dtype=np.float32)
    found = retrieval_metrics(similarity)
    assert 0 < found["text_to_video"]["R@1"] < 100
    for name, matrix in (("text_to_video", similarity), ("video_to_text", similarity.T)):
        assert found[name] == pytest.approx(published_one_each(matrix) | {"queries": 50}, rel=1e-12)

    owner = np.arange(80) % 20
    similarity = scores(80, 20, 8) + 800 * (owner[:, None] == np.arange(20)).astype(np.float32)
    found = retrieval_metrics(similarity, owner, group_captions=True)
    for name, want, queries in zip(found, published_several(similarity, owner), (80, 20)):
        assert found[name] == pytest.approx(want | {"queries": queries}, rel=1e-12)


def test_ties_give_no_credit():
    constant = retrieval_metrics(np.zeros((20, 20)))
    for direction in constant.values():
        assert direction == {"R@1": 0, "R@5": 0, "R@10": 0, "MdR": 20, "MnR": 20, "queries": 20}
    assert published_one_each(np.zeros((20, 20)))["R@1"] > 0  # the published recipe gives the chance level for nothing
    empty = np.full((3, 3), -np.inf)  # clips without a valid token
    assert retrieval_metrics(empty)["text_to_video"]["MnR"] == 3
    assert retrieval_metrics(np.where(np.eye(3) > 0, 0, -np.inf))["video_to_text"]["R@1"] == 100


def test_percent_median_and_json():
    similarity = np.array([[3.0, 2, 1, 0], [9, 5, 8, 7], [0, 0, 1, 0], [0, 1, 2, 3]])  # ranks 1, 4, 1, 1
    found = retrieval_metrics(similarity)["text_to_video"]
    assert found == {"R@1": 75.0, "R@5": 100.0, "R@10": 100.0, "MdR": 1.0, "MnR": 1.75, "queries": 4}
    assert retrieval_metrics(similarity[[0, 1], :2])["text_to_video"]["MdR"] == 1.5  # ranks 1 and 2
    assert json.loads(json.dumps(retrieval_metrics(similarity)))["text_to_video"] == found


@pytest.mark.parametrize("group", [False, True])
def test_blocks_change_nothing(monkeypatch, group):
    owner = np.random.default_rng(9).integers(0, 13, 70)
    similarity = scores(70, 13, 10, 6)
    whole = retrieval_metrics(similarity, owner, group_captions=group)
    for size in (1, 7, 64):
        blocks = lambda size=size: (torch.tensor(similarity[i : i + size]) for i in range(0, 70, size))  # noqa: E731
        assert retrieval_metrics(blocks, owner, group_captions=group) == whole
    monkeypatch.setattr(metrics, "ENTRIES", 50)
    assert retrieval_metrics(similarity, owner, group_captions=group) == whole
    diagonal = scores(13, 13, 11, 6)
    assert retrieval_metrics(lambda: iter([diagonal[:4], diagonal[4:]])) == retrieval_metrics(diagonal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_any_real_dtype(dtype):
    similarity = torch.tensor(scores(30, 30, 12, 50)).to(dtype).requires_grad_(dtype.is_floating_point)
    want = by_hand(similarity.detach().double().numpy(), [[i] for i in range(30)])
    same(retrieval_metrics(similarity), want)
    same(retrieval_metrics(similarity.T.contiguous().T), want)
    same(retrieval_metrics(similarity.tolist()), want)


def test_metrics_of_every_order_of_four():
    """All permutations of four candidates: the rank is the place, whatever the order."""
    for order in itertools.permutations(range(4)):
        row = np.array(order, np.float64)
        similarity = np.stack([np.roll(row, shift) for shift in range(4)])  # circulant: every text's rank is that of row[0]
        rank = 1 + sum(value > row[0] for value in row)
        assert retrieval_metrics(similarity)["text_to_video"]["MnR"] == rank


def test_nan_is_named():
    similarity = scores(6, 6)
    similarity[4, 2] = np.nan
    with pytest.raises(ValueError, match="text 4 and video 2 is NaN"):
        retrieval_metrics(similarity)
    with pytest.raises(ValueError, match="text 4 and video 2 is NaN"):
        retrieval_metrics(lambda: iter([similarity[:3], similarity[3:]]))


@pytest.mark.parametrize(
    ("similarity", "text_video", "error", "says"),
    [
        (np.zeros((3, 4)), None, ValueError, r"3 rows, but there are 4 texts"),
        (np.zeros((4, 3)), None, ValueError, r"4 rows, but there are 3 texts"),
        (np.zeros((2, 3)), [0, 1, 2], ValueError, r"2 rows, but there are 3 texts"),
        (np.zeros((2, 3)), [0, 3], ValueError, r"names video 3; similarity has 3"),
        (np.zeros((2, 3)), [0, -1], ValueError, r"names video -1"),
        (np.zeros((2, 3)), [[], []], ValueError, r"no right pair"),
        (np.zeros((2, 3)), [0, 1.5], TypeError, r"1.5 for 1"),
        (np.zeros((2, 3)), [0, "b"], TypeError, r"'b' for 1"),
        (np.zeros((2, 2)), [True, False], TypeError, r"True for 0"),
        (np.zeros(3), None, ValueError, r"must be \[A, V\], got \[3\]"),
        (np.zeros((0, 0)), None, ValueError, "empty"),
        (np.zeros((2, 2), complex), None, TypeError, "complex128"),
        (lambda: iter([np.zeros((2, 3)), np.zeros((1, 4))]), None, ValueError, r"from 2 on must be \[a, 3\], got \[1, 4\]"),
        (lambda: iter([np.zeros((2, 3)), np.zeros((1, 3), np.float32)]), None, ValueError, "from 2 on are float32"),
        (lambda: iter([]), None, ValueError, "empty"),
    ],
)
def test_what_does_not_fit_is_named(similarity, text_video, error, says):
    with pytest.raises(error, match=says):
        retrieval_metrics(similarity, text_video)


def test_an_iterator_that_is_spent_is_noticed():
    once = iter([np.eye(3)])
    with pytest.raises(ValueError, match="0 rows when it is walked again, 3 before"):
        retrieval_metrics(lambda: once)


def test_group_captions_needs_one_video_each():
    with pytest.raises(ValueError, match="one right video for each text"):
        retrieval_metrics(np.zeros((2, 3)), [[0, 1], [2]], group_captions=True)
    with pytest.raises(ValueError, match="one right video for each text"):
        retrieval_metrics(np.zeros((2, 3)), [[0], []], group_captions=True)
