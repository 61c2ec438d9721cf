"""Fingerprints of a run's inputs, which do not depend on where the files are."""

import json
import sys
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from RL2.config.user_code import user_code
from RL2.datasets.end_of_turn import EndTokens
from RL2.models.loading import model_fingerprint
from RL2.runtime.errors import first_line
from RL2.trainer.checkpoints.manifest import digest
from RL2.trainer.startup.own_modules import with_imports

NOT_READABLE = "not readable:"


def of_run(
    config: DictConfig,
    tokenizer: PreTrainedTokenizerBase,
    ends: EndTokens,
    datasets: Mapping[str, Dataset],
    models: Iterable[str],
) -> dict[str, str]:
    """Fingerprints of what a run depends on besides its config and training rows, by key, or by
    name for the parts of actor.model_name.

    datasets: the data sets that were read, by the node that names them.
    models: the nodes of the models that will be loaded.
    """
    found = {}
    for key, places in user_code(config).items():
        found[key] = " ".join(source_fingerprint(_file_of(place)) for place in places)
    if (env_path := OmegaConf.select(config, "rollout.env_path")) is not None:
        found["rollout.env_path"] = source_fingerprint(env_path)
    for name, key in (("test_data", "test_data.path"), ("data.test_path", "data.test_path")):
        if name in datasets:
            found[key] = datasets[name].fingerprint
    found |= {f"{name}.model_name": _of_model(config[name]) for name in models}
    found |= tokenizer_parts(tokenizer)
    found["end tokens"] = str([sorted(ends.ids), ends.saved])
    generation = Path(config.actor.model_name, "generation_config.json")
    if generation.is_file():
        found["generation config"] = sha256(generation.read_bytes()).hexdigest()
    return found


def _file_of(location: str) -> str:
    """The file behind `file.py` or `package.module`, which was imported."""
    return location if location.endswith(".py") else sys.modules[location].__file__


def readable(found: Mapping[str, str]) -> dict[str, str]:
    """The fingerprints of what could be read."""
    return {name: text for name, text in found.items() if not text.startswith(NOT_READABLE)}


def _of_model(node: DictConfig) -> str:
    """The fingerprint of a model's weights and config, and of code in its folder."""
    try:
        found = model_fingerprint(node.model_name, node.revision)
        code = b"".join(path.read_bytes() for path in sorted(Path(node.model_name).glob("*.py")))
    except Exception as error:  # broken files may raise anything; loading reports it
        return f"{NOT_READABLE} {first_line(error)}"
    return sha256(found.encode() + code).hexdigest() if code else found


def source_fingerprint(file: str | Path) -> str:
    """A SHA-256 of a Python file and of the user's modules that it imports."""
    texts = sha256()
    for name, text in sorted(with_imports(Path(file)).items()):
        texts.update(name.encode() + text)
    return texts.hexdigest()


def tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """A SHA-256 each of its `vocabulary` (the number of each token), of the rest of the `tokenizer`
    (how text becomes tokens, and which of them are special), and of its `chat template`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    model = rules.get("model") or {}
    model.pop("vocab", None)
    for of_a_call in ("padding", "truncation"):
        rules.pop(of_a_call, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {
        "vocabulary": digest(tokenizer.get_vocab()),
        "tokenizer": digest([type(tokenizer).__name__, rules, special]),
        "chat template": digest(tokenizer.chat_template),
    }
