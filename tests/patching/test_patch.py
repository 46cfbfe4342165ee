"""What ``patch`` promises: reversible, per instance, honest about what it leaves alone."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from architectures import OtherShift, aim_adapters, conv_adapters, peft_lora, timesformer, tsm
from published import OpenVCLIPAttention, QuickGELU, TemporalShift
from torch import Tensor, nn

import i2v_kernels as i2v
from bench import memory
from i2v_kernels.patching import is_patched


def depthwise(**options: object) -> nn.Conv3d:
    return nn.Conv3d(8, 8, **{"kernel_size": (3, 1, 1), "padding": (1, 0, 0), "groups": 8, **options})  # type: ignore[arg-type]


def test_only_forward_changes() -> None:
    model, _ = timesformer()
    model.encoder.layer[0].requires_grad_(False)
    model.encoder.layer[1].train()
    model.encoder.layer[0].register_forward_hook(lambda *args: None)

    def state() -> object:
        return (
            [(name, id(m), type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()],
            [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
            list(model.state_dict()),
        )

    before = state()
    i2v.patch(model)
    assert state() == before
    i2v.unpatch(model)
    assert state() == before


def test_only_this_instance_changes() -> None:
    first, _ = timesformer()
    second, _ = timesformer()
    i2v.patch(first)
    assert not any(is_patched(module) for module in second.modules())


def test_twice_is_once() -> None:
    model, x = tsm()
    first, out = i2v.patch(model), model(x)
    second = i2v.patch(model)
    assert len(second.replaced) == len(first.replaced)
    assert all(row.detail.endswith("(already)") for row in second.replaced)
    assert torch.equal(model(x), out)
    i2v.unpatch(model)
    assert not any(is_patched(module) for module in model.modules())


def test_dry_run_changes_nothing() -> None:
    model, _ = tsm()
    report = i2v.patch(model, dry_run=True)
    assert len(report.replaced) == 2 and "would be replaced" in str(report)
    assert not any(is_patched(module) for module in model.modules())


def test_context() -> None:
    model, _ = conv_adapters()
    i2v.patch(model, include="0")
    with pytest.raises(RuntimeError, match="within"), i2v.patched(model) as report:
        assert len(report.replaced) == 6 and is_patched(model[3])
        raise RuntimeError("within")
    assert is_patched(model[0]) and not is_patched(model[3])


def test_include_and_exclude() -> None:
    model, _ = conv_adapters()
    rows = {row.name: row for row in i2v.patch(model, include=["[0-2]", "4"], exclude=["1"])}
    assert [name for name, row in rows.items() if row.replaced] == ["0", "2", "4"]
    assert rows["1"].detail == "excluded" and rows["3"].detail == "not included"
    assert not i2v.patch(model, exclude=nn.Conv3d, dry_run=True).replaced
    assert len(i2v.patch(model, include="Conv3d", dry_run=True).replaced) == 6


def test_bad_arguments() -> None:
    model, _ = tsm()
    with pytest.raises(TypeError, match="model is a str"):
        i2v.patch("model")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is a int"):
        i2v.unpatch(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"include='enocder\.\*' matches no module"):
        i2v.patch(model, include="enocder.*")
    with pytest.raises(TypeError, match="exclude has 3"):
        i2v.patch(model, exclude=[3])  # type: ignore[list-item]
    assert not any(is_patched(module) for module in model.modules())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (depthwise(stride=(2, 1, 1)), "stride is (2, 1, 1)"),
        (depthwise(padding=0), "does not keep the size"),
        (depthwise(padding_mode="circular"), "circular"),
        (depthwise(groups=4), "grouped, not depthwise"),
        (depthwise(kernel_size=(2, 1, 1), padding=0), "kernel (2, 1, 1)"),
        (depthwise(dilation=(1, 2, 1)), "not over time alone"),
        (nn.Conv2d(3, 8, 4, 4, padding=1), "padding=(1, 1)"),
        (nn.Conv2d(3, 9, 4, 4, groups=3), "groups=3"),
        (OtherShift(nn.Conv2d(8, 8, 1), 4), "a trial gave other outputs"),
        (TemporalShift(nn.Conv2d(8, 8, 1), 4, inplace=True), "in place"),
        (nn.Sequential(nn.Linear(4, 8), QuickGELU(), nn.Bilinear(8, 8, 4)), "a Bilinear"),
        (OpenVCLIPAttention(8, 2, 4, "channel_shift"), "mixed up"),
        (OpenVCLIPAttention(8, 2, 4, "expand_temporal_view_step9"), "its temporal_shift is 'expand_temporal_view_step9'"),
        (nn.utils.parametrizations.weight_norm(depthwise()), None),
        (depthwise().to("meta"), "meta device"),
    ],
)
def test_refusals_have_reasons(module: nn.Module, reason: str | None) -> None:
    report = i2v.patch(module)
    assert not any(is_patched(part) for part in module.modules())
    if reason is not None:  # None: it is a class of its own, which no rule takes for what it was
        assert [reason in row.detail for row in report] == [True], report
        assert reason in str(report)


def test_a_forward_that_others_replaced_stays() -> None:
    module = depthwise()
    module.forward = lambda x: x  # type: ignore[method-assign]
    report = i2v.patch(module)
    assert "replaced by other code" in report.rows[0].detail
    i2v.unpatch(module)
    assert module(3) == 3


def test_copies_and_pickles() -> None:
    model, x = aim_adapters()
    i2v.patch(model)
    twin = copy.deepcopy(model)
    assert is_patched(twin[0])
    with torch.no_grad():
        twin[0].D_fc2.weight.zero_()
        twin[0].D_fc2.bias.zero_()
    assert torch.equal(twin[0](x), x) and not torch.equal(model[0](x), x)  # bound to itself
    loaded = pickle.loads(pickle.dumps(model))  # as the class's own: needs no i2v_kernels to load
    assert not any(is_patched(module) for module in loaded.modules())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    torch.testing.assert_close(loaded(x), model(x))
    assert len(i2v.patch(loaded).replaced) == 2


def test_replicas_of_data_parallel_run_their_own_weights() -> None:
    """``nn.DataParallel`` makes a replica on every device so, and gives it weights that lie there."""
    module, x = depthwise(), torch.randn(1, 8, 4, 2, 2)
    i2v.patch(module)
    replica = module._replicate_for_data_parallel()
    replica.weight, replica.bias = torch.zeros_like(module.weight), torch.ones(8, requires_grad=True)
    assert is_patched(replica) and torch.equal(replica(x), torch.ones_like(x)) and not torch.equal(module(x), replica(x))
    i2v.unpatch(module)
    assert not {"forward", "_replicate_for_data_parallel"} & vars(module).keys()


def test_hooks_are_called_as_before() -> None:
    model, x = timesformer()

    def calls() -> list[str]:
        seen: list[str] = []
        handles = [
            module.register_forward_hook(lambda *args, name=name: seen.append(name)) for name, module in model.named_modules()
        ]
        model(x)
        for handle in handles:
            handle.remove()
        return seen

    before = calls()
    i2v.patch(model)
    assert calls() == before  # modules that would not be called, with hooks, send the call to the original


def test_a_trial_calls_no_hook_and_draws_no_number() -> None:
    model, _ = timesformer()
    seen: list[object] = []
    for module in model.modules():
        module.register_forward_hook(lambda *args: seen.append(args))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    i2v.patch(model)
    assert not seen and torch.equal(torch.rand(3), expected)


def test_attentions_on_request() -> None:
    model, x = timesformer(attn_implementation="eager")
    expected = model(x, output_attentions=True, output_hidden_states=True)
    i2v.patch(model)
    got = model(x, output_attentions=True, output_hidden_states=True)
    for name in ("attentions", "hidden_states"):
        for a, b in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("option", ["attention_probs_dropout_prob", "hidden_dropout_prob", "drop_path_rate"])
def test_dropout_in_training_is_the_same(option: str) -> None:
    model, x = timesformer(**({} if option == "drop_path_rate" else {option: 0.3}))  # its config takes no such number
    if option == "drop_path_rate":
        from transformers.models.timesformer.modeling_timesformer import TimesformerDropPath

        for layer in model.encoder.layer:
            layer.drop_path = TimesformerDropPath(0.3)
    model.train()

    def step() -> Tensor:
        torch.manual_seed(3)
        return model(x).last_hidden_state

    expected = step()
    i2v.patch(model)
    torch.testing.assert_close(step(), expected)


def test_gradient_checkpointing() -> None:
    model, x = timesformer()
    model.train()
    i2v.patch(model)
    model(x).last_hidden_state.square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(x).last_hidden_state.square().mean().backward()
    for p, grad in zip((p for p in model.parameters() if p.grad is not None), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize("frozen", [False, True])
def test_perceptrons_keep_less(frozen: bool) -> None:
    """For backward, than PyTorch's, with learning weights and, as adapters have them, with frozen ones."""

    def kept(module: nn.Module, x: Tensor) -> int:
        sizes = {}

        def keep(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter) and tensor._base is None:
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = module(x)
        grads.append(torch.autograd.grad(out.square().sum(), [x, *(p for p in module.parameters() if p.requires_grad)]))
        return sum(sizes.values())

    for activation in (nn.GELU(), QuickGELU()):
        module = nn.Sequential(nn.Linear(8, 32), activation, nn.Linear(32, 8)).requires_grad_(not frozen)
        x = torch.randn(5, 8, requires_grad=True)
        grads: list[tuple[Tensor, ...]] = []
        plain, hidden = kept(module, x), 5 * 32
        i2v.patch(module)
        less = kept(module, x)
        assert less == hidden + (0 if frozen else 5 * 8)
        assert less < plain or (less == plain and frozen and isinstance(activation, nn.GELU))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", [nn.GELU(), QuickGELU()], ids=["gelu", "quick"])
def test_perceptrons_need_one_hidden_tensor_without_gradients(activation: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(8, 4096), activation, nn.Linear(4096, 8))
    x, hidden = torch.randn(64, 8), 64 * 4096 * 4 / memory.MIB
    with torch.no_grad():
        plain, out = memory.peak(lambda: module(x), "cpu"), module(x)
        i2v.patch(module)
        assert memory.peak(lambda: module(x), "cpu") < 1.1 * hidden < 2 * hidden <= plain
        torch.testing.assert_close(module(x), out)


@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention(batch_first: bool) -> None:
    """With the masks that it takes; other calls run PyTorch's own."""
    plain = nn.MultiheadAttention(12, 3, batch_first=batch_first)
    nn.init.normal_(plain.in_proj_bias)
    fast = copy.deepcopy(plain)
    assert i2v.patch(fast).replaced
    x, other = torch.randn(2, 5, 7, 12, requires_grad=True)
    length = 7 if batch_first else 5
    hidden = torch.ones(length, length).triu(1).bool()
    for mask in (None, torch.randn(length, length), hidden):
        results = []
        for module in (plain, fast):
            out, weights = module(x, x, x, need_weights=False, attn_mask=mask)
            assert weights is None
            results.append((out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])))
        assert results[0][0].stride() != results[1][0].stride() or not batch_first  # PyTorch's comes transposed
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    padding = torch.zeros(5 if batch_first else 7, length, dtype=torch.bool)
    padding[:, -1] = True
    own = (x, x, x)
    for args, options in ((own, {}), ((x, other, other), {"need_weights": False}), (own, {"key_padding_mask": padding})):
        for a, b in zip(plain(*args, **options), fast(*args, **options), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_lora_settings() -> None:
    model, x = peft_lora()
    i2v.patch(model)
    expected = copy.deepcopy(i2v.unpatch(copy.deepcopy(model)))
    torch.testing.assert_close(model(x), expected(x))
    with model.disable_adapter(), expected.disable_adapter():
        assert torch.equal(model(x), expected(x))
    model.merge_adapter()
    expected.merge_adapter()
    assert torch.equal(model(x), expected(x))


def test_within_wrappers(tmp_path: Path) -> None:
    model, x = conv_adapters()
    expected = model(x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        assert len(i2v.patch(wrapped).replaced) == 6
        wrapped(x).square().mean().backward()
        for patched_before in (False, True):
            sharded = copy.deepcopy(model)
            if patched_before:
                i2v.patch(sharded)
            for part in sharded:
                torch.distributed.fsdp.fully_shard(part)
            torch.distributed.fsdp.fully_shard(sharded)
            assert len(i2v.patch(sharded).replaced) == 6
            torch.testing.assert_close(sharded(x), expected)
            sharded(x).square().mean().backward()
        look_alike = torch.distributed.fsdp.fully_shard(TemporalShift(nn.Conv2d(8, 8, 1), 4))
        assert "its weights are sharded" in i2v.patch(look_alike).rows[0].detail
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_module_runs_what_it_is_now() -> None:
    module, x, graphs = depthwise(), torch.randn(1, 8, 4, 2, 2), []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(str(graph.code))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend)
    expected = compiled(x)
    i2v.patch(compiled)
    torch.testing.assert_close(compiled(x), expected)
    assert ["i2v_kernels.temporal_conv" in code for code in graphs] == [False, True]
    i2v.unpatch(compiled)
    assert torch.equal(compiled(x), expected)


def test_report_reads_well() -> None:
    model, _ = timesformer()
    text = str(i2v.patch(model, exclude="*attention*"))
    attention = "TimesformerSelfAttention x 2"
    assert text.split("\n") == [
        "i2v_kernels.patch: 3 replaced, 4 left as they are",
        f"  {'embeddings.patch_embeddings.projection':<48}  {'Conv2d':<28}  -> one matrix product",
        f"  {'encoder.layer.{0-1}':<48}  {'TimesformerLayer x 2':<28}  -> temporal_attention, frames read as they lie",
        f"  {'encoder.layer.{0-1}.attention.attention':<48}  {attention}  -- excluded",
        f"  {'encoder.layer.{0-1}.temporal_attention.attention':<48}  {attention}  -- excluded",
    ]
    assert "nothing in this model" in str(i2v.patch(nn.Linear(2, 2)))
