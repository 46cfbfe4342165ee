"""EVL's attention between frames: patched alone and within its decoder, on a machine without the GPU that it asks for."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import trained
from published import EVLCrossAttention, EVLDecoder
from torch import Tensor, nn
from twins import results

import i2v_kernels as i2v


def made(device: str = "cpu") -> tuple[EVLCrossAttention, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    module = trained(EVLCrossAttention((3, 4), 24, device))
    return module, (torch.randn(2, 4, 13, 3, 16), torch.randn(2, 4, 13, 3, 16))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_output_is_where_the_inputs_are(device: str) -> None:
    plain, inputs = made()
    fast, _ = made(device)
    row = i2v.patch(fast).rows[0]
    assert row.replaced and row.detail == "frame_bias", row
    for got, want in zip(results(fast, inputs), results(plain, inputs), strict=True):
        torch.testing.assert_close(got, want)
    assert fast.state_dict().keys() == plain.state_dict().keys()


def test_it_is_the_op_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, inputs = made()
    i2v.patch(fast)
    monkeypatch.setattr(EVLCrossAttention, "forward_half", lambda *args: pytest.fail("a weight was gathered for each pair"))
    fast(*inputs)
    with pytest.raises(pytest.fail.Exception):
        fast(q=inputs[0], k=inputs[1])  # by name: the class's own


def test_the_dtype_is_that_of_the_published_class() -> None:
    (fast, inputs), (plain, _) = made(), made()
    i2v.patch(fast)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = fast(*inputs), plain(*inputs)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    fast, plain = fast.half(), plain.half()
    got, want = (module(*(x.half() for x in inputs)) for module in (fast, plain))
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    with pytest.raises(RuntimeError, match=r"same dtype|scalar type"):
        fast(*inputs)  # float32 and weights of 16 bits, which the published class refuses


def test_forks_that_compute_something_else() -> None:
    class MeanFirst(EVLCrossAttention):
        def forward_half(self, q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
            scores = torch.einsum("ntqhd,ntkhd->ntqk", q[:, :, 1:] / q.shape[-1] ** 0.5, k[:, :, 1:]) / q.shape[3]
            return torch.einsum("ntqk,qkc->ntqc", scores.softmax(-1), weight[self.idx_tensor])

    report = i2v.patch(MeanFirst((3, 4), 24))
    assert "other outputs" in report.refused[0].detail
    module, _ = made()
    module.idx_tensor = module.idx_tensor.flip(1)
    assert "its idx_tensor is not that of relative places" in i2v.patch(module).refused[0].detail


@pytest.mark.parametrize("how", ["in place", "another"])
def test_places_that_change_afterwards(how: str) -> None:
    (fast, inputs), (plain, _) = made(), made()
    i2v.patch(fast)
    copied = copy.deepcopy(fast)
    torch.testing.assert_close(copied(*inputs), plain(*inputs))
    for module in (fast, copied, plain):
        if how == "in place":
            module.idx_tensor[0].zero_()
        else:
            module.idx_tensor = module.idx_tensor.roll(1, 0)
    for module in (fast, copied):
        torch.testing.assert_close(module(*inputs), plain(*inputs))


def test_within_the_decoder() -> None:
    """On a machine without a GPU too, both replaced: the decoder calls what it finds in its list."""
    torch.manual_seed(0)
    decoder = EVLDecoder(48, 3, 4, 2)
    decoder.enable_temporal_cross_attention = True
    decoder.cross_attention = nn.ModuleList(EVLCrossAttention((2, 2), 48) for _ in range(2))
    trained(decoder)
    plain = copy.deepcopy(decoder)
    report = i2v.patch(decoder)
    assert [row.replaced for row in report if row.kind in ("EVLDecoder", "EVLCrossAttention")] == [True] * 3, report
    for attention in plain.cross_attention:
        attention.place = "cpu"
    features = [
        {"out": torch.randn(2, 4, 5, 48), "q": torch.randn(2, 4, 5, 3, 16), "k": torch.randn(2, 4, 5, 3, 16)} for _ in range(2)
    ]
    torch.testing.assert_close(decoder(copy.deepcopy(features)), plain(copy.deepcopy(features)))


def test_a_trial_takes_a_few_columns_of_the_weights() -> None:
    """At 24 x 24 patches and 1,024 channels weights for each pair would take 1.4 GB, several times."""

    class Narrow(EVLCrossAttention):
        def forward_half(self, q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
            assert weight.shape[1] <= 8
            return super().forward_half(q, k, weight)

    assert i2v.patch(Narrow((3, 4), 1024)).rows[0].replaced
