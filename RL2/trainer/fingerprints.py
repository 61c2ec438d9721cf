"""What tells apart the things that a run is made of, wherever their files lie."""

import inspect
import json
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from RL2.algorithms.token_loss import TokenLoss
from RL2.workers.loading import model_fingerprint

__all__ = [
    "model_fingerprint",
    "of_run",
    "source_fingerprint",
    "tokenizer_fingerprint",
    "tokenizer_parts",
]


def source_fingerprint(path_or_object: str | Path | Callable[..., Any]) -> str:
    """A SHA-256 of a Python file, or of the file in which a function stands: its own text, not
    what it imports.

    An object without a file, such as one that is built in, has its name alone.
    """
    if isinstance(path_or_object, (str, Path)):
        return sha256(Path(path_or_object).read_bytes()).hexdigest()
    function = path_or_object
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    if not (inspect.isroutine(function) or inspect.isclass(function)):
        function = type(function)
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        file = None
    if file is None:
        name = f"{function.__module__}.{function.__qualname__}"
        return sha256(name.encode()).hexdigest()
    return source_fingerprint(file)


def of_run(
    config: DictConfig, tokenizer: PreTrainedTokenizerBase, loss: TokenLoss, ref: bool
) -> dict[str, str]:
    """Of what decides a run beside its config and its rows of data.

    ref: whether it has a reference model.
    """
    models = ("actor", "ref_actor") if ref else ("actor",)
    found = {
        f"{name}.model_name": model_fingerprint(config[name].model_name, config[name].revision)
        for name in models
    } | tokenizer_parts(tokenizer)
    if config.actor.loss.import_path is not None:
        found["actor.loss.import_path"] = source_fingerprint(loss.function)
    if "rollout" in config:
        found["rollout.env_path"] = source_fingerprint(config.rollout.env_path)
    return found


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A SHA-256 of all that `tokenizer_parts` tells apart."""
    return _digest(tokenizer_parts(tokenizer))


def tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """A SHA-256 each of a tokenizer's `vocabulary` (which token has which number), of its `rules`
    (how text becomes tokens, and which tokens are special), and of its `chat template`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    model = rules.get("model") or {}
    model.pop("vocab", None)
    for of_a_call in ("padding", "truncation"):
        rules.pop(of_a_call, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {
        "vocabulary": _digest(tokenizer.get_vocab()),
        "rules": _digest([type(tokenizer).__name__, rules, special]),
        "chat template": _digest(tokenizer.chat_template),
    }


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
