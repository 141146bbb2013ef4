"""How halfbyte.generate chooses tokens, by itself."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="logits are tensors")

from halfbyte import sampling  # noqa: E402


@pytest.mark.parametrize("vocabulary", [3, 300, 3000])
@pytest.mark.parametrize("top_k", [0, 40])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_the_nucleus_is_that_of_transformers(vocabulary, top_k, top_p):
    pytest.importorskip("transformers", reason="what it is compared with")
    from transformers.generation import TopPLogitsWarper

    for spread in (0.1, 1.0, 4.0):
        logits = torch.randn(5, vocabulary) * spread
        if 0 < top_k < vocabulary:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        want = TopPLogitsWarper(top_p)(None, logits)
        got = sampling._nucleus(logits, top_p, top_k)
        differ = (got != want).sum()
        assert differ <= 1, "a rounding may move one token over the border"
        assert (got.isfinite().sum(-1) >= 1).all()


def test_draws_follow_the_probabilities():
    pick = sampling.sampler(1.0, 0, 1.0, torch.Generator().manual_seed(0))
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = torch.from_numpy(pick(probabilities.log().expand(20000, 4)))
    found = draws.bincount(minlength=4) / 20000
    # six standard deviations
    assert ((found - probabilities).abs() < 6 * (probabilities * (1 - probabilities) / 20000).sqrt()).all()


def test_greedy_takes_the_first_of_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0], [-torch.inf, -torch.inf, -5.0]])
    assert sampling.greedy(logits).tolist() == [1, 2]
