import pytest

from tests.rollout.support import make_model, make_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory):
    """Folder of a tiny Qwen3 over the byte tokenizer. About one token in ten ends a response."""
    return make_model(tmp_path_factory.mktemp("qwen3"), eos_token_id=[1, *range(60, 86)])
