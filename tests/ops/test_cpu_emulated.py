"""The native CPU kernels on processors that this machine is not: emulated by qemu-user, by a driver without Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cpu_sweep import WORK, close

from mindspeed_nsa.ops import reference
from mindspeed_nsa.ops.reference import Compressed, Selected, Window

pytestmark = pytest.mark.slow  # two builds of the kernels
SOURCES = Path(reference.__file__).parent / "cpu/csrc"
TYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS, HEADS, KV_HEADS, DIMS, ENDS = 150, 6, 2, (40, 24), [21, 150]
AT = Compressed(0.25, 8, 4, 16, 3, True, 1, 1, True, "ascend", ENDS, [4, 35], [2, 11], [0, 0])


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Compile the driver with the kernels, once a compiler."""
    built = {}

    def make(compiler):
        if shutil.which(compiler) is None:
            pytest.skip(f"there is no {compiler}")
        if compiler not in built:
            folder = tmp_path_factory.mktemp("driver")
            flags = ["-std=c++17", "-O1", "-static", "-pthread", "-ffp-contract=fast", "-I", SOURCES]
            sources = [Path(__file__).with_name("cpu_driver.cpp"), *sorted(SOURCES.glob("*.cpp"))]
            objects = [folder / f"{source.stem}.o" for source in sources]
            for source, target in zip(sources, objects, strict=True):
                subprocess.run([compiler, *flags, "-c", source, "-o", target], check=True)
            subprocess.run([compiler, *flags, *objects, "-o", folder / "driver"], check=True)
            built[compiler] = folder / "driver"
        return built[compiler]

    return make


MODELS = [
    ("g++", "qemu-x86_64", "core2duo", "generic"),
    ("g++", "qemu-x86_64", "Nehalem", "generic"),
    ("g++", "qemu-x86_64", "Haswell", "avx2"),
    ("aarch64-linux-gnu-g++", "qemu-aarch64", "cortex-a57", "generic"),
]


@pytest.mark.parametrize(("compiler", "emulator", "model", "isa"), MODELS, ids=[model[2] for model in MODELS])
def test_on_another_processor(build, compiler, emulator, model, isa):
    """No illegal instruction, the best instruction set that it has, and the reference's results."""
    if shutil.which(emulator) is None:
        pytest.skip(f"there is no {emulator}")
    environment = {name: value for name, value in os.environ.items() if name != "NSA_CPU_ISA"}
    done = subprocess.run([emulator, "-cpu", model, build(compiler)], env=environment, capture_output=True, check=False)
    said = [line for line in done.stderr.decode().splitlines() if not line.startswith("qemu")]  # it warns of what it lacks
    assert (done.returncode, said) == (0, [isa])
    check(done.stdout)


class Numbers:
    """The driver's made-up inputs."""

    state = 1

    def __call__(self, *shape):
        values = []
        for _ in range(torch.Size(shape).numel()):
            self.state = (self.state * 1103515245 + 12345) % (1 << 32)
            values.append(((self.state >> 16 & 127) - 64) / 64)
        return torch.tensor(values, dtype=torch.float64).view(shape)


def check(output):
    rand, place = Numbers(), 0

    def take(dtype, *shape):
        nonlocal place
        size = torch.Size(shape).numel() * dtype.itemsize
        taken = torch.frombuffer(bytearray(output[place : place + size]), dtype=dtype).view(shape)
        place += size
        return taken

    for dtype in TYPES:
        query, key, value = rand(TOKENS, HEADS, DIMS[0]), rand(TOKENS, KV_HEADS, DIMS[0]), rand(TOKENS, KV_HEADS, DIMS[1])
        grad, few_keys, few_values = rand(TOKENS, HEADS, DIMS[1]), rand(35, KV_HEADS, DIMS[0]), rand(35, KV_HEADS, DIMS[1])
        gate, weight = rand(TOKENS, HEADS, 3), rand(8, KV_HEADS)
        near(take(dtype, 35, KV_HEADS, DIMS[0]), reference.compress(key, weight, 8, 4, ENDS))
        at = Window(0.25, 40, ENDS, ENDS, [0, 0])
        attention(take, dtype, "window", at, grad, query, key, value)
        out, ids, *_ = reference.compress_attention(query, few_keys, few_values, None, None, *AT)
        near(take(dtype, *out.shape), out)
        found = take(torch.int32, *ids.shape)
        assert (found == ids).float().mean() > 0.99
        attention(take, dtype, "select", Selected(0.25, 16, True, False, ENDS, ENDS, [0, 0]), grad, query, key, value, found)
        near(take(dtype, *grad.shape), reference.gated_sum(gate, grad, grad, grad))
        whole, *branches = (take(dtype, *grad.shape) for _ in range(4))
        near(whole, reference.gated_sum(gate, *(branch.double() for branch in branches)))
        select = reference.select_attention(query, key, value, found, 0.25, 16, True, False, ENDS, ENDS, [0, 0])
        for branch, expected in zip(
            branches, (out, select[0], reference.window_attention(query, key, value, *at)[0]), strict=True
        ):
            near(branch, expected)
    assert place == len(output)


def attention(take, dtype, name, at, grad, query, key, value, *ids):
    saved = getattr(reference, f"{name}_attention")(query, key, value, *ids, *at)
    out = take(dtype, *saved[0].shape)
    near(out, saved[0])
    backward = getattr(reference, f"{name}_attention_backward")
    # Of the rounded result, as the kernels have it.
    for expected in backward(grad, query, key, value, *ids, out.double(), *saved[1:], *at):
        near(take(dtype, *expected.shape), expected)


def near(found, expected):
    """To some roundings of the type, of terms as large as the largest result."""
    magnitude = expected.abs().max().expand_as(expected)
    close("result", found, expected, 5 * magnitude, 2 * magnitude, work=WORK)
