"""The transformer benchmark's corpus obeys its law, and its entries are methods of bnn."""

import numpy as np
import pytest

import bnn
from benchmarks import transformers


def test_tags_follow_from_the_word_and_the_last_marker():
    rows = transformers.corpus(0)
    right = []
    for words, tags in zip(rows.x, rows.y, strict=True):
        last = 0
        for word, tag in zip(words, tags, strict=True):
            if word == 0:
                break
            marker = word <= transformers.MARKERS
            last = word if marker else last
            right.append(tag == (4 if marker else (word + last) % 4))
    # .05 drawn anew from five tags leave .96 right; a binomial sd of .002 on 9,000 words
    assert abs(np.mean(right) - 0.96) < 0.01
    assert (rows.x[:, 0] > 0).all()
    assert (rows.x[:, 0] <= transformers.MARKERS).all()


def test_strange_rows_have_words_never_seen():
    rows = transformers.corpus(0)
    strange = rows.strange["unseen words"]
    assert strange.max() >= transformers.WORDS > rows.x.max()
    assert ((strange > 0) == rows.real).all()


@pytest.mark.parametrize("name", transformers.METHODS)
def test_every_entry_is_a_method(name):
    assert isinstance(transformers.METHODS[name].method(800), bnn.Method)


@pytest.mark.slow
@pytest.mark.parametrize("problem", transformers.PROBLEMS)
@pytest.mark.parametrize("prior", [True, False])
def test_a_fit_is_scored(problem, prior, monkeypatch):
    entry = transformers.Entry("MAP", {"schedule": "constant"}, prior=prior)
    monkeypatch.setitem(transformers.METHODS, "short", entry)
    found = transformers.run(transformers.Job(problem, "short", 0, ""), steps=2)
    assert 0 <= found["accuracy"] <= 1
    assert np.isfinite([v for v in found.values() if isinstance(v, float)]).all()
    assert sum(key.startswith("AUROC") for key in found) in (2, 4)
