"""`profile` of fused models: phases of blocks from the events of the threads, without unfusing anything."""

import pytest

torch = pytest.importorskip("torch", reason="profile is of torch models")

import halfbyte as hb  # noqa: E402
from halfbyte import _core  # noqa: E402
from halfbyte.fuse.attach import fused_of  # noqa: E402
from halfbyte.profiling.stacks import IDLE, PHASES, attended, spent, together  # noqa: E402
from profiles import assert_nothing_is_lost, check_trace, checked, rows  # noqa: E402

IDS = {"input_ids": torch.arange(14).reshape(2, 7)}
QKV, ATTENTION, OUT = (PHASES.index(name) for name in ("qkv", "attention", "o"))
BLOCK = ["qkv", "attention", "o", "up", "down"]


def bert(**options):
    transformers = pytest.importorskip("transformers", reason="BERT is a model of transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, **options,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=True).eval()
    return hb.fuse_(hb.quantize_(model, progress=False))


def assert_phases(profile, name, phases, layers=2):
    for i in range(layers):
        assert [p for layer, p in rows(profile) if layer == name.format(i)] == phases


def test_bert():
    model = bert()
    with torch.no_grad():
        before = model(**IDS).last_hidden_state
        profile = checked(model, IDS)
        assert torch.equal(model(**IDS).last_hidden_state, before)
        assert_nothing_is_lost(model, lambda: model(**IDS))
    (fused,) = profile.fused
    assert fused.kind == "BERT encoder" and fused.calls == 1 + 2 * 3 and fused.unfused == {}
    assert_phases(profile, "encoder.layer.{}", BLOCK)
    found = rows(profile)
    qkv, attention = found["encoder.layer.0", "qkv"], found["encoder.layer.1", "attention"]
    assert qkv.op == "linear_w8a8" and qkv.shape == "32 -> 96" and qkv.operations == 2 * 14 * 32 * 96
    assert attention.operations == 4 * 2 * 7 * 7 * 32 and attention.kernel == _core.select("attention")
    assert attention.bytes == 4 * 4 * 14 * 32, "q, k, v and what comes out"
    packs = sum(m._prepare().nbytes + m.bias.nbytes for m in model.encoder.layer[0].attention.self.children()
                if isinstance(m, hb.QLinear))  # fmt: skip
    assert qkv.bytes == packs + 4 * 14 * (32 + 96)
    assert all(row.idle_ms is not None and 0 <= row.idle_ms <= row.ms for row in profile.rows if row.phase)
    assert found["embeddings.word_embeddings", ""].op == "Embedding", (
        "what the stack does not do is looked at too"
    )
    assert found["pooler.dense", ""].op == "linear_w8a8"
    assert "BERT encoder" in str(profile)


def test_bert_by_sequences():
    ids = {"input_ids": torch.arange(400).reshape(10, 40) % 50}
    with torch.no_grad():
        profile = checked(bert(), ids)
    assert_phases(profile, "encoder.layer.{}", BLOCK)


def test_a_fused_module_that_steps_aside_is_looked_into():
    model = bert(attn_implementation="eager")
    profile = checked(model, IDS | {"output_attentions": True})
    (fused,) = profile.fused
    assert fused.calls == 0 and sum(fused.unfused.values()) == 1 + 2 * 3
    assert rows(profile)["encoder.layer.1.attention.self.query", ""].op == "linear_w8a8"
    assert next(iter(fused.unfused)) in str(profile)
    with torch.no_grad():
        assert checked(model, IDS).fused[0].calls == 1 + 2 * 3, "and is fused again when it can be"


def test_a_fused_module_that_steps_aside_now_and_then():
    model = bert(attn_implementation="eager")

    def call():
        model(**IDS)
        model(**IDS, output_attentions=True)

    profile = checked(model, call)
    assert (profile.fused[0].calls, sum(profile.fused[0].unfused.values())) == (7, 7)
    assert_phases(profile, "encoder.layer.{}", BLOCK)
    assert rows(profile)["encoder.layer.0", "qkv"].calls == 1
    with torch.no_grad():
        assert_nothing_is_lost(model, call)


def test_float_encoder_of_torch():
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = hb.fuse_(torch.nn.Sequential(encoder, torch.nn.Linear(32, 3)).eval())
    profile = checked(model, torch.randn(2, 5, 32))
    assert_phases(profile, "0.layers.{}", BLOCK)
    up = rows(profile)["0.layers.0", "up"]
    assert up.op == "linear_f32" and up.operations == 2 * 10 * 32 * 64
    assert up.bytes == 4 * (32 * 64 + 64) + 4 * 10 * (32 + 64)


def test_patterns_stay_fused():
    class Mlp(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act, self.down = torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16)

        def forward(self, x):
            return self.down(self.act(self.up(x)))

    model = hb.fuse_(hb.quantize_(torch.nn.Sequential(Mlp(), torch.nn.LayerNorm(16)), progress=False))
    assert fused_of(model[0]) is not None
    profile = checked(model, torch.zeros(5, 16))
    found = rows(profile)
    assert list(found) == [("0", ""), ("1", "")] and profile.fused[0].unfused == {}
    assert found["0", ""].op == "linear_w8a8" and found["0", ""].operations == 2 * 2 * 5 * 16 * 32


def llama():
    transformers = pytest.importorskip("transformers", reason="Llama is a model of transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=None,
    )  # fmt: skip
    return hb.fuse_(hb.quantize_(transformers.LlamaForCausalLM(config).eval(), progress=False))


@pytest.mark.parametrize("by", ["hb.generate", "model.generate", "calls"])
def test_generating_tokens(by):
    model, ids = llama(), torch.arange(5)[None]

    def generate():
        if by == "hb.generate":
            return hb.generate(model, ids, max_new_tokens=3)
        if by == "model.generate":
            return model.generate(ids, max_new_tokens=3, do_sample=False)
        new, cache = ids, None
        for _ in range(3):
            answer = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            new, cache = answer.logits[:, -1:].argmax(-1), answer.past_key_values

    profile = checked(model, generate)
    (fused,) = profile.fused
    assert fused.layer == "model" and fused.calls == 3 * (1 + 2 * 3) and not fused.unfused
    assert_phases(profile, "model.layers.{}", ["qkv", "rope", "attention", "o", "up", "down"])
    found = rows(profile)
    attention = found["model.layers.0", "attention"]
    assert attention.calls == 3 and attention.operations == 4 * 32 * (15 + 6 + 7)
    assert attention.shape == "4 heads of 8, 2 of k and v"
    assert attention.bytes == 4 * (2 * 7 * 32 + 2 * (5 + 6 + 7) * 16)
    rope = found["model.layers.1", "rope"]
    assert rope.bytes == 4 * 7 * (2 * (32 + 16) + 2 * 16), "q and k in and out, k and v into the cache"
    up = found["model.layers.1", "up"]
    assert up.shape == "32 -> 128" and up.operations == 2 * 2 * 7 * 32 * 64, "gate and up"
    assert found["model", "output"].op == "norm"
    assert found["lm_head", ""].operations == 2 * 3 * 32 * 50
    assert found["model.embed_tokens", ""].calls == 3
    with torch.no_grad():
        assert_nothing_is_lost(model, generate, alone=True)


def test_trace_of_a_fused_model(tmp_path):
    with torch.no_grad():
        profile = hb.profile(bert(), IDS, rounds=1, warmup=1, ceilings=False)
    profile.to_chrome_trace(tmp_path / "trace.json")
    events = check_trace(tmp_path / "trace.json", profile.total_ms)
    threads = [e for e in events if e["tid"] > 0]
    assert {"encoder.layer.0 qkv", "encoder.layer.1 attention"} <= {e["name"] for e in threads}
    (blocks,) = [e for e in events if e["cat"] == "fused"]
    assert blocks["args"] == {"batch": 2, "tokens": 7}
    for e in threads:
        assert blocks["ts"] <= e["ts"] + 1e-3 and e["ts"] + e["dur"] <= blocks["ts"] + blocks["dur"] + 1e-3


# Times from the events of threads.


def test_threads_that_wait_for_each_other():
    events = [(0, QKV, 0, 100, 200), (0, QKV, 1, 110, 240), (0, OUT, 0, 200, 300), (0, OUT, 1, 240, 310)]
    found = spent(events)
    assert (found[0, "qkv"].time, found[0, "qkv"].idle) == (140, 20)
    assert (found[0, "o"].time, found[0, "o"].idle) == (70, 5)
    assert found[0, "qkv"].begin == 100 and found[0, "o"].begin == 240


def test_threads_on_their_own():
    events = [(0, QKV, 0, 0, 100), (0, OUT, 0, 100, 150), (0, QKV, 1, 10, 60), (0, OUT, 1, 60, 90)]
    assert not together([events[:2], events[2:]])
    found = spent(events)
    assert found[0, "qkv"].time == 75 and found[0, "o"].time == 40
    assert found[-1, IDLE].time == 35 and sum(phase.time for phase in found.values()) == 150


def test_one_thread_never_waits():
    found = spent([(1, QKV, 0, 5, 10), (1, ATTENTION, 0, 10, 30)])
    assert {key: (phase.time, phase.idle) for key, phase in found.items()} == {
        (1, "qkv"): (5, 0),
        (1, "attention"): (20, 0),
    }


@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (5, 5), (4, 10)])
def test_pairs_of_attention(queries, keys, window):
    seen = [
        key <= query and not (window and query - key >= window)
        for query in range(keys - queries, keys)
        for key in range(keys)
    ]
    assert attended(queries, keys, True, window) == sum(seen)
    assert attended(queries, keys, False, 0) == queries * keys
