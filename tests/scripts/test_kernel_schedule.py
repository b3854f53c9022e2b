"""scripts/kernel_schedule.py: schedules are read, their scalar code is run, and what runs is counted."""

import json
import subprocess
import sys
from pathlib import Path

import kernel_schedule
import numpy as np
import pytest
import targets
from schedules import sass
from schedules.bundles import Program, ScheduleError, parse, parse_slots
from schedules.counting import Run, kinds_of
from schedules.scalar_core import ScalarCore

pytestmark = pytest.mark.once

KERNEL = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = smov [#allocation2] /* of the lengths */  ;;  %s2_s1 = inlined_call_operand.vmem [shape: s32[4], index: 0, kind: input, shape index: {}] }
   0x1   :  { %s3_s1 = sshll.u32 %s2_s1, 4  ;;  %s4_s1 = int_to_ptr.vmem [resolvable:$true] %s3_s1 }
   0x2   :  { %5 = dma.vmem_to_smem /*vmem=*/%s4_s1, /*size_in_granules=*/16, /*smem=*/%s1_s0, /*dst_syncflagno=*/[#allocation1]  ;;  %s6_s2 = smov 0 }
   0x3 LB: > { %s9_s3 = sld [smem:[#allocation2 + %s8_s2]]  ;;  %s8_s2 = sphi %s6_s2, %s40_s2 /* phi copy */ } /* Start region 1 */
   0x4   : > { %s40_s2 = sadd.s32 1, %s8_s2  ;;  %s10_s4 = smov 4294967295 }
   0x5   :  {}
   0x6   : > { %p11_p0 = scmp.le.s32.totalorder %s9_s3, 0  ;;  %v70_v0 = vlaneseq }
   0x7   : > { %12 = sbr.rel (%p11_p0) target bundleno = 25 (0x19), region = 9 }
   0x8   : > { %s13_s4 = smov (!%p11_p0), 0 }
   0x9   :  {}
   0xa   :  {}
   0xb   :  {}
   0xc LB: >> { %s16_s5 = sand.u32 1, %s15_s4  ;;  %s15_s4 = sphi %s13_s4, %s20_s4 }
   0xd   : >> { %s20_s4 = sadd.s32 1, %s15_s4  ;;  %s17_s6 = sshll.u32 %s15_s4, 8 }
   0xe   : >> { %s18_s6 = scalar_lea.hbm [#allocation5], %s17_s6 }
   0xf   : >> { %19 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s18_s6, /*size_in_granules=*/1024, /*vmem=*/%s17_s6, /*dst_syncflagno=*/[#allocation1 + $0x1] /*
base_bounds: (256, 1, 1)
strides: (1, 1, 1) */ }
  0x10   : >> { %p21_p1 = scmp.lt.s32.totalorder %s20_s4, %s9_s3  ;;  %p22_p2 = scmp.eq.s32.totalorder %s16_s5, 1 }
  0x11   : >> { %23 = sbr.rel (%p21_p1) target bundleno = 12 (0xc), region = 7  ;;  %30 = vmatmul.bf16.gmra.mxu0 %v70_v0 }
  0x12   : >> { %s60_s8 = smov (%p22_p2, %s16_s5), 7 }
  0x13   :  {}
  0x14   : >> { %v71_v1 = vadd.f32 %v70_v0, %v70_v0  ;;  %v72_v2 = vadd.f32 %v70_v0, %v70_v0 }
  0x15   :  {}
  0x16 PF: > { %41 = sst [smem:[#allocation6]] (%p11_p0), %s16_s5 }
  0x17   :  {}
  0x18   :  {}
  0x19 PF: > { %p42_p3 = scmp.ge.s32.totalorder %s40_s2, 4 }
  0x1a   : > { %43 = sbr.rel (!%p42_p3) target bundleno = 3 (0x3), region = 3 }
  0x1b   :  {}
  0x1c   :  {}
  0x1d   :  {}
  0x1e   :  {}
  0x1f   :  { %50 = vst [vmem:[#allocation9] sm:$0xff] %v71_v1 }
"""  # noqa: E501
TILE = 10  # bundles of the inner loop, with its branch's four delay slots
REST = 5 + 4 + 3 + 6  # of a head that isn't empty: before the loop with the branch's slots, and after it


def program(text=KERNEL):
    bundles = parse(text)
    return Program(bundles, ((0,) * 10,) * len(bundles), (1,) * 10)


def steps(lengths, text=KERNEL):
    return ScalarCore(program(text), {0: np.array(lengths)}).run()


def test_heads_take_the_tiles_that_they_hold():
    assert [sum(step.counts) for step in steps([2, 0, 5, 1])[:3]] == [2 * TILE + REST, REST - 3, 5 * TILE + REST]
    assert [step.copies for step in steps([2, 0, 5, 1])] == [2, 0, 5, 1]


def test_a_division_gives_quotient_and_remainder_in_turn():
    """Here of the lengths, by 7: as many tiles as the one, or the other, says."""
    length = "%s9_s3 = sld [smem:[#allocation2 + %s8_s2]]"
    divided = KERNEL.replace(length, length.replace("%s9_s3", "%s80_s9"))
    divided = divided.replace("0x4   : > {", "0x4   : > { %82 = sdivrem.u32 %s80_s9, 7  ;; ")
    quotient = divided.replace("0x5   :  {}", "0x5   : > { %s9_s3 = spop.drf %82 }")
    remainder = divided.replace("0x5   :  {}", "0x5   : > { %s84_s11 = spop.drf %82  ;;  %s9_s3 = spop.drf %82 }")
    assert [step.copies for step in steps([14, 6, 27, 8], quotient)] == [2, 0, 3, 1]
    assert [step.copies for step in steps([14, 6, 27, 8], remainder)] == [0, 6, 6, 1]


def test_what_runs_is_told_apart():
    kinds = kinds_of(program())
    assert [kinds[at] for at in (0x5, 0x6, 0x9, 0xE, 0xF, 0x10, 0x14)] == [
        *("empty", "vector", "empty"),
        *("copying", "copying", "scalar", "vector"),
    ]
    one, two = (steps([n] * 4)[1].counts for n in (1, 2))
    more = np.array(two) - one
    assert {kind: more[kinds == kind].sum() for kind in set(kinds)} == {
        "empty": 2,  # 0x13 and 0x15
        "copying": 3,
        "scalar": 3,
        "vector": 2,
    }


def test_a_head_in_the_middle_is_counted():
    run = Run(steps([3, 1, 3, 3]), kinds_of(program()), passes=4, rows=4, cores=1)
    counts, copies = run.row()
    assert (counts.sum(), copies) == (3 * TILE + REST, 3)
    with pytest.raises(ScheduleError, match="a grid of 9 steps on 2 cores ran 4 passes"):
        Run(steps([3, 1, 3, 3]), kinds_of(program()), passes=9, rows=4, cores=2)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("%s9_s3 = sld [smem:[#allocation2 + %s8_s2]]", "%s9_s3 = spop %v70_v0", "%p11_p0, which isn't known: spop"),
        ("sadd.s32 1, %s15_s4", "sfancy.s32 1, %s15_s4", "%p21_p1, which isn't known: sfancy.s32"),
        ("[thread:$0]  /*hbm", "[thread:$0]  (%p99_p9), /*hbm", "whether dma.hbm_to_vmem runs depends on %p99_p9"),
        ("index: 0, kind: input", "index: 3, kind: input", "not from a prefetched operand that was given"),
        (
            "  0x12   : >> { %s60_s8 =",
            "  0x12   : >> { %61 = sbr.rel target bundleno = 3  ;;  %s60_s8 =",
            "delay slots",
        ),
        ("0x1e   :", "0x2e   :", "bundle 0x2e follows on 0x1d"),
        ("%s15_s4 = sphi %s13_s4", "%s15_s4 = sphi %s13_s5", "from another register"),
        ("target bundleno = 12 (0xc)", "target bundleno = 22 (0x16)", None),
        ("target bundleno = 3 (0x3)", "target bundleno = 31 (0x1f)", None),
    ],
)
def test_what_cannot_be_followed_is_an_error(before, after, said):
    assert before in KERNEL
    text = KERNEL.replace(before, after)
    if said is None:  # another loop, or none, is the grid's
        with pytest.raises(ScheduleError):
            Run(steps([3] * 4, text), kinds_of(program(text)), passes=40, rows=4, cores=1)
        return
    with pytest.raises(ScheduleError, match=said.replace("(", r"\(")):
        steps([3] * 4, text)


def test_an_endless_loop_ends(monkeypatch):
    monkeypatch.setattr("schedules.scalar_core.MOST_CYCLES", 1000)
    with pytest.raises(ScheduleError, match="no end after 1,000 cycles"):
        steps([3] * 4, KERNEL.replace("sadd.s32 1, %s15_s4", "sadd.s32 0, %s15_s4"))


def test_the_table_of_slots():
    capacity, slots = parse_slots(
        "== CAPACITY:\nMXU, XLU\n  4 3 4 2 1 3 3 1 1 2\n== UTILIZATION:\n" + "0 1 2 0 0 0 0 0 0 1\n"
    )
    assert capacity == (4, 3, 4, 2, 1, 3, 3, 1, 1, 2)
    assert slots == [(0, 1, 2, 0, 0, 0, 0, 0, 0, 1)]
    with pytest.raises(ScheduleError, match="columns"):
        parse_slots("1 2 3\n")


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_2:
        /*0020*/                   HGMMA.64x8x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
        /*0030*/              @!P0 LOP3.LUT R5, R5, 0xf, RZ, 0xc0, !PT ;
        /*0040*/              @!UP1 BRA `(.L_x_3) ;
        /*0050*/                   HGMMA.64x8x16.F32.BF16 R24, R8, gdesc[UR4], R24, gsb0 ;
        /*0060*/               @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0070*/               @P2 BRA `(.L_x_1) ;
.L_x_4:
        /*0080*/                   BRA `(.L_x_4);
"""


def test_the_loop_of_a_gpu_kernel_is_the_shortest_on_its_tensor_cores():
    assert sass.steady_loop(SASS) == (5, 2)
    with pytest.raises(ValueError, match="no loop that uses the tensor cores"):
        sass.steady_loop(SASS.replace("HGMMA", "HFMA2"))


@pytest.mark.parametrize(
    ("registers", "shared", "programs"), [(93, 105_472, 2), (93, 1000, 5), (24, 0, 16), (223, 46_080, 2)]
)
def test_programs_that_fit_a_multiprocessor(registers, shared, programs):
    assert sass.fitting(registers, shared, 128) == programs


def test_decode_attention_as_compiled(tmp_path):
    """Its bytes alone are the floor, and half a millisecond a head is far too much."""
    if reason := targets.why_not("v5e"):
        pytest.skip(reason)
    path = tmp_path / "counts.json"
    command = [
        sys.executable,
        kernel_schedule.__file__,
        "--chips",
        "v5e",
        "--json",
        str(path),
        "--only",
        "decode",
        "llama",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(kernel_schedule.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    found = {(row["case"], row["part"], row["kvs"]): row for row in json.loads(path.read_text())}
    tile = found["decode, llama-3.1-8b", "tile", 1024]
    assert tile["needed"] == pytest.approx(1024 * 512 / 819e9 * 1.5e9)
    assert 300 < tile["cycles"] < 1.5 * tile["needed"]
    assert tile["copies"] == pytest.approx(16)  # blocks of 64
    head = found["decode, llama-3.1-8b", "head", 16_384]
    assert 16 * tile["cycles"] <= head["cycles"] < 18 * tile["cycles"]
    assert "| decode, llama-3.1-8b | tile, 1,024 KVs |" in done.stdout
