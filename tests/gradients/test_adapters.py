"""The page that says which adapters are exact, slow or refused says what they are."""

import pytest

from tests.gradients.adapters import ADAPTERS, MODELS, PAGE, outcome


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_is_what_the_page_says(adapter, model, tmp_path):
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf8").splitlines() if line[:1] == "|"]
    said = {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}
    assert set(said) == set(ADAPTERS)
    assert outcome(adapter, model, tmp_path) == said[adapter][model]
