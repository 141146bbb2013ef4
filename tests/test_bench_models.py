"""`halfbyte bench model` and `bench decoder`: other tools compute the same model, or say why they cannot."""

import json
import statistics
import sys
import types
from pathlib import Path

import pytest

from halfbyte.bench import decoder, fusion, generation, minilm, perplexity, render, smollm2
from halfbyte.bench.peers import UnavailableError, models
from halfbyte.cli import main

torch = pytest.importorskip("torch", reason="models of transformers")

VOCABULARY = 96
FAST = ["--threads", "1", "--rounds", "2"]


def batch(*lengths):
    """Random tokens, padded on the right to the longest of `lengths`."""
    mask = torch.tensor([[int(i < n) for i in range(max(lengths))] for n in lengths])
    ids = torch.randint(1, VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(sum(lengths)))
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def encoder():
    """A BERT of random weights, large enough that its attention matters."""
    transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture
def small_minilm(encoder, monkeypatch):
    """`bench model` on the small encoder."""
    monkeypatch.setattr(minilm, "load", lambda: (encoder, None))
    monkeypatch.setattr(minilm, "fixed_batch", lambda tokenizer, rows, tokens: batch(*[tokens] * rows))


class Tokenizer:
    """A token per character."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(c) % VOCABULARY for c in text]}


@pytest.fixture
def small_smollm2(monkeypatch):
    """`bench decoder` on a Llama of random weights."""
    transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    monkeypatch.setattr(smollm2, "load", lambda path=None: (model, Tokenizer()))
    monkeypatch.delenv(perplexity.TEXT_VARIABLE, raising=False)


def prepared(name, model):
    """The peer, or the test is skipped with its reason."""
    task = models.Encoder(model, 1, lambda: [batch(n) for n in (9, 17, 30, 40)])
    try:
        return models.prepare(name, task)
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "name", [name for name in models.PEERS if name != "torchao"]
)  # compiles for a minute
def test_peers_compute_the_same_encoder(name, encoder):
    build = prepared(name, encoder)
    for lengths in ((5,), (24, 9, 17)):
        inputs = batch(*lengths)
        try:
            forward = build(inputs)
        except UnavailableError as error:
            pytest.skip(str(error))
        with torch.no_grad():
            # The input of each call counts, not that of the build.
            for given in (batch(*reversed(lengths)), inputs):
                cosine = (minilm.embed(forward.call, given) * minilm.embed(encoder, given)).sum(1)
                limit = 0.99999 if name.endswith("fp32") else 0.9 if name == "torch-int8" else 0.98
                assert limit < float(cosine.min()) <= 1.0001, (lengths, cosine)
        assert forward.note


def test_onnxruntime_fuses_the_attention(encoder, monkeypatch):
    pytest.importorskip("onnxruntime", reason="the bench extra is not installed")
    from halfbyte.bench.peers import onnxruntime_model

    kept = {}
    monkeypatch.setattr(
        onnxruntime_model, "_session_call", lambda path, *_: kept.setdefault(path.name, path.read_bytes())
    )
    monkeypatch.setattr(onnxruntime_model, "fastest", lambda calls, seconds: next(iter(calls)))
    prepared("onnxruntime-fp32", encoder)(batch(5))
    import onnx

    operators = [node.op_type for node in onnx.load_from_string(kept["fused.onnx"]).graph.node]
    assert operators.count("Attention") == 2 and operators.count("SkipLayerNormalization") == 4
    assert "Softmax" not in operators and "Erf" not in operators


def test_onnxruntime_takes_bert_only():
    pytest.importorskip("onnxruntime", reason="the bench extra is not installed")
    transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=1, n_heads=2, hidden_dim=32
    )
    build = prepared("onnxruntime-fp32", transformers.DistilBertModel(config).eval())
    with pytest.raises(UnavailableError, match="written for BERT; the model is 'distilbert'"):
        build(batch(5))


def test_model_names_peers_that_fail(capsys, small_minilm, monkeypatch):
    def one_row_only(task):
        def build(inputs):
            if len(inputs["input_ids"]) > 1:
                raise ValueError("one row only")
            return models.Forward(task.model, "the model itself")

        return build

    fake = types.ModuleType("halfbyte.bench.peers.fake")
    fake.row = one_row_only
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setitem(models.PEERS, "fake", "fake.row")
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "halfbyte.bench.peers.onnxruntime_model", raising=False)
    monkeypatch.delitem(sys.modules, "halfbyte.bench.peers.onnxruntime_int8", raising=False)
    argv = ["bench", "model", "--shape", "1x8,2x8", "--vs", "fake,onnxruntime-int8,openvino-int8", *FAST]
    monkeypatch.setattr(minilm, "calibration", lambda tokenizer: [batch(8)])
    assert main([*argv, "--round-ms", "1", "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    one, two = result["results"]
    ours = ["torch-fp32", "halfbyte", "halfbyte-fused", "halfbyte-fused-fp32"]
    assert [row["name"] for row in one["rows"]] == [*ours, "fake"]
    assert [row["name"] for row in two["rows"]] == ours
    assert one["rows"][4]["min_cosine"] == pytest.approx(1) and one["rows"][4]["note"] == "the model itself"
    assert result["ours"] == "halfbyte-fused" and set(result["bytes"]) == set(ours[:3])
    for shape in (one, two):
        rows = {row["name"]: row for row in shape["rows"]}
        for name in ours[2:]:  # nothing but fused calls
            assert rows[name]["note"].endswith("BERT encoder: 2 blocks in one call")
        assert rows["halfbyte-fused-fp32"]["min_cosine"] == pytest.approx(1, abs=1e-5)
        reference = rows["halfbyte-fused"]["samples_ms"]
        for name, row in rows.items():
            expected = statistics.median(a / b for a, b in zip(row["samples_ms"], reference, strict=True))
            expected = None if name == "halfbyte-fused" else pytest.approx(expected)
            assert row["ours_is_faster_by"] == expected
    assert two["unavailable"]["fake"] == "ValueError: one row only"
    for shape in (one, two):
        for name in ("onnxruntime-int8", "openvino-int8"):
            assert shape["unavailable"][name].endswith("is not installed; pip install 'halfbyte[bench]'")
    assert "2x8  fake" in (text := render.render(result, "table")) and "one row only" in text


def test_calibration_covers_the_topics(monkeypatch):
    monkeypatch.setattr(minilm, "tokenize", lambda tokenizer, texts: texts)
    found = minilm.calibration(None, 16)
    assert len(found) == len({text for (text,) in found}) == 16


# decoder


def test_decoder(capsys, small_smollm2, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, "halfbyte.bench.peers.llama_cpp", raising=False)
    argv = ["bench", "decoder", "--prompt", "16,8", "--decode", "3", "--scheme", "w4a8_g32,w8a8", *FAST]
    assert main([*argv, "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in result["rows"]}
    ours = ["halfbyte w4a8_g32", "halfbyte w8a8"]
    assert list(rows) == ["torch-fp32", *ours, "halfbyte w4a8_g32 unfused", "torch-bf16"]
    assert result["ours"] == ours[0]
    for name, row in rows.items():
        assert ("Llama decoder: 2 blocks in one call; hb.generate" in row["note"]) == (name in ours)
        assert "not fused" not in row["note"]
        before = row["unfused_loss"]
        assert before == (pytest.approx(row["loss"], abs=0.01) if name in ours else None)
    assert rows[ours[0]]["unfused_loss"] == rows[f"{ours[0]} unfused"]["loss"]
    assert set(result["unavailable"]) == {"llama.cpp-q4_0", "llama.cpp-q8_0"}
    for why in result["unavailable"].values():
        assert why == "package 'llama_cpp' is not installed; pip install 'halfbyte[bench-llm]'"
    for row in rows.values():
        measures = row["measures"]
        assert [(m["what"], m["tokens"]) for m in measures] == [
            ("prefill", 8),
            ("prefill", 16),
            ("decode", 3),
        ]
        for measure, ours in zip(measures, rows["halfbyte w4a8_g32"]["measures"], strict=True):
            seconds = measure["samples_s"]
            assert measure["tokens_per_s"] == pytest.approx(measure["tokens"] / statistics.median(seconds))
            ratio = statistics.median(a / b for a, b in zip(seconds, ours["samples_s"], strict=True))
            expected = None if measure is ours else pytest.approx(ratio)
            assert measure["ours_is_faster_by"] == expected
        assert row["loss"] == pytest.approx(rows["torch-fp32"]["loss"], abs=0.1)
    assert rows["halfbyte w4a8_g32"]["weight_bytes"] < rows["torch-fp32"]["weight_bytes"] / 3
    text = render.render(result, "markdown")
    assert (
        "| halfbyte w4a8_g32 is |" in text
        and "| unfused loss |" in text
        and "not measured: package 'llama_cpp'" in text
    )


def test_decoder_times_the_tokens_of_generate(small_smollm2, monkeypatch):
    import halfbyte as hb

    model = hb.fuse_(smollm2.quantized(smollm2.load()[0], "w8a8"))
    ids, asked = torch.randint(VOCABULARY, (1, 12)), []

    def generate(model, ids, tokens, *, streamer=None, **options):
        asked.append((ids.shape[1], tokens, options["eos_token_id"], options["cache_dtype"]))
        for i in range(tokens if streamer else 0):
            clock[0] += 100 if i == 0 else i  # the prompt is no part of decoding
            streamer(ids[:, -1])

    clock = [0]
    (short, long), decode = generation.samplers("x", model, ids, [5, 12], 3)
    monkeypatch.setattr(hb, "generate", generate)
    monkeypatch.setattr(generation.time, "perf_counter", lambda: clock[0])
    assert decode.sample() == 1 + 2 + 3 and short.sample() == long.sample() == 0
    assert asked == [(12, 4, [], "bfloat16"), (5, 1, [], "bfloat16"), (12, 1, [], "bfloat16")]
    assert (short.name, long.name, decode.name) == ("prefill 5 x", "prefill 12 x", "decode x")


@pytest.mark.filterwarnings("ignore:a BertModel that is fused")  # runs its own forward: what is tested
def test_calls_that_are_not_fused_are_named(encoder):
    import copy

    import halfbyte as hb

    model = hb.fuse_(copy.deepcopy(encoder))
    with torch.no_grad():
        model(**batch(5))
    assert fusion.describe(model) == "BERT encoder: 2 blocks in one call"
    model(**batch(5))
    assert "1 calls not fused: a gradient is wanted" in fusion.describe(model)
    assert fusion.describe(torch.nn.Linear(4, 4)) == "nothing to fuse"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt", "0"], "0 is not a positive number"),
        (["--prompt", "8,x"], "invalid"),
        (["--vs", "llama.cpp"], "unknown peer 'llama.cpp'; known: torch-bf16, llama.cpp-q4_0"),
        (["--scheme", "w3a8"], "w3a8"),
        (["--round-ms", "5"], "unrecognized arguments"),  # a sample is one prompt, or all of its tokens
    ],
)
def test_decoder_says_what_is_wrong(capsys, options, says):
    with pytest.raises(SystemExit):
        main(["bench", "decoder", *options])
    assert says in capsys.readouterr().err


def test_decoder_knows_how_long_the_model_reads(capsys, small_smollm2):
    assert main(["bench", "decoder", "--prompt", "60", "--decode", "8", "--vs", "none"]) == 2
    assert "pass the model's limit of 64" in capsys.readouterr().err


def test_decoder_reads_the_file_that_is_named(capsys, tmp_path):
    for module in ("transformers", "gguf"):
        pytest.importorskip(module, reason="the demo extra is not installed")
    assert main(["bench", "decoder", "--gguf", str(tmp_path / "none.gguf")]) == 2
    assert "none.gguf is no file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def llama_cpp():
    pytest.importorskip("llama_cpp", reason="the bench-llm extra is not installed", exc_type=ImportError)
    from halfbyte.bench.peers import llama_cpp

    return llama_cpp


@pytest.fixture(scope="module")
def smollm2_sentence():
    """(GGUF file, tokens of a sentence, their loss in float32, the likeliest token after them)."""
    pytest.importorskip("gguf", reason="the demo extra is not installed")
    try:
        path = smollm2.gguf_path()
    except ImportError as error:
        pytest.skip(str(error))
    model, tokenizer = smollm2.load()
    ids = tokenizer("The capital of France is Paris, and the capital of Germany is", add_special_tokens=False)
    ids = torch.tensor(ids["input_ids"])
    with torch.inference_mode():
        likeliest = int(model(ids[None]).logits[0, -1].argmax())
    return path, ids.tolist(), perplexity.window_loss(model, ids), likeliest


# The file's 4-bit codes have zero points and are what the float32 model is made of; Q4_0 has no zero points.
@pytest.mark.parametrize(
    ("kind", "weight_bytes", "tolerance"), [("file", 96.6e6, 0.02), ("q8_0", 143e6, 0.1), ("q4_0", 89.9e6, 1)]
)
def test_llama_cpp_runs_the_same_model(llama_cpp, smollm2_sentence, kind, weight_bytes, tolerance):
    path, ids, loss, likeliest = smollm2_sentence
    model = llama_cpp.Model(path, kind)
    assert model.weight_bytes == pytest.approx(weight_bytes, rel=1e-3)
    ways = llama_cpp.contexts(model, 64, 1)
    for context in ways.values():
        assert context.loss(ids) == pytest.approx(loss, abs=tolerance)
        whole = context.append(ids)
        context.crop(0)
        context.append(ids[:-1])
        assert context.append(ids[-1:]) == whole == likeliest
        context.crop(len(ids) - 1)
        assert context.append(ids[-1:]) == likeliest
    prefill = llama_cpp.Prefill("x", ways, ids)
    decode = llama_cpp.Decode("x", ways, ids, 3)
    assert prefill.sample() > 0 and decode.sample() > 0 and {prefill.chosen, decode.chosen} <= set(ways)


def test_llama_cpp_says_why_not(llama_cpp, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(UnavailableError, match=r"cannot load bad.gguf: \w"):
        llama_cpp.Model(tmp_path / "bad.gguf", "file")
    with pytest.raises(UnavailableError, match="cannot quantize bad.gguf"):
        llama_cpp.Model(tmp_path / "bad.gguf", "q4_0")


def test_every_row_has_its_function():
    for where in models.PEERS.values():
        module, _, function = where.partition(".")
        source = Path(models.__file__).with_name(f"{module}.py").read_text()
        assert f"\ndef {function}(task: Encoder) -> Build:" in source
    assert set(decoder.DEFAULT_PEERS) <= set(decoder.PEERS)
