"""The reader of machine code and the model of a multiprocessor, on code that is written out here."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from . import aot, cache, machine_code, rounds, sass, sm
from .sass import Instruction

LISTING = """
        /*0000*/                   LDC.64 R8, c[0x0][0x238] ;          /* 0x00008e00ff087b82 */
                                                                       /* 0x000e620000000a00 */
        /*0010*/               @P0 LDG.E.128 R32, desc[UR6][R20.64] ;  /* 0x0000000614200981 */
                                                                       /* 0x0000a2000c1e1d00 */
        /*0020*/                   STS.128 [R96+UR4], R32 ;            /* 0x0000002060007988 */
                                                                       /* 0x0001e20008000c04 */
        /*0030*/              @P1 BRA 0x10 ;                           /* 0x0000000400b8d947 */
                                                                       /* 0x00efea0003800000 */
        /*0040*/                   HFMA2.MMA R0, -RZ, RZ, 0, 0 ;       /* 0x00000000ff007435 */
                                                                       /* 0x000fe200000001ff */
        /*0050*/                   HMMA.16816.F32.BF16 R8, R8, R6, R20 ;  /* 0x000000060808723c */
                                                                       /* 0x001fec0000041814 */
        /*0060*/                   EXIT ;                              /* 0x000000000000794d */
                                                                       /* 0x000fea0003800000 */
        /*0070*/                   BRA 0x70;                           /* 0xfffffffc00fc7947 */
                                                                       /* 0x000fc0000383ffff */
"""


def instruction(name, operands="", stall=1, write=7, read=7, waits=(), target=-1, guarded=False):
    mask = sum(1 << board for board in waits)
    return Instruction(name, operands, guarded, target, stall | write << 5 | read << 8 | mask << 11)


EXIT = instruction("EXIT")


def branch(target, guarded=True):
    return instruction("BRA", target=target, guarded=guarded)


def test_control_codes():
    code = sass.parse_sass(LISTING)
    assert [x.base for x in code] == ["LDC", "LDG", "STS", "BRA", "HFMA2", "HMMA", "EXIT", "BRA"]
    assert [x.stall for x in code] == [1, 1, 1, 5, 1, 6, 5, 0]
    assert [x.write_barrier for x in code[:2]] == [1, 2] and code[4].write_barrier == 7
    assert [x.read_barrier for x in code[:4]] == [7, 0, 0, 7]
    assert [x.waits for x in code[2:6]] == [0, 0b001110, 0, 0b000001]
    assert [x.target for x in code] == [-1, -1, -1, 1, -1, -1, -1, 7]
    assert [x.guarded for x in code[:4]] == [False, True, False, True]


def test_facts():
    found = sass.facts(sass.parse_sass(LISTING))
    assert found["instructions"] == 7  # without the padding behind the end
    assert (found["matrix instructions"], found["vector loads"], found["loops"]) == (1, 1, 1)  # not HFMA2.MMA


@pytest.mark.parametrize(
    "name, size",
    [
        ("LDG.E.128.CONSTANT", 16), ("LDGSTS.E.BYPASS.LTC128B.64", 8), ("LDG.E", 4), ("LDG.E.U16", 2), ("STG.E.U8", 1),
        ("global_load_dwordx4", 16), ("buffer_load_dword", 4), ("global_load_ushort", 2), ("global_load_short_d16_hi", 2),
    ],
)  # fmt: skip
def test_widths(name, size):
    assert sass.width(instruction(name)) == size


def test_amd():
    begin = "kernel:\n\ts_load_dword s0, s[2:3], 0x0 ; 4 bytes\n.LBB0_1:\n\tglobal_load_dwordx4 v[0:3], v4, s[0:1]\n"
    end = "\tv_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], 0\n\ts_cbranch_scc1 .LBB0_1\n\ts_endpgm\n\ts_nop 0\n"
    code = sass.parse_gcn(f"{begin}\ts_barrier\n{end}")
    assert sass.loops(code) == [4] and len(sass.walk(code, (3,))) == 2 + 3 * 4
    found = sass.facts(code)
    assert (found["instructions"], found["barriers"], found["vector loads"], found["matrix instructions"]) == (6, 1, 1, 1)


def test_loops_are_counted():
    inner, outer = branch(1), branch(0)
    code = [instruction("NOP"), instruction("FADD"), inner, outer, EXIT]
    path = sass.walk(code, (3, 2))
    assert path == [0, 1, 2, 1, 2, 1, 2, 3] * 2 + [4]
    with pytest.raises(ValueError, match="1 counts for 2 loops"):
        sass.walk(code, (3,))


def test_a_program_may_end_in_a_loop():
    code = [instruction("FADD"), instruction("EXIT", guarded=True), branch(0, guarded=False)]
    assert sass.walk(code, (2,)) == [0, 1, 2, 0, 1]


def test_a_branch_over_a_loop_is_taken_if_it_does_not_run():
    code = [branch(3), instruction("FADD"), branch(1), EXIT]
    assert sass.walk(code, (2,)) == [0, 1, 2, 1, 2, 3]
    assert sass.walk(code, (0,)) == [0, 3]


def test_counts_come_from_the_launch_or_from_the_kernels_name():
    def launch(name="unknown_kernel", loops=(), **values):
        kernel = SimpleNamespace(fn=SimpleNamespace(__name__=name))
        return SimpleNamespace(kernel=kernel, args=values, constexprs={}, loops=loops)

    code = [instruction("FADD"), branch(0), instruction("FADD"), branch(2), EXIT]
    assert rounds.counts(launch(loops=(3, 2)), code) == (3, 2)
    assert rounds.counts(launch(loops=(0,)), code) == (0, 0)  # none of them, however many there are
    assert rounds.counts(launch(loops=(3,)), code) is None and rounds.counts(launch(), code) is None
    assert rounds.counts(launch("bottleneck_adapter_kernel", C=768, BC=64, norm=None), code) == (12, 12)
    assert rounds.counts(launch("bottleneck_adapter_kernel", C=768, BC=64, norm=1), code) is None
    assert rounds.counts(launch(), [EXIT]) == () == rounds.counts(launch(loops=(8,)), [EXIT])  # one that was unrolled


def test_a_rest_that_copies_a_few_rows_is_left_out():
    store, load, end = instruction("STG.E"), instruction("LDG.E"), instruction("EXIT", guarded=True)
    assert sass.walk([load, store, end, load, store, EXIT], ()) == [0, 1, 2]
    assert sass.walk([load, end, store, EXIT], ()) == [0, 1, 2, 3]


def passed(code, warps, resident, programs, needed=0.0, memory=None):
    return sm.run(sm.steps(code, range(len(code)), needed / warps), warps, resident, programs, memory)


def test_a_warp_stalls_as_it_is_told():
    code = [instruction("FADD", stall=4)] * 100 + [EXIT]
    assert passed(code, 1, 1, 1).cycles == passed(code, 4, 1, 1).cycles == 400


def test_a_scheduler_issues_one_instruction_a_cycle():
    code = [instruction("FADD", stall=4)] * 100 + [EXIT]
    assert passed(code, 32, 1, 1).cycles == pytest.approx(8 * 100, abs=20)
    integers = [instruction("LOP3", stall=4)] * 100 + [EXIT]  # half as many lanes
    assert passed(integers, 32, 1, 1).cycles == pytest.approx(16 * 100, abs=20)


def test_a_load_is_waited_for_where_it_is_used():
    load, use = instruction("LDG.E.128", write=3, stall=2), instruction("FADD", waits=(3,), stall=4)
    work = [instruction("FADD", stall=4)] * 100
    at_once, later = [load, use, *work, EXIT], [load, *work, use, EXIT]
    assert passed(at_once, 1, 1, 1, 512).cycles == 4 + sm.LATENCY + 404
    assert passed(later, 1, 1, 1, 512).cycles == 4 + sm.LATENCY + 4
    assert passed(at_once, 1, 1, 1, 0).cycles == 4 + sm.CACHED["load"] + 404


def test_memory_limits_the_throughput():
    code = [instruction("LDG.E.128", write=0, stall=2), instruction("FADD", waits=(0,)), EXIT]
    bound, free = (passed(code, 4, 16, 160, 2048, memory).steady for memory in (13.0, None))
    assert bound == pytest.approx(2048 / 13, rel=0.02)
    assert free < bound / 1.5


def test_a_barrier_waits_for_the_last_warp():
    code = [instruction("I2F", stall=1), instruction("BAR.SYNC"), EXIT]  # conversions: one after the other
    assert passed(code, 8, 1, 1).cycles == sm.SLOW + 1 + sm.BARRIER + 1  # two warps of a scheduler end


def test_asynchronous_copies_are_waited_for_by_group():
    copy, group = instruction("LDGSTS.E.BYPASS.128"), instruction("LDGDEPBAR", write=0)
    all_but_one, all_of_them = (instruction("DEPBAR.LE", f"SB0, 0x{n}", stall=4) for n in (1, 0))
    work = [instruction("FADD", stall=4)] * 200
    waits = [passed([copy, group, *work, copy, group, wait, EXIT], 1, 1, 1, 1024).cycles for wait in (all_but_one, all_of_them)]
    assert waits[0] < sm.LATENCY + 100 and waits[1] - waits[0] == pytest.approx(800, abs=80)


@pytest.mark.parametrize(
    "registers, threads, shared, programs", [(111, 64, 1024, 8), (69, 64, 1024, 14), (32, 128, 0, 16), (161, 256, 106496, 1)]
)
def test_resident_programs(registers, threads, shared, programs):
    assert aot.resident({"registers": registers, "shared": shared}, threads, "sm_90") == programs


def test_what_is_kept_is_found_again_and_damage_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("I2V_KERNELS_CACHE", str(tmp_path / "some" / "where"))
    assert cache.load("kind", "key") is None
    cache.store("kind", "key", {"a": [1, 2]})
    assert cache.load("kind", "key") == {"a": [1, 2]}
    path = cache.folder("kind") / "key"
    assert [file.name for file in path.parent.iterdir()] == ["key"] and path.is_relative_to(tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    assert cache.load("kind", "key") is None


def test_changes_are_told():
    old = {"a": {"barriers": 18, "registers": 111}, "b": {"barriers": 1}, "c": {"barriers": 2}}
    new = {"a": {"barriers": 3, "registers": 111, "headroom": 2.4}, "b": {"barriers": 1}, "d": {"barriers": 0}}
    assert list(machine_code.changes(old, new)) == ["a: barriers 18 -> 3", "d: new", "c: gone"]


def test_a_kernel_in_no_table_is_found(tmp_path, monkeypatch):
    (tmp_path / "some_op").mkdir()
    kernels = (("jit", "lost_kernel"), ("jit(do_not_specialize=['n'])", "other_kernel"), ("jit", "helper"))
    source = "\n".join(f"@triton.{how}\ndef {name}(x):\n    pass\n" for how, name in kernels)
    (tmp_path / "some_op" / "triton_kernels.py").write_text(source)
    monkeypatch.setattr(aot, "_folder", lambda: tmp_path)
    monkeypatch.setattr(aot, "entries", list)
    assert aot.unlisted() == [f"some_op/triton_kernels.py: {name}_kernel" for name in ("lost", "other")]


@pytest.mark.slow
def test_a_kernel_is_compiled_once(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("nothing is compiled")
    monkeypatch.setenv("I2V_KERNELS_CACHE", str(tmp_path))
    job = next(job for job in aot.jobs(["token_shift"], ["sm_90"]) if "all sizes 1" in aot.name(job))
    ((_, launch, first),) = aot.read([job], processes=1)
    assert first.code[-1].base == "EXIT" and first.facts["instructions"] == len(first.code)
    monkeypatch.setattr(aot, "make", None)
    ((_, _, second),) = aot.read([job], processes=1)
    assert second == first
    path = cache.folder("aot") / aot.key_of(launch, job.target)
    path.write_bytes(b"")
    with pytest.raises(TypeError):  # it would be made again
        list(aot.read([job], processes=1))
