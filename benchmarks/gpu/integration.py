"""The public functions on a GPU: every road, streams, graphs, compiled and whole models."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

import halfbyte as hb
from halfbyte.bench.gpu_clock import Call, Device
from halfbyte.cuda.rows import codes_of

from .operands import Codes, dense, linear_call, packed_tensor, padded_rows, random_tensor, runner
from .record import PATIENCE, Clock, Record, Skipped, Wrong

PHASE = "integration"
SCHEMES = ("w4a16_g128", "w8a8", "w4a8_g64+asym", "w8a16", "w4a16_g32+asym", "w4a16_g64+nf4", "w8a8+ag64")
MODELS = ("w8a8", "w4a16_g128")
COMPILE_PATIENCE = 70.0


def check(device: Device, record: Record, clock: Clock, archs: tuple[int, ...], tiny: bool) -> None:
    """One row of results per thing that a user does."""
    jobs = [
        *((f"linear {scheme}", _roads, scheme) for scheme in (SCHEMES[:2] if tiny else SCHEMES)),
        *((f"rows and product {scheme}", _overlapped, scheme) for scheme in ("w8a8", "w4a8_g64+asym")),
        *((f"two streams sm{arch}", _streams, arch) for arch in archs),
        *((f"first use in two threads {scheme}", _first_use, scheme) for scheme in MODELS),
        *((f"model {scheme}", _model, scheme, False) for scheme in MODELS),
        ("a model to the GPU and back", _there_and_back),
        ("a weight on the CPU", _mixed_devices),
        ("the last GPU", _last_gpu),
        ("time of an eager call", _overhead),
        *((f"compiled model {scheme}", _model, scheme, True) for scheme in MODELS),
        ("compiled to reduce overhead", _reduced_overhead),
    ]
    record.attempt_all(
        PHASE,
        [
            (name, partial(job, device, tiny, *rest), COMPILE_PATIENCE if "compiled" in name else PATIENCE)
            for name, job, *rest in jobs
        ],
        clock,
    )


def _difference(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def _roads(device: Device, tiny: bool, scheme: str) -> dict:
    """hb.linear for few and many rows, against the weight in float64; rows of a8 are quantized in between."""
    n, k = (70, 136) if tiny else (1000, 2888)
    q = random_tensor(scheme, n, k, device.device)
    values = q.dequantize().double() if "nf4" in scheme else dense(q)
    packed, worst = hb.pack(q), 0.0
    for m in (1, 5) if tiny else (1, 16, 100, 129, 200, 600):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.randn(m, k, device=device.device).to(dtype)
            bias = torch.randn(n, device=device.device)
            y = hb.linear(x, packed, bias, activation="relu")
            error = _difference(y, torch.relu(x.double() @ values.T + bias))
            # Rows of 8 bits keep about 1 % of a normal distribution.
            if not error < (0.02 if "a8" in scheme else 0.006):
                raise Wrong(f"{scheme}, m {m}, {dtype}: relative error {error:.1e}")
            worst = max(worst, error)
    return {"worst": worst}


def _overlapped(device: Device, tiny: bool, scheme: str) -> dict:
    """A product starts while its rows are still being quantized, which must not show: call after call on
    other rows has the bits of rows and product one after the other.
    """
    n, k = (70, 256) if tiny else (4096, 4096)
    weight = packed_tensor(random_tensor(scheme, n, k, device.device))
    for turn in range(2 if tiny else 100):
        m = 1 + turn % 20
        x = torch.randn(m, k, device=device.device).bfloat16()
        y, apart = hb.linear(x, weight), torch.empty(m, n, dtype=torch.bfloat16, device=device.device)
        codes = Codes(*codes_of(x, k_padded=-(-k // 16) * 16), k)
        device.synchronize()
        runner(device, linear_call(weight, codes, apart), weight, codes, apart)()
        if not torch.equal(y, apart):
            raise Wrong(f"other bits, m {m}")
    return {}


def _streams(device: Device, tiny: bool, arch: int) -> dict:
    """Calls on two streams at once give what they give alone; each has a workspace of its own."""
    n, k = (70, 256) if tiny else (4096, 4096)
    jobs = []
    for _ in range(2):
        weight = packed_tensor(random_tensor("w4a16_g128", n, k, device.device))
        for m in (1, 5):
            x = padded_rows(torch.randn(m, k, device=device.device).bfloat16())
            y = torch.empty(m, n, dtype=torch.bfloat16, device=device.device)
            run = runner(device, linear_call(weight, x, y, arch=arch, splits=4, warps=4), weight, x, y)
            run()
            jobs.append((run, y, y.clone()))
    for _ in range(2 if tiny else 20):
        for _, y, _ in jobs:
            y.fill_(torch.nan)
        device.concurrently([[jobs[0][0], jobs[1][0]], [jobs[2][0], jobs[3][0]]])
        if not all(torch.equal(y, expected) for _, y, expected in jobs):
            raise Wrong("other values than one after the other")
    return {}


def _first_use(device: Device, tiny: bool, scheme: str) -> dict:
    """A fresh layer's first calls, at once from two threads on a stream each: one packs, and the other must
    not read what is not there yet.
    """
    n, k = (70, 256) if tiny else (8192, 4096)
    x = torch.randn(3, k, device=device.device).bfloat16()
    for turn in range(2 if tiny else 8):
        q, found = random_tensor(scheme, n, k, device.device), [None, None]
        expected = hb.linear(x, hb.pack(q))
        layer, together = hb.QLinear(q, float_dtype=torch.bfloat16), threading.Barrier(2)
        device.synchronize()

        def work(i: int, layer=layer, together=together, found=found) -> None:
            try:
                with torch.no_grad(), device.aside():
                    together.wait()
                    found[i] = layer(x)
                    device.synchronize()
            except Exception as error:  # of a thread, for the row
                found[i] = error

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for y in found:
            if isinstance(y, Exception):
                raise y
            if not torch.equal(y, expected):
                raise Wrong(f"turn {turn}: other values than of a layer that was packed before")
    return {}


class Block(nn.Module):
    """Two layers, as the issue asks for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def _made(device: Device, tiny: bool, scheme: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """(bfloat16 model, the same quantized on the device, x)."""
    torch.manual_seed(0)
    width = 64 if tiny else 1024
    model = Block(width).to(device.device, torch.bfloat16).eval()
    twin = Block(width).to(device.device, torch.bfloat16).eval()
    twin.load_state_dict(model.state_dict())
    hb.quantize_(twin, scheme)
    return model, twin, torch.randn(3, 5, width, device=device.device).bfloat16()


def _model(device: Device, tiny: bool, scheme: str, compiled: bool) -> dict:
    """Quantized, maybe compiled, captured in a CUDA graph, replayed on other inputs: the eager answer."""
    model, twin, x = _made(device, tiny, scheme)
    with torch.inference_mode(False), torch.no_grad():
        eager = twin(x)
        error = _difference(eager - x, model(x) - x)
        if not error < 0.2:
            raise Wrong(f"the quantized model is {error:.2f} away from bfloat16")
        backend = "aot_eager" if tiny else "inductor"
        call = torch.compile(twin, fullgraph=True, backend=backend) if compiled else twin
        made = call(x)
        # Compiled code may keep float32 where eager code rounds between the layers.
        if not _difference(made, eager) < (0.01 if compiled else 1e-9):
            raise Wrong(f"relative difference {_difference(made, eager):.1e} to the eager answer")
        still, result = x.clone(), {}

        def step() -> None:
            result["y"] = call(still)

        replay = device.captured([step])
        for seed in range(3):
            torch.manual_seed(seed)
            still.copy_(torch.randn_like(x))
            replay()
            device.synchronize()
            if not torch.equal(result["y"], call(still)):
                raise Wrong("a replayed graph gives another answer")
    return {"error": error, "roads": str(hb.summary(twin, x)).splitlines()[:6] if not tiny else []}


def _reduced_overhead(device: Device, tiny: bool) -> dict:
    """torch.compile makes CUDA graphs of its own; one eager call before it has packed the weights."""
    if not device.real:
        raise Skipped("no CUDA graphs")
    _, twin, x = _made(device, tiny, MODELS[0])
    with torch.inference_mode(False), torch.no_grad():
        twin(x)
        call = torch.compile(twin, fullgraph=True, mode="reduce-overhead")
        for turn in range(5):  # warm-up, recording, replays
            torch.compiler.cudagraph_mark_step_begin()
            other = torch.randn_like(x)
            difference = _difference(call(other), twin(other))
            if not difference < 0.01:  # as a compiled model
                raise Wrong(f"turn {turn}: relative difference {difference:.1e} to the eager answer")
    return {}


def _last_gpu(device: Device, tiny: bool) -> dict:
    """While another one is current."""
    count = torch.cuda.device_count() if device.real else 1
    if count < 2:
        raise Skipped("one GPU")
    there = torch.device("cuda", count - 1)
    for scheme in MODELS:
        layer = hb.QLinear(random_tensor(scheme, 512, 1024, device.device), float_dtype=torch.bfloat16)
        for m in (1, 300):
            x = torch.randn(m, 1024, device=device.device).bfloat16()
            here = layer.to(device.device)(x)
            y = layer.to(there)(x.to(there))
            # It may be another model, with sums in another order.
            if y.device != there or not _difference(y.to(device.device), here) < 0.01:
                raise Wrong(f"{scheme}, m {m}: another answer on {there}")
    return {"index": count - 1}


def _there_and_back(device: Device, tiny: bool) -> dict:
    if not device.real:
        raise Skipped("one device")
    torch.manual_seed(0)
    model = Block(256).eval()
    x = torch.randn(7, 256)
    with torch.no_grad():
        hb.quantize_(model, "w8a8")
        here = model(x)
        there = model.to(device.device)(x.to(device.device)).cpu()
        back = model.to("cpu")(x)
    if not torch.equal(here, back):
        raise Wrong("a model that was on the GPU gives another answer on the CPU")
    if not _difference(there, here) < 5e-3:  # GELU differs in its last bits, and some codes with it
        raise Wrong(f"relative difference {_difference(there, here):.1e} of GPU and CPU")
    return {"difference": _difference(there, here)}


@contextlib.contextmanager
def _an_error() -> Iterator[None]:
    try:
        yield
    except hb.HalfbyteError:
        return
    raise Wrong("no error where x and weight are on different devices")


def _mixed_devices(device: Device, tiny: bool) -> dict:
    """An error of halfbyte, after which the GPU still computes."""
    if not device.real:
        raise Skipped("one device")
    there = random_tensor("w8a8", 128, 128, device.device)
    here = hb.pack(random_tensor("w8a8", 128, 128, torch.device("cpu")))
    with _an_error():
        hb.linear(torch.randn(2, 128, device=device.device), here)
    with _an_error():
        hb.linear(torch.randn(2, 128), hb.pack(there))
    hb.linear(torch.randn(2, 128, device=device.device), hb.pack(there))
    device.synchronize()
    return {}


def _overhead(device: Device, tiny: bool) -> dict:
    """Microseconds of the host in a QLinear's forward, a float layer's beside it."""
    layers = {"nn.Linear": nn.Linear(256, 256, bias=False).to(device.device, torch.bfloat16)}
    x = torch.randn(1, 256, device=device.device).bfloat16()
    for scheme in MODELS:
        made = nn.Sequential(nn.Linear(256, 256, bias=False)).to(device.device, torch.bfloat16)
        layers[scheme] = hb.quantize_(made, scheme)[0]
    return {
        name: round(_microseconds(device, lambda layer=layer: layer(x), tiny), 1)
        for name, layer in layers.items()
    }


def _microseconds(device: Device, call: Call, tiny: bool) -> float:
    turns = 3 if tiny else 1000
    with torch.no_grad():
        for _ in range(3):
            call()
        device.synchronize()
        start = time.perf_counter()
        for _ in range(turns):
            call()
        return (time.perf_counter() - start) / turns * 1e6
