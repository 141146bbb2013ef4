"""10,000 random calls and 2,000 damaged files: a right answer or a specific error, never a crash.

HALFBYTE_FUZZ_SEED and HALFBYTE_FUZZ_CALLS change where it starts and how long it runs; a failure prints the
seed of its call, so that it can be repeated alone (HALFBYTE_FUZZ_SEED=<seed> HALFBYTE_FUZZ_CALLS=1).
"""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch

import cases
import halfbyte as hb
from corecall import quantize_rows as core_quantize_rows
from corecall import same
from halfbyte.reference import linear_ref, quantize_rows_ref
from halfbyte.scheme import NAMES
from weights import FILLINGS, Format, fill_weight

pytestmark = pytest.mark.usefixtures("one_thread_of_torch")
SEED = int(os.environ.get("HALFBYTE_FUZZ_SEED", "0"))
CALLS = int(os.environ.get("HALFBYTE_FUZZ_CALLS", "10000"))
PARTS = 8
TORCH = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("normal", "onesided", "constant", "zeros", "outlier", "huge", "tiny", "nonfinite", "mixed", "ties")


def size(rng: np.random.Generator, largest: int) -> int:
    """Mostly small, often beside a multiple of a tile edge, sometimes zero, rarely worth several threads."""
    pick = rng.integers(4)
    if rng.random() < 0.04:
        return int(rng.integers(largest, 8 * largest))
    if pick == 0:
        return int(rng.integers(0, 4))
    if pick == 1:
        return int(
            np.clip(rng.choice((4, 12, 16, 32, 64)) * rng.integers(1, 4) + rng.integers(-1, 2), 0, largest)
        )
    return int(rng.integers(1, largest + 1))


def strided(rng: np.random.Generator, values: torch.Tensor) -> torch.Tensor:
    """The same values as a view of larger memory: row or column steps, transposed, shifted, shared rows."""
    m, k = values.shape
    pick, blank = rng.integers(6), torch.nan if values.is_floating_point() else 99
    if pick == 0:
        return values
    if pick == 1:
        base = torch.full((m, k + 9), blank, dtype=values.dtype)
        view = base[:, 3 : 3 + k]
    elif pick == 2:
        view = torch.full((k, m), blank, dtype=values.dtype).t()
    elif pick == 3:
        view = torch.full((m, 2 * k), blank, dtype=values.dtype)[:, ::2]
    elif pick == 4:
        view = torch.full((3 * m, k), blank, dtype=values.dtype)[1::3]
    else:
        view = torch.full((m * k + 1,), blank, dtype=values.dtype)[1:].view(m, k)
    return view.copy_(values) if view.numel() else view


def strided_numpy(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    pick = rng.integers(5)
    if pick == 0:
        return np.asfortranarray(values)
    if pick == 1:
        return np.ascontiguousarray(values[::-1])[::-1]
    if pick == 2:
        return np.ascontiguousarray(values[:, ::-1])[:, ::-1]
    if pick == 3:
        values = values.copy()
        values.flags.writeable = False
        return values
    return np.ascontiguousarray(np.pad(values, ((0, 2), (1, 3))))[: len(values), 1 : 1 + values.shape[1]]


def scheme_of(rng: np.random.Generator) -> str:
    """w8a8 as often as all the others."""
    return str(rng.choice(NAMES)) if rng.random() < 0.5 else "w8a8"


def activations(rng: np.random.Generator, scheme: str, m: int, k: int) -> torch.Tensor:
    case = cases.Linear(m, 1, k, str(rng.choice(KINDS)), form=Format(scheme))
    return torch.from_numpy(case.fill_x(rng))


def method_of(rng: np.random.Generator, scheme: str) -> str | None:
    """absmax mostly: the others take longer, and are of test_search.py."""
    offsets = "+asym" in scheme and "_g" in scheme
    return str(rng.choice(("absmax", "absmax", "mse", "hqq" if offsets else "absmax")))


def one_linear(rng: np.random.Generator) -> None:
    m, n, k = size(rng, 40), max(size(rng, 110), 1), max(size(rng, 200), 1)
    scheme = scheme_of(rng)
    method = method_of(rng, scheme)
    x = activations(rng, scheme, m, k)
    w = torch.from_numpy(
        cases.fill_rows(rng.choice(("normal", "constant", "zeros", "outlier", "ties")), n, k, rng)
    )
    bias = torch.from_numpy(rng.standard_normal(n, np.float32)) if rng.random() < 0.5 else None
    residual = torch.from_numpy(rng.standard_normal((m, n), np.float32)) if rng.random() < 0.3 else None
    static = cases.STATIC[rng.integers(4)] if rng.random() < 0.3 else None
    if not hb.Scheme.parse(scheme).per_token:
        static = None
    activation = str(rng.choice(("none", "relu")))
    isa = rng.choice([name for name, here in hb.cpu_features().items() if here])
    if rng.random() < 0.5:
        dtype, out, res, wd = (TORCH[i] for i in rng.integers(0, 3, 4))
        x, w = x.to(dtype), w.to(wd)
        if not w.isfinite().all():
            return
        residual = None if residual is None else residual.to(res)
        q = hb.quantize(strided(rng, w), scheme, method=method)
        want = linear_ref(x, q, bias, activation=activation, residual=residual, out_dtype=out, static=static)
        with hb.force_isa(str(isa)):
            got = hb.linear(
                strided(rng, x),
                hb.pack(q),
                bias,
                activation=activation,
                static=static,
                out_dtype=out,
                residual=None if residual is None else strided(rng, residual),
            )
    else:
        q = hb.quantize(strided_numpy(rng, w.numpy()), scheme, method=method)
        parts = {what: getattr(q, what) for what in ("codes", "scale", "group_scale", "zero", "minimum")}
        parts = {what: torch.from_numpy(part) for what, part in parts.items() if part is not None}
        twin = hb.QuantizedTensor(**parts, scheme=q.scheme, k=k)
        want = linear_ref(x, twin, bias, activation=activation, residual=residual, static=static)
        with hb.force_isa(str(isa)):
            got = hb.linear(
                strided_numpy(rng, x.numpy()),
                hb.pack(q),
                None if bias is None else bias.numpy(),
                activation=activation,
                static=static,
                residual=None if residual is None else strided_numpy(rng, residual.numpy()),
            )
        got = torch.from_numpy(got)
    same(got, want, f"{m}x{n}x{k} {scheme} {method} {isa} {activation}")


def one_format(rng: np.random.Generator) -> None:
    """Codes, zero points, scales and minima that quantize() never gives, as views of larger memory."""
    m, n, k = size(rng, 40), max(size(rng, 110), 1), max(size(rng, 300), 1)
    form = Format(str(rng.choice(NAMES)), bool(rng.integers(2)), str(rng.choice(("float16", "float32"))))
    form = Format(form.name, form.minimum and form.scheme.group > 0, form.floats)
    dense = fill_weight(form, str(rng.choice(FILLINGS)), n, k, rng)
    parts = {what: getattr(dense, what) for what in ("codes", "group_scale", "zero", "minimum")}
    parts = {what: strided(rng, part) for what, part in parts.items() if part is not None}
    q = hb.QuantizedTensor(**parts, scale=dense.scale, scheme=form.scheme, k=k)
    x, out = activations(rng, form.name, m, k).to(TORCH[rng.integers(3)]), TORCH[rng.integers(3)]
    isa = str(rng.choice([name for name, here in hb.cpu_features().items() if here]))
    with hb.force_isa(isa):
        got = hb.linear(strided(rng, x), hb.pack(q), out_dtype=out)
    same(got, linear_ref(x, dense, out_dtype=out), f"{m}x{n}x{k} {form} {isa}")
    same(q.dequantize(), dense.dequantize(), f"{form} dequantized")


def one_layer(rng: np.random.Generator) -> None:
    """QLinear, whose forward goes its own way into the core, on inputs with any leading dimensions."""
    lead = tuple(int(rng.integers(0, 6)) for _ in range(rng.integers(0, 4)))
    n, k = max(size(rng, 110), 1), max(size(rng, 200), 1)
    linear = torch.nn.Linear(k, n, bias=bool(rng.integers(2)))
    scheme = scheme_of(rng)
    layer = hb.QLinear.from_linear(linear, scheme, method=method_of(rng, scheme))
    layer.activation = str(rng.choice(("none", "relu")))
    static = cases.STATIC[rng.integers(4)] if rng.random() < 0.3 and layer.scheme.per_token else None
    layer.static = static
    rows = int(np.prod(lead))
    dtype = TORCH[rng.integers(0, 3)]
    for _ in range(2):  # the first call packs
        x = activations(rng, scheme, rows, k).to(dtype)
        view = strided(rng, x).reshape(*lead, k)
        if len(lead) > 1 and rng.random() < 0.5:
            view = view.transpose(0, 1)
        want = linear_ref(
            view.reshape(-1, k), layer.quantized, layer.bias, activation=layer.activation, static=static
        )
        with torch.no_grad():
            same(
                layer(view), want.reshape(*view.shape[:-1], n), f"QLinear {scheme} {tuple(view.shape)} -> {n}"
            )


def one_rows(rng: np.random.Generator) -> None:
    m, k = size(rng, 30), max(size(rng, 300), 1)
    x = torch.from_numpy(cases.fill_rows(rng.choice(KINDS), m, k, rng)).to(TORCH[rng.integers(0, 3)])
    static = cases.STATIC[rng.integers(4)] if rng.random() < 0.3 else None
    symmetric = static is None and rng.random() < 0.3
    options = {"symmetric": bool(symmetric)} | ({"scale": static[0], "zero": static[1]} if static else {})
    want = quantize_rows_ref(x, symmetric=bool(symmetric), static=static)
    if x.dtype != torch.bfloat16 and rng.random() < 0.5:
        got = hb.quantize_rows(strided_numpy(rng, x.numpy()), **options)
        parts = [torch.from_numpy(np.asarray(p)) for p in (got.codes, got.scale, got.zero, got.sums)]
    else:
        got = hb.quantize_rows(strided(rng, x), **options)
        parts = [got.codes, got.scale, got.zero, got.sums]
    for name, g, w in zip(("codes", "scale", "zero", "sums"), parts, want, strict=True):
        same(g, w, f"{name} {m}x{k} {options}")
    group, wide = int(rng.choice((32, 64, 128))), bool(rng.integers(2))
    want = quantize_rows_ref(x, group=group, wide=wide)
    got = core_quantize_rows(x, group=group, wide=wide, layout=str(rng.choice(cases.LAYOUTS)))
    for name, g, w in zip(("codes", "scale", "zero", "sums"), got, want, strict=True):
        same(g, w, f"{name} {m}x{k} group={group} wide={wide}")


def one_weight(rng: np.random.Generator) -> None:
    n, k = max(size(rng, 100), 1), max(size(rng, 200), 1)
    w = torch.from_numpy(cases.fill_rows(rng.choice(KINDS), n, k, rng))
    if not w.isfinite().all():
        with pytest.raises(ValueError, match="layer.7"):
            hb.quantize(strided(rng, w), name="layer.7")
        return
    q = hb.quantize(strided(rng, w))
    for got, want in zip((q.codes, q.scale), quantize_rows_ref(w, symmetric=True)[:2], strict=True):
        same(got, want)
    same(hb.dequantize(q), q.codes.float() * q.scale[:, None])
    packed = hb.pack(q)
    assert tuple(packed.shape) == (n, k)


def one_mistake(rng: np.random.Generator) -> None:
    """A call with one argument wrong: always a TypeError or ValueError with a message."""
    n, k, m = int(rng.integers(1, 40)), int(rng.integers(2, 60)), int(rng.integers(1, 9))
    w, x = torch.randn(n, k), torch.randn(m, k)
    q, grouped = hb.quantize(w), hb.quantize(w, "w4a16_g32+asym", method="absmax")
    p, p4 = hb.pack(q), hb.pack(grouped)
    parts = {what: getattr(grouped, what) for what in ("codes", "scale", "group_scale", "zero")}

    def altered(**change):
        return hb.pack(hb.QuantizedTensor(**parts | change, scheme=grouped.scheme, k=k))

    mistakes = (
        lambda: hb.linear(x[:, 1:], p4),
        lambda: hb.linear(x, p4, static=(0.1, 0)),
        lambda: hb.linear(x, p4, out_dtype=torch.int32),
        lambda: hb.quantize(w, "w4a8_g32", method="hqq"),
        lambda: hb.quantize(w, "w4a8_g32", method="best"),
        lambda: hb.quantize(w, "w4a16+nf4"),
        lambda: hb.quantize(w[:0], "w4a8"),
        lambda: hb.quantize(torch.full_like(w, torch.nan), "w4a8_g32"),
        lambda: altered(codes=grouped.codes.to(torch.int8)),
        lambda: altered(codes=grouped.codes[:, :-1]),
        lambda: altered(scale=-grouped.scale),
        lambda: altered(scale=grouped.scale[1:]),
        lambda: altered(group_scale=None),
        lambda: altered(group_scale=grouped.group_scale * 0),
        lambda: altered(group_scale=grouped.group_scale * torch.inf),
        lambda: altered(group_scale=grouped.group_scale.bfloat16()),
        lambda: altered(group_scale=grouped.group_scale[:, :0]),
        lambda: altered(zero=None),
        lambda: altered(zero=grouped.zero + 16),
        lambda: altered(zero=grouped.zero.int()),
        lambda: altered(minimum=grouped.group_scale),
        lambda: altered(zero=None, minimum=grouped.group_scale.float()),
        lambda: altered(zero=None, minimum=grouped.group_scale * torch.nan),
        lambda: hb.linear(x[:, 1:], p),
        lambda: hb.linear(x.double(), p),
        lambda: hb.linear(x.int(), p),
        lambda: hb.linear(x.to("meta"), p),
        lambda: hb.linear(x.to_sparse(), p),
        lambda: hb.linear(x.tolist(), p),
        lambda: hb.linear(x.numpy().astype(">f4"), p),
        lambda: hb.linear(torch.tensor(1.0), p),
        lambda: hb.linear(x, q),
        lambda: hb.linear(x, p, torch.zeros(n + 1)),
        lambda: hb.linear(x, p, torch.zeros(1, n)),
        lambda: hb.linear(x, p, activation="swish2"),
        lambda: hb.linear(x, p, residual=torch.zeros(m + 1, n)),
        lambda: hb.linear(x, p, residual=torch.zeros(m, n, dtype=torch.int8)),
        lambda: hb.linear(x, p, out_dtype=torch.float64),
        lambda: hb.linear(x, p, static=(0.0, 0)),
        lambda: hb.linear(x, p, static=(float("nan"), 0)),
        lambda: hb.linear(x, p, static=(-1.0, 0)),
        lambda: hb.linear(x, p, static=(0.1, 128)),
        lambda: hb.linear(x, p, torch.zeros(n), out_dtype=torch.int32),
        lambda: hb.quantize(w[0]),
        lambda: hb.quantize(w.double()),
        lambda: hb.quantize(w, "w8a8_g7"),
        lambda: hb.quantize(w.to("meta")),
        lambda: (
            hb.quantize(torch.zeros(2, cases.K_MAX + 1))
            and hb.pack(hb.quantize(torch.zeros(2, cases.K_MAX + 1)))
        ),
        lambda: hb.quantize_rows(x[0, 0]),
        lambda: hb.quantize_rows(x.long()),
        lambda: hb.quantize_rows(x, scale=0.1, zero=300),
        lambda: hb.quantize_rows(x, scale=-0.1, zero=0),
        lambda: hb.pack(w),
    )
    which = int(rng.integers(len(mistakes)))
    try:
        mistakes[which]()
    except (TypeError, ValueError) as error:
        assert str(error), f"mistake {which} has no message"
    else:
        raise AssertionError(f"mistake {which} was accepted")


@pytest.mark.parametrize("part", range(PARTS))
def test_fuzzed_calls(part):
    works = (one_linear, one_linear, one_format, one_layer, one_layer, one_rows, one_weight, one_mistake)
    for i in range(part, CALLS, PARTS):
        seed = SEED + i
        work = works[seed // PARTS % len(works)]
        hb.set_num_threads(1 + seed // (PARTS * len(works)) % 3)
        try:
            work(np.random.default_rng(seed))
        except Exception as error:
            raise AssertionError(
                f"{work.__name__} with seed {seed}: {type(error).__name__}: {error}"
            ) from error
        finally:
            hb.set_num_threads(0)


def small_model() -> torch.nn.Module:
    torch.manual_seed(11)
    return torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3, bias=False))


SAVED = ("w8a8", {"0": "w4a16_g32+asym", "2": "w4a8_g32"})


def damage(rng: np.random.Generator, data: bytes) -> bytes:
    out = bytearray(data)
    pick = rng.integers(6)
    at = int(rng.integers(len(out)))
    if pick == 0:
        return bytes(out[:at])
    if pick == 1:
        out[at] ^= 1 << int(rng.integers(8))
    elif pick == 2:
        out[at : at + int(rng.integers(1, 9))] = rng.bytes(int(rng.integers(0, 9)))
    elif pick == 3:
        out[at:at] = rng.bytes(int(rng.integers(1, 40)))
    elif pick == 4:
        out[:8] = rng.bytes(8)  # the header's length in safetensors
    else:
        start, length = int(rng.integers(len(out))), int(rng.integers(1, 200))
        out[at : at + length] = out[start : start + length]
    return bytes(out)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("part", range(2))
def test_damaged_files(part, tmp_path):
    saved = tmp_path / "saved"
    hb.save(hb.quantize_(small_model(), SAVED[part], progress=False), saved)
    files = sorted(path.name for path in saved.iterdir())
    want, target, fresh = state(hb.load(small_model(), saved)), small_model(), state(small_model())
    refused = 0
    for i in range(part, max(CALLS // 5, 1), 2):
        seed = SEED + i
        rng = np.random.default_rng(seed)
        broken = tmp_path / "broken"
        shutil.copytree(saved, broken)
        name = files[int(rng.integers(len(files)))]
        data = (saved / name).read_bytes()
        changed = damage(rng, data)
        (broken / name).write_bytes(changed)
        try:
            hb.load(target, broken)
        except hb.FormatError as error:
            refused += 1
            assert name in str(error) or str(broken) in str(error), f"seed {seed}: names no file: {error}"
            assert same_state(state(target), fresh), f"seed {seed}: a refused file changed the model"
        except Exception as error:
            raise AssertionError(f"{name} with seed {seed}: {type(error).__name__}: {error}") from error
        else:  # damage that changes no meaning, such as one blank for another in the JSON
            assert same_state(state(target), want), f"seed {seed}: {name}: damaged file gave another model"
            target = small_model()
        shutil.rmtree(broken)
    assert CALLS < 1000 or refused > 0.9 * CALLS / 10
