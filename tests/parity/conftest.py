"""What the comparisons share."""

from typing import Any

import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random Mixtral as a Hugging Face folder, and imported (`hf_mixtral.Folders`); tests only read it."""
    from tests.distributed.harness import launch
    from tests.parity.hf_mixtral import make_model

    return launch(1, make_model, str(tmp_path_factory.mktemp("model")))[0]
