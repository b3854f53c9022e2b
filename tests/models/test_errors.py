"""Messages about checkpoints stay short, whatever a damaged file holds."""

import json

import pytest

from models import CheckpointError, TokenizerError, load_model
from models.errors import LONGEST

pytestmark = pytest.mark.once


@pytest.mark.parametrize("kind", [CheckpointError, TokenizerError])
def test_a_long_value_is_cut_out_of_the_middle(kind):
    said = str(kind(f"config.json: name is {'x' * 1_000_000}, expected a word. Convert it again."))
    assert len(said) <= LONGEST + 5
    assert said.startswith("config.json: name is xxx")
    assert said.endswith("expected a word. Convert it again.")
    assert str(kind("short")) == "short"


def test_a_key_of_a_megabyte_does_not_fill_the_page(tmp_path):
    sizes = {"model_type": "llama", "hidden_act": "x" * 1_000_000}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path)
    assert len(str(error.value)) <= LONGEST + 5
