"""Other tools on patched models: PEFT, accelerate, quantised weights, wrappers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import MODELS, trained
from published import AIMAdapter, EVLDecoder
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from twins import Named, agree, output, twins

import i2v_kernels as i2v
from i2v_kernels.patching import is_patched


class Coarse(Tensor):
    """Numbers in steps of an eighth, as torchao's tensors are kept in another form and read at each product."""

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Coarse:
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype, device=numbers.device)

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = lambda x: (x.numbers * 8).round() / 8 if isinstance(x, Coarse) else x  # noqa: E731
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return Coarse(func(args[0].numbers))
        return func(*tree_map(read, args), **tree_map(read, kwargs or {}))


def quantise(model: nn.Module) -> None:
    for part in model.modules():
        if type(part) is nn.Linear:
            part.weight = nn.Parameter(Coarse(part.weight.detach()), requires_grad=False)


@pytest.mark.parametrize("name", ["perceptron", "aim blocks", "evl", "timesformer blocks"])
def test_quantised_weights(name: str) -> None:
    """Before patching they are the reason in the report, after it calls are the original's."""
    model, x = (trained(nn.Sequential(Named())), torch.randn(3, 8)) if name == "perceptron" else MODELS[name][0]()
    quantised, (fast, plain) = copy.deepcopy(model), twins(model)
    for each in (quantised, fast, plain):
        quantise(each)
    report = i2v.patch(quantised)
    assert report.refused and all("a Coarse" in row.detail for row in report.refused)
    with torch.no_grad():
        for each in (quantised, fast):
            torch.testing.assert_close(output(each, x), output(plain, x), rtol=1e-4, atol=1e-4)


# PEFT and accelerate -------------------------------------------------------------------------------------------------------


def lora(model: nn.Module, targets: list[str], **options: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False, r=2, **options))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["perceptron", "aim blocks", "timesformer divided"])
def test_peft_on_a_patched_model(name: str, options: dict[str, Any]) -> None:
    model, x = (trained(nn.Sequential(Named())), torch.randn(3, 8)) if name == "perceptron" else MODELS[name][0]()
    targets = {"perceptron": ["fc1", "fc2"], "aim blocks": ["D_fc1", "D_fc2", "c_fc"]}.get(
        name, ["dense", "qkv", "temporal_dense"]
    )
    fast, plain = twins(model)
    before = output(plain, x).detach()
    fast, plain = lora(fast, targets, **options), lora(plain, targets, **options)
    torch.testing.assert_close(output(fast, x), output(plain, x), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(output(plain, x), before, atol=1e-3)
    for step in ("merge_adapter", "unmerge_adapter"):
        for each in (fast, plain):
            getattr(each, step)()
        torch.testing.assert_close(output(fast, x), output(plain, x), rtol=1e-3, atol=1e-3)
    fast, plain = fast.merge_and_unload(), plain.merge_and_unload()
    torch.testing.assert_close(output(fast, x), output(plain, x), rtol=1e-3, atol=1e-3)


def test_ia3_and_other_peft_on_a_patched_model() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    fast, plain = twins(trained(nn.Sequential(Named())))
    x, found = torch.randn(3, 8), []
    for each in (fast, plain):
        config = peft.IA3Config(target_modules=["fc1", "fc2"], feedforward_modules=["fc2"], init_ia3_weights=False)
        torch.manual_seed(2)
        found.append(output(peft.get_peft_model(each, config), x))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "more than LoRA"),
        ({"lora_bias": True}, "biases"),
        ({"merged": True}, "merged"),
        ({"half": True}, "its base is torch.bfloat16"),
    ],
)
def test_lora_of_other_kinds_is_not_reported_as_replaced(options: dict[str, bool], reason: str) -> None:
    merged, half = options.pop("merged", False), options.pop("half", False)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = lora(model.bfloat16() if half else model, ["0"], **options)
    if merged:
        model.merge_adapter()
    rows = [row for row in i2v.patch(model) if row.kind == "Linear"]
    assert rows and not any(row.replaced for row in rows) and all(reason in row.detail for row in rows), rows


@pytest.mark.parametrize("before", [False, True])
def test_offloading(before: bool) -> None:
    """accelerate's: weights come from elsewhere when a layer is called, by a forward on the instance."""
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model, x = nn.Sequential(Named(), AIMAdapter(8)), torch.randn(3, 8)
    expected = trained(model)(x)
    if before:
        accelerate.cpu_offload(model, execution_device="cpu")
        i2v.patch(model)
    else:
        assert len(i2v.patch(model).replaced) == 2
        accelerate.cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        accelerate.hooks.remove_hook_from_submodules(model)
        torch.testing.assert_close(model(x), expected)
    assert before or all(is_patched(part) for part in model)


# Reports and undoing -------------------------------------------------------------------------------------------------------


def test_an_error_leaves_nothing_half_done() -> None:
    class Strange(nn.Module):
        @property
        def skip_connect(self) -> bool:
            raise RuntimeError("strange")

        def __init__(self) -> None:
            super().__init__()
            self.D_fc1, self.act, self.D_fc2 = nn.Linear(4, 2), nn.GELU(), nn.Linear(2, 4)

    model = nn.Sequential(Named(), Strange(), Named())
    with pytest.raises(RuntimeError, match="strange"):
        i2v.patch(model)
    assert not any(is_patched(part) for part in model)


class Hiding(nn.Module):
    """As EVL keeps a frozen backbone, so that it is not among its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.others, self.head = [Named()], {"one": Named(), "two": (Named(),)}, Named()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.others["one"](self.backbone[0](x)))


def test_modules_in_plain_lists() -> None:
    model, x = Hiding(), torch.randn(3, 8)
    expected = model(x)
    with i2v.patched(model, exclude="others.*"):
        assert is_patched(model.backbone[0]) and not is_patched(model.others["one"])
    assert not is_patched(model.backbone[0])
    names = {row.name for row in i2v.patch(model).replaced}
    assert names == {"head", "backbone.0", "others.one", "others.two.0"}
    torch.testing.assert_close(model(x), expected)
    i2v.unpatch(model)
    assert torch.equal(model(x), expected) and not is_patched(model.others["two"][0])


def test_unpatch_beneath_a_wrapper() -> None:
    model, x = nn.Sequential(Named(), Named()), torch.randn(3, 8)
    expected = 2 * model(x)
    i2v.patch(model)
    ours = model[1].forward
    model[1].forward = lambda x: 2 * ours(x)
    with pytest.warns(UserWarning, match=r"other code has wrapped the forward of 1 since patch"):
        i2v.unpatch(model)
    assert torch.equal(model(x), expected)  # to the bit: the wrapper calls the class's own
    assert not any(is_patched(part) for part in model)
    assert "replaced by other code" in i2v.patch(model, dry_run=True).refused[0].detail
    model[1].forward = ours  # the wrapper is taken off, and what was beneath it comes back
    assert not is_patched(model[1]) and torch.equal(2 * model(x), expected)
    assert i2v.patch(model).replaced and is_patched(model[1])
    i2v.unpatch(model)
    assert "forward" not in vars(model[1])


class SwinAdapter(nn.Module):
    """AIM's for Swin: no flag says whether it adds its input; with ``act=False`` the one over frames."""

    def __init__(self, channels: int, residual: bool, act: bool = True) -> None:
        super().__init__()
        if act:
            self.act = nn.GELU()
        self.D_fc1, self.D_fc2 = nn.Linear(channels, channels // 4), nn.Linear(channels // 4, channels)


class Added(SwinAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.D_fc2(self.act(self.D_fc1(x)))


class Alone(SwinAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return self.D_fc2(self.act(self.D_fc1(x)) if hasattr(self, "act") else self.D_fc1(x))


class Halved(SwinAdapter):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + self.D_fc2(self.act(self.D_fc1(x)))


def test_adapters_of_aims_swin() -> None:
    torch.manual_seed(0)
    model, x = (
        trained(nn.Sequential(Added(8, True), Alone(8, False), Alone(8, False, act=False), Halved(8, True))),
        torch.randn(3, 8),
    )
    plain = copy.deepcopy(model)
    report = i2v.patch(model)
    assert [row.replaced for row in report] == [True, True, True, False] and "other outputs" in report.refused[0].detail
    agree(model, plain, x)


class CrossAttention(nn.Module):
    """EVL's over frames, which makes its output on a GPU."""

    def __init__(self, spatial_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.spatial_size, self.w1 = spatial_size, nn.Parameter(torch.zeros(9, channels))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.zeros([*q.shape[:3], self.w1.shape[-1]], device="cuda") + (q @ k.mT).mean()


def test_evls_decoder_with_cross_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU it is replaced too; it runs where its cross attention does."""
    torch.manual_seed(0)
    decoder = EVLDecoder(48, 3, 4, 2)
    decoder.enable_temporal_cross_attention = True
    decoder.cross_attention = nn.ModuleList(CrossAttention((2, 2), 48) for _ in range(2))
    assert i2v.patch(decoder).rows[0].replaced, i2v.patch(decoder)
    monkeypatch.setattr(CrossAttention, "forward", lambda self, q, k: (q + k).flatten(3))
    features = [
        {"out": torch.randn(2, 4, 5, 48), "q": torch.randn(2, 4, 5, 3, 16), "k": torch.randn(2, 4, 5, 3, 16)} for _ in range(2)
    ]
    with torch.no_grad():
        got = decoder(copy.deepcopy(features))
        torch.testing.assert_close(got, type(decoder).forward(i2v.unpatch(decoder), copy.deepcopy(features)))


def test_attributes_that_a_forward_leaves_behind_are_a_reason() -> None:
    class Remembering(AIMAdapter):
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last

    assert "other attributes" in i2v.patch(trained(Remembering(8))).rows[0].detail


def test_sharding_after_patching(tmp_path: Path) -> None:
    """Of a layer that is passed over, of all, and its columns and rows on several devices."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    x = torch.randn(3, 8)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for shard in (lambda m: torch.distributed.fsdp.fully_shard(m[0].fc1), torch.distributed.fsdp.fully_shard):
            fast, plain = twins(trained(nn.Sequential(Named(), AIMAdapter(8))))
            shard(fast)
            torch.testing.assert_close(fast(x), plain(x))
            fast(x).sum().backward()
        fast, plain = twins(trained(nn.Sequential(Named())))
        parallelize_module(fast[0], init_device_mesh("cpu", (1,)), {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
        torch.testing.assert_close(fast(x), plain(x))
    finally:
        torch.distributed.destroy_process_group()


def test_arguments_by_name_and_weights_from_elsewhere() -> None:
    conv, plain = twins(nn.Conv3d(4, 4, (3, 1, 1), padding="same", groups=4))
    video = torch.randn(2, 4, 5, 2, 2)
    torch.testing.assert_close(conv(input=video), plain(input=video))
    several, x = [trained(Named()) for _ in range(3)], torch.randn(3, 8)
    base = copy.deepcopy(several[0])
    i2v.patch(base)
    weights, _ = torch.func.stack_module_state(several)
    found = torch.func.vmap(lambda w: torch.func.functional_call(base, w, (x,)))(weights)
    torch.testing.assert_close(found, torch.stack([module(x) for module in several]))


# What becomes of a patched model -------------------------------------------------------------------------------------------


def shared(model: nn.Module) -> nn.Module:
    return nn.Sequential(model, model)


def checkpointed(model: nn.Module) -> nn.Module:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=False)

    return Checkpointed()


def assigned(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()}, assign=True)
    return model


def compiled_part(model: Any) -> nn.Module:
    model[0].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "become",
    [shared, checkpointed, assigned, compiled_part, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), nn.Module.double],
    ids=["shared", "checkpointed", "assigned", "compiled", "copied", "pickled", "double"],
)
def test_what_becomes_of_a_patched_model(become: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    fast, plain = twins(trained(nn.Sequential(Named(), AIMAdapter(8))))
    fast, plain = become(fast), become(plain)
    agree(fast, plain, torch.randn(3, 8).to(next(plain.parameters()).dtype))
