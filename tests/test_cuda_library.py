"""libhalfbyte_cuda: where it is looked for, its errors, what the doctor says, and torch in its place."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys

import pytest
import torch

import halfbyte as hb
from building import ROOT
from cuda_weights import make
from halfbyte import arrays, selftest
from halfbyte.cli import main
from halfbyte.cuda import library
from halfbyte.cuda.pack import TorchWeight


@pytest.fixture
def forgotten():
    """What is known of a library, put back at the end."""
    before = library._state
    library._set(None)
    yield
    library._set(before)


@pytest.fixture
def no_library(forgotten, monkeypatch, tmp_path):
    """A GPU, for which CPU tensors stand, and no library."""
    monkeypatch.setenv(library.VARIABLE, str(tmp_path / "lib.so"))
    monkeypatch.setattr(arrays, "gpu_devices", ("cuda", "cpu"))


def emulate(gpu, arch):
    ctypes.CDLL(gpu.path).halfbyte_cuda_emulate(arch, 132, 232448, 0)
    library.obstacle.cache_clear()


C_TYPES = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
STRUCTURES = {
    "format": library.Format,
    "linear": library.Linear,
    "rows": library.Rows,
    "finish": library.Finish,
    "dequantize": library.Dequantize,
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_are_those_of_the_header(name):
    header = re.sub(r"//.*", "", (ROOT / "csrc/cuda/api.h").read_text())
    body = re.search(rf"struct halfbyte_cuda_{name} {{(.*?)}};", header, re.DOTALL)[1]
    fields = []
    for declared in filter(None, map(str.strip, body.split(";"))):
        words = declared.replace("const ", "").replace("struct ", "")
        kind, names = re.match(r"(\w+\s*\**)\s*(.*)", words).groups()
        kind = kind.replace(" ", "")
        of = ctypes.c_void_p if kind.endswith("*") else C_TYPES.get(kind, library.Format)
        fields += [(field.strip(), of) for field in names.split(",")]
    assert fields == STRUCTURES[name]._fields_


def test_functions_are_those_of_the_header():
    header = (ROOT / "csrc/cuda/api.h").read_text()
    declared = re.findall(r"^HALFBYTE_CUDA_API .*?\bhalfbyte_cuda_(\w+)\(", header, re.MULTILINE)
    assert sorted(declared) == sorted(library._FUNCTIONS)


def test_a_path_of_the_environment(forgotten, monkeypatch, emulated_library):
    monkeypatch.setenv(library.VARIABLE, str(emulated_library))
    assert library.library().path == str(emulated_library) and library.missing() == ""
    assert library.library() is library.library()


def test_a_path_to_nothing(no_library):
    assert library.library() is None
    assert library.VARIABLE in library.missing() and "lib.so" in library.missing()


def test_a_file_that_is_no_library(forgotten, monkeypatch, tmp_path):
    file = tmp_path / "lib.so"
    file.write_text("no library")
    monkeypatch.setenv(library.VARIABLE, str(file))
    assert library.library() is None and "does not load" in library.missing()
    with pytest.raises(hb.CudaError, match="does not load"):
        library.load(file)


def test_a_library_of_another_interface(forgotten, monkeypatch, emulated_library):
    monkeypatch.setattr(library, "ABI", 999)
    with pytest.raises(hb.CudaError, match="has the interface 1, and this halfbyte needs 999"):
        library.load(emulated_library)


def test_load(forgotten, emulated_library):
    loaded = library.load(emulated_library)
    assert library.library() is loaded and not loaded.emulated and library.obstacle(0) == ""
    assert "does not see the GPU 7" in library.obstacle(7)


def test_use_library_puts_everything_back(emulated_library):
    before = library._state, arrays.gpu_devices
    with pytest.raises(KeyError), library.use_library(emulated_library):
        assert arrays.on_gpu(torch.zeros(1))
        raise KeyError
    assert (library._state, arrays.gpu_devices) == before and not arrays.on_gpu(torch.zeros(1))


def test_errors_of_a_call_are_explained(gpu):
    match = r"linear: an argument that no kernel takes \(code -10001\)"
    with pytest.raises(hb.CudaError, match=match) as caught:
        gpu.check(gpu.linear_run(ctypes.byref(library.Linear()), None), "linear")
    assert isinstance(caught.value, RuntimeError)
    with pytest.raises(hb.CudaError, match="invalid device ordinal"):
        gpu.check(101, "somewhere")
    gpu.check(0, "somewhere")


def test_errors_in_place_of_a_number_are_explained(gpu):
    what = "invalid device ordinal (code 101)"
    assert gpu.arch(7) == -101 and gpu.explain(-101) == gpu.explain(101) == what
    assert library.obstacle(7) == f"the library does not see the GPU 7: {what}"


def test_a_gpu_without_room_for_a_kernel(gpu):
    """Then torch computes in each layer, and `summary` says so."""
    q, x = make(40, 64, "w8a8"), torch.randn(3, 64)
    sparse = hb.sparsify(torch.randn(40, 64) * (torch.arange(64) % 4 < 2), "w8a8+2:4")
    try:
        ctypes.CDLL(gpu.path).halfbyte_cuda_emulate(90, 132, 1024, 0)
        packed, layer = hb.pack(q), hb.QLinear(q)
        assert isinstance(packed, TorchWeight) and "takes a weight of 40 x 64 on this GPU" in packed.why
        for module in (layer, hb.SparseLinear(sparse)):
            y = module(x)
            torch.testing.assert_close(y, x @ module.dequantize().T)
            row = hb.summary(torch.nn.Sequential(module)).layers[0]
            assert row.kernel == "torch" and row.why_torch == packed.why
    finally:
        emulate(gpu, 90)


def test_a_gpu_that_is_too_old(gpu):
    try:
        emulate(gpu, 75)
        assert "compute capability 7.5" in library.obstacle(0)
        packed = hb.pack(make(8, 32, "w8a8"))
        assert isinstance(packed, TorchWeight) and "7.5" in packed.why
    finally:
        emulate(gpu, 90)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16_g32+asym", "w4a8_g64", "w4a16_g64+nf4"])
def test_without_a_library_torch_computes(no_library, scheme):
    q, x = make(40, 75, scheme), torch.randn(5, 75)
    layer = hb.QLinear(q, torch.randn(40), activation="gelu")
    want = torch.nn.functional.gelu(x @ q.dequantize().T + layer.bias)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.half()(x.half()).float(), want, rtol=1e-2, atol=1e-2)
    row = hb.summary(torch.nn.Sequential(layer)).layers[0]
    assert row.kernel == "torch" and ("nf4" if "nf4" in scheme else library.missing()) in row.why_torch
    assert layer._prepare().nbytes == 0
    if scheme == "w8a8":
        with pytest.raises(hb.CudaError, match="int32 output needs the kernels"):
            hb.linear(x, hb.pack(q), out_dtype=torch.int32)


def test_gates_and_rows_without_a_library(no_library):
    up, gate, x = make(40, 64, "w8a8"), make(40, 64, "w8a8"), torch.randn(5, 64)
    y = hb.gated_linear(x, hb.pack(up), hb.pack(gate))
    want = (x @ up.dequantize().T) * torch.nn.functional.silu(x @ gate.dequantize().T)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert hb.quantize_rows(x).codes.shape == (5, 64)


@pytest.fixture
def doctor(monkeypatch, capsys):
    """Its report, without the self-test of the CPU's kernels."""
    monkeypatch.setattr(selftest, "run", lambda: [])

    def run(*args):
        assert main(["doctor", *args]) == 0
        return capsys.readouterr().out

    return run


def test_the_doctor_without_a_library(no_library, monkeypatch, doctor):
    monkeypatch.setattr(arrays, "gpu_devices", ("cuda",))
    report = json.loads(doctor("--json"))["cuda"]
    assert report["library"] is None and report["devices"] == []
    assert report["why"] == library.missing()
    assert f"no kernels: {library.missing()}" in doctor()


def test_the_doctor_with_a_library(forgotten, monkeypatch, emulated_library, doctor):
    monkeypatch.setenv(library.VARIABLE, str(emulated_library))
    report = json.loads(doctor("--json"))["cuda"]
    assert (report["library"], report["interface"], report["why"]) == (str(emulated_library), 1, "")
    (device,) = report["devices"]
    assert device["arch"] == 90
    if not torch.cuda.is_available():
        assert "does not see it" in device["why"]
    text = doctor()
    assert str(emulated_library) in text and "sm_90" in text


def test_the_doctor_of_a_gpu_that_fails(gpu, monkeypatch, doctor):
    monkeypatch.setattr(gpu, "arch", lambda index: -101)
    library.obstacle.cache_clear()
    (device,) = json.loads(doctor("--json"))["cuda"]["devices"]
    assert device["arch"] is None and device["why"].endswith("invalid device ordinal (code 101)")
    assert "sm_" not in doctor() and "torch computes: the library does not see the GPU 0" in doctor()


def test_what_runs_on_the_cpu_loads_nothing_of_it():
    code = """
import sys, halfbyte as hb
assert "torch" not in sys.modules
import torch
layer = hb.QLinear.from_linear(torch.nn.Linear(8, 4))
layer(torch.randn(2, 8)), hb.pack_(torch.nn.Sequential(layer)), hb.summary(layer), repr(layer)
hb.linear(torch.randn(2, 8), hb.pack(layer.quantized)), hb.quantize_rows(torch.randn(2, 8))
assert not [name for name in sys.modules if name.startswith("halfbyte.cuda")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
