"""What is particular to late_interaction: its modes against loops over tokens, ties, nothing valid, memory, what is kept."""

from __future__ import annotations

import pytest
import torch
from test_correct import needs_extension

import i2v_kernels as i2v
from bench.memory import peak
from bench.text_peers import late_published
from i2v_kernels.ops.base import OPS

OP = OPS["late_interaction"]
BACKENDS = ["reference", pytest.param("cpu", marks=needs_extension)]


def by_loops(text, video, weights, masks, mode, masked, temperature, unit):
    """Sums over pairs of tokens, written out."""
    scores = torch.zeros(len(text), len(video), dtype=text.dtype)
    for a, b in ((a, b) for a in range(len(text)) for b in range(len(video))):
        s = text[a] @ video[b].T
        rows, columns = masks[0][a], masks[1][b]
        if masked == "zero":
            s = s * rows[:, None] * columns
            seen = range(len(rows)), range(len(columns))
        else:
            seen = rows.nonzero().flatten().tolist(), columns.nonzero().flatten().tolist()

        def found(x):
            if not len(x):
                return x.sum()
            if mode != "softmax":
                return max(x)
            z = x / x.norm().clamp_min(1e-12) if unit else x
            share = torch.exp(z / temperature - (z / temperature).max())
            return (share * x).sum() / share.sum()

        def weight(side, item, token):
            if mode == "maxsim":
                return 1.0
            return 1 / masks[side][item].sum().item() if weights is None else weights[side][item, token]

        total = scores.new_zeros(())
        for t in rows.nonzero().flatten().tolist():
            total = total + weight(0, a, t) * found(s[t, list(seen[1])])
        for v in columns.nonzero().flatten().tolist() if mode != "maxsim" else ():
            total = total + weight(1, b, v) * found(s[list(seen[0]), v])
        scores[a, b] = total if mode == "maxsim" else total / 2
    return scores


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", ["ignore", "zero"])
@pytest.mark.parametrize("mode", ["wti", "means", "ti", "maxsim", "softmax", "unit softmax"])
def test_modes_are_their_formulas(mode, masked, backend):
    generator = torch.Generator().manual_seed(0)
    text, video, *weights = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((3, 5, 6), (4, 7, 6), (3, 5), (4, 7))
    )
    masks = [torch.rand(shape, generator=generator) > 0.4 for shape in ((3, 5), (4, 7))]
    masks[0][1], masks[1][2] = False, False  # nothing valid: the pair scores 0
    options = {"masked": masked, "text_mask": masks[0], "video_mask": masks[1]}
    kind = {"means": "wti", "unit softmax": "softmax"}.get(mode, mode)
    if kind == "softmax":
        options |= {"temperature": 0.3, "unit": mode == "unit softmax"}
    weighted = weights if mode in ("wti", "softmax", "unit softmax") else None
    if weighted is not None:
        options |= {"text_weight": weights[0], "video_weight": weights[1]}
    got = i2v.late_interaction(text, video, mode=kind, backend=backend, **options)
    want = by_loops(text, video, weighted, masks, kind, masked, 0.3, mode == "unit softmax")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert not got[1].any() and not got[:, 2].any()
    leaves, grad = [text, video, *(weighted or ())], torch.randn(got.shape, dtype=torch.float64, generator=generator)
    for g, w in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_maxima_go_to_the_first_valid_token(backend):
    text = torch.ones(1, 2, 1, requires_grad=True)
    video = torch.tensor([[[2.0], [3.0], [3.0], [1.0]]], requires_grad=True)
    for mask, first in ((None, 1), (torch.tensor([[True, False, True, True]]), 2)):
        scores = i2v.late_interaction(text, video, video_mask=mask, mode="maxsim", backend=backend)
        (dvideo,) = torch.autograd.grad(scores.sum(), video)
        assert dvideo.flatten().tolist() == [2.0 if v == first else 0.0 for v in range(4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_token_wins_only_where_masked_is_zero(backend):
    text, video = torch.ones(1, 1, 1), torch.tensor([[[-2.0], [-1.0]]])
    mask = torch.tensor([[True, False]])
    scores = {
        m: i2v.late_interaction(text, video, video_mask=mask, mode="maxsim", masked=m, backend=backend)
        for m in ("ignore", "zero")
    }
    assert scores["ignore"].item() == -2.0 and scores["zero"].item() == 0.0


@needs_extension
def test_places_are_kept_for_gradients_alone():
    text, video = torch.randn(3, 4, 8), torch.randn(5, 6, 8)
    options = (True, False, 0.0, False)
    weights = (torch.ones(3, 4), torch.ones(5, 6), None, None)
    shapes = [[tuple(x.shape) for x in OP.forward_op(text, video, *weights, *options, keep, "")] for keep in (False, True)]
    assert shapes == [[(3, 5), (0,), (0,)], [(3, 5), (3, 5, 4), (3, 5, 6)]]
    grad = torch.randn(3, 5)  # and are sought again where they were not
    places = OP.forward_op(text, video, *weights, *options, True, "")[1:]
    none = torch.empty(0, dtype=torch.uint8)
    for best in (places, (none, none)):
        found = OP.backward_op(grad, text, video, *weights, *options, True, *best, [True, True, True, True], "")
        if best is places:
            want = found
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@needs_extension
@pytest.mark.parametrize("tokens", [257, 40_000])
def test_many_tokens_have_wider_places(tokens):
    text, video = torch.randn(1, 2, 2, requires_grad=True), torch.randn(1, tokens, 2).requires_grad_()
    with torch.no_grad():
        video[0, -1] = 1000 * text[0, 0]
    (dvideo,) = torch.autograd.grad(i2v.late_interaction(text, video, mode="maxsim").sum(), video)
    assert torch.equal(dvideo[0, -1] != 0, text[0, 0] != 0)
    (want,) = torch.autograd.grad(i2v.late_interaction(text, video, mode="maxsim", backend="reference").sum(), video)
    torch.testing.assert_close(dvideo, want)


@needs_extension
def test_memory():
    """Of what the published formulation takes at its peak, at most a twentieth; the similarities alone are 96 MiB."""
    text, video = torch.randn(256, 32, 16, requires_grad=True), torch.randn(256, 12, 16, requires_grad=True)

    def step(function):
        out = function(text, video)
        return torch.autograd.grad(out, (text, video), torch.ones_like(out))

    ours, published = (peak(lambda function=f: step(function), "cpu") for f in (i2v.late_interaction, late_published))
    assert ours < published / 20, (ours, published)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"mode": "maxsim"}, {"mode": "softmax", "temperature": 0.5}], ids=str)
def test_within_a_contrastive_loss(options, backend):
    """In chunks, which cut texts with their weights and masks, the loss and its gradients are those of all at once."""
    generator = torch.Generator().manual_seed(0)
    text, video, *weights = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in ((7, 5, 6), (7, 4, 6), (7, 5), (7, 4))
    )
    weighted = options.get("mode") != "maxsim"
    masks = [torch.rand(shape, generator=generator) > 0.3 for shape in ((7, 5), (7, 4))]

    def similarity(text, text_weight, text_mask, video, video_weight, video_mask):
        given = {"text_weight": text_weight, "video_weight": video_weight} if weighted else {}
        masks = {"text_mask": text_mask, "video_mask": video_mask}
        return i2v.late_interaction(text, video, normalize=True, backend=backend, **options, **given, **masks)

    found = []
    for chunk in (7, 3):
        loss = i2v.contrastive_loss(
            (text, weights[0], masks[0]), (video, weights[1], masks[1]), scale=10.0, similarity=similarity, chunk=chunk
        )
        leaves = [text, video, *weights] if weighted else [text, video]
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@needs_extension
def test_a_block_of_texts_more_or_less_changes_no_bit():
    """Texts and videos are sought in tiles: a pair's score does not depend on which tile it came into."""
    whole = torch.randint(-3, 4, (70, 33, 8)).float(), torch.randint(-3, 4, (120, 17, 8)).float()
    scores = i2v.late_interaction(*whole)
    assert torch.equal(scores[3:40, 50:], i2v.late_interaction(whole[0][3:40], whole[1][50:]))
