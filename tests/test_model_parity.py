"""Logits against those of transformers (tests/golden/), and the same bytes however a prompt is cut."""

from __future__ import annotations

from pathlib import Path

import golden_models
import model_folder
import numpy as np
import pytest

from forge_c.models import load

# Both sides compute in float32; what is left is rounding that grows with depth. Relative to the largest logit.
PARITY = 2e-5


@pytest.mark.parametrize("name", golden_models.names())
def test_logits_are_those_of_transformers(name: str, tmp_path: Path, isa: str) -> None:
    case = golden_models.golden(name)
    model = load(case.write(tmp_path))
    assert model.dtype == "float32"
    got = model(case.ids)
    assert got.dtype == np.float32 and got.shape == case.logits.shape
    assert np.abs(got - case.logits).max() <= PARITY * np.abs(case.logits).max()


@pytest.mark.parametrize("name", golden_models.names())
def test_chunks_and_single_tokens_give_the_bytes_of_the_whole_prompt(name: str, tmp_path: Path) -> None:
    case = golden_models.golden(name)
    model, (batch, seq) = load(case.write(tmp_path, shards=2)), case.ids.shape
    whole = model(case.ids)
    for cuts in ([0, 3, 20, 21, seq], range(seq + 1)):
        cache = model.new_cache(batch, seq)
        with cache.expecting(seq):
            parts = [model(case.ids[:, a:b], cache) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        assert np.concatenate(parts, axis=1).tobytes() == whole.tobytes()
        assert cache.seq_len == seq


@pytest.mark.parametrize("name", golden_models.names())
def test_a_row_gives_the_bytes_it_gives_alone(name: str, tmp_path: Path) -> None:
    case = golden_models.golden(name)
    model = load(case.write(tmp_path))
    together = model(np.concatenate([case.ids, case.ids[::-1, ::-1], case.ids]))
    for row, ids in enumerate(case.ids):
        assert model(ids[None]).tobytes() == together[row].tobytes()


def test_every_family_and_ratio_has_a_golden_model() -> None:
    cases = [golden_models.golden(name) for name in golden_models.names()]
    families = {c.config["model_type"] for c in cases}
    assert families == {*model_folder.FAMILIES, *model_folder.STATE_SPACE}
    ratios = {c.config["num_attention_heads"] // c.config["num_key_value_heads"] for c in cases
              if c.config["model_type"] not in model_folder.STATE_SPACE}
    assert ratios >= {1, 2, 3, 4, 8}
    assert any(np.abs(c.logits).max() > 1 for c in cases)
