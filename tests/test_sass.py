"""The machine code of the Triton kernels has wide stores, cheap exponentials and wide products. Needs no GPU."""

import json
import os
import subprocess
import sys

import pytest
from backends import triton

if not triton:
    pytest.skip("triton is not installed", allow_module_level=True)

from fused_mos._backends.triton_kernels import sass

pytestmark = pytest.mark.compiles

COMPILE = """
import json
import sys
from dataclasses import asdict

from fused_mos._backends.triton_kernels import proof

calls = [
    (call, shapes)
    for names, dtype in ((("odd-0", "odd-2", "odd-8", "odd-14"), "bfloat16"), (("odd-8",), "float32"))
    for call, shapes in proof.distinct_calls("sm_90", names, (dtype,))
    if call.kernel.__name__.endswith(("exponentials_kernel", "gradient_kernel"))
    and call.constants.get("SECOND_SWEEP", True)
]
# as if dl's rows were 10,008 numbers long, which is no multiple of 16
broken = next(call for call, _ in calls if call.kernel.__name__ == "gradient_kernel")
*others, out = broken.arguments
broken.arguments = *others, out._replace(n_columns=10_008, stride=10_008)
for kernel in proof.compile_all(calls, "sm_90"):
    print(json.dumps(asdict(kernel) | {"faults": kernel.faults("sm_90"), "over": kernel.over_budget("sm_90")}))
"""


def test_odd_sizes_store_16_bytes_at_a_time():
    """Vocabularies of any length modulo 16, odd K and odd D. One kernel is broken, to see that it is found."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    broken = next(kernel for kernel in kernels if kernel["kernel"] == "gradient_kernel")
    kernels.remove(broken)
    assert broken["over"] == ["stores 0 of its tile's 256 bytes a thread in 128 bits at a time, others in at most 16"]
    assert {shape for kernel in kernels for shape in kernel["shapes"]} == {"odd-0", "odd-2", "odd-8", "odd-14"}
    for kernel in kernels:
        assert kernel["faults"] == kernel["over"] == [], kernel
        machine = kernel["sass"]
        if kernel["kernel"].startswith("persistent"):  # whose stores of tiles are not its threads'
            assert kernel["instructions"]["TMA"] > 4 and machine["product_columns"] == 256, kernel
            continue
        assert machine["widest_load"] == machine["widest_store"] == 128, kernel
        assert kernel["written"] and machine["exponentials"], kernel
        if kernel["kernel"] != "mixture_gradient_kernel":
            assert machine["product_columns"] == 128, kernel


CODE = """
some_kernel:
        /*0000*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R4.64] ;
.L_x_0:
        /*0020*/              @!P0 FMUL R3, R3, 0.5 ;
        /*0030*/                   MUFU.EX2 R3, R3 ;
        /*0040*/              @!P0 FMUL R3, R3, R3 ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0070*/              @!P1 BRA `(.L_x_0) ;
        /*0080*/               @P2 STG.E.U16 desc[UR4][R2.64], R5 ;
        /*0090*/                   STG.E.128 desc[UR4][R2.64+0x10], R8 ;
        /*00a0*/                   EXIT ;
"""


def test_what_is_read_of_machine_code():
    found = sass.read(CODE)
    assert (found.widest_load, found.widest_store, found.wide_stores) == (128, 128, 1)
    assert (found.exponentials, found.scaled_exponentials, found.product_columns) == (2, 1, 128)
    assert found.slots_per_exponential == 3  # six instructions between the label and the jump
    narrow = sass.read(CODE.replace("STG.E.128", "STG.E.64").replace("LDGSTS.E.BYPASS.128", "LDG.E"))
    assert (narrow.widest_load, narrow.widest_store, narrow.wide_stores) == (32, 64, 0)


@pytest.mark.parametrize(
    ("architecture", "warps", "registers", "shared", "programs"),
    [
        ("sm_90", 4, 200, 98_304, 2),  # two by registers, and by shared memory
        ("sm_90", 8, 255, 1_024, 1),
        ("sm_90", 4, 32, 0, 16),  # 64 warps
        ("sm_90", 4, 128, 55_296, 4),
        ("sm_80", 4, 168, 0, 3),
        ("sm_80", 8, 64, 166_912, 1),
        ("sm_86", 1, 16, 0, 16),
        ("sm_80", 8, 64, 166_913, 0),
    ],
)
def test_programs_that_a_multiprocessor_holds(architecture, warps, registers, shared, programs):
    assert sass.programs_per_multiprocessor(architecture, warps, registers, shared) == programs
