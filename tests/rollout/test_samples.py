"""The text of what the policy wrote; other tests of samples stand with the player."""

import pytest
from tokenizers import decoders

from RL2.engines.protocol import Completion, SamplingParams
from tests.prefix_tokenizers import SPACE, llama_2, metaspace
from tests.rollout.support import action_text

DROPS_A_SPACE = {
    "llama 2": (
        llama_2,
        decoders.Sequence(
            [
                decoders.Replace(SPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
    ),
    "metaspace": (lambda: metaspace("first"), decoders.Metaspace(SPACE, prepend_scheme="first")),
}


@pytest.mark.parametrize("kind", DROPS_A_SPACE)
@pytest.mark.parametrize("said", [" 4", "4", " yes 4", ""])
def test_an_action_keeps_the_space_that_it_begins_with(kind, said):
    make, decoder = DROPS_A_SPACE[kind]
    tokenizer = make()
    tokenizer.backend_tokenizer.decoder = decoder
    n_before = len(tokenizer.encode("2+2=", add_special_tokens=False))
    ids = tokenizer.encode("2+2=" + said, add_special_tokens=False)
    completion = Completion(ids[n_before:], [-1.0] * (len(ids) - n_before), "length", [])
    action = action_text(completion, SamplingParams(1.0, 4), tokenizer)
    assert "2+2=" + action == tokenizer.decode(ids) == "2+2=" + said
