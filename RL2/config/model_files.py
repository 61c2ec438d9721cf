"""The files of a model's folder, read and checked before anything heavy is imported.

Each file that transformers would read must be readable, and the values that RL2 uses must have the
right type. Otherwise a list in place of a number would be a traceback minutes later, and a pipe an
endless wait.
"""

import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from RL2.runtime.errors import ConfigError, one_line
from RL2.runtime.json_objects import reject_duplicate_keys

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_ADAPTER = "adapter_config.json"
_OBJECTS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.json",
)  # fmt: skip
_TEXTS = ("chat_template.jinja", "merges.txt", "vocab.txt")
_OTHERS = (
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_AGAIN = "copy or download the model again"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token(value: Any) -> bool:
    return _is_whole(value) and -1 <= value < 2**31  # -1 in some models: no such token


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _is_template(value: Any) -> bool:
    named = isinstance(value, dict) and [value.get("name"), value.get("template")]
    return bool(named) and all(isinstance(text, str) for text in named)


_Rule = tuple[Callable[[Any], bool], str]
_SIZE: _Rule = (lambda x: _is_whole(x) and x > 0, "must be a whole number, 1 or more")
_WHOLE: _Rule = (_is_whole, "must be a whole number")
_TOKENS: _Rule = (
    lambda x: _is_token(x) or isinstance(x, list) and all(map(_is_token, x)),
    "must be a token id, or a list of token ids",
)
_NUMBER: _Rule = (_is_number, "must be a finite number")
_OBJECT: _Rule = (lambda x: isinstance(x, dict), "must be an object")
_TEXT: _Rule = (lambda x: isinstance(x, str), "must be a text")
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_DTYPE: _Rule = (_DTYPES.__contains__, f"must be one of {', '.join(_DTYPES)}")
# Null or missing values are left to transformers.
_RULES: dict[str, dict[str, _Rule]] = {
    "config.json": {
        **dict.fromkeys(["vocab_size", "max_position_embeddings", "n_positions"], _SIZE),
        "eos_token_id": _TOKENS,
        **dict.fromkeys(["dtype", "torch_dtype"], _DTYPE),
        "is_encoder_decoder": (lambda x: not x, "must be false, as only decoders are trained"),
        "configuration_files": (lambda x: not x, "would be read in place of this file"),
        "text_config": _OBJECT,
        "auto_map": _OBJECT,
        "model_type": _TEXT,
    },
    "generation_config.json": {
        **dict.fromkeys(["eos_token_id", "bos_token_id"], _TOKENS),
        "pad_token_id": _WHOLE,
        **dict.fromkeys(
            ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "length_penalty"],
            _NUMBER,
        ),
    },
    "tokenizer_config.json": {
        "tokenizer_class": _TEXT,
        "model_max_length": _NUMBER,
        "chat_template": (
            lambda x: isinstance(x, str) or isinstance(x, list) and all(map(_is_template, x)),
            "must be a text, or a list of objects with the texts name and template",
        ),
    },
}  # fmt: skip


def read_folder(folder: Path, key: str, pickle_key: str, allow_pickle: bool) -> dict[str, Any]:
    """Check a model's folder and return the contents of its JSON files, by name.

    Args:
        key: `actor.model_name=…`, for messages.
        pickle_key: the key of `allow_pickle`.

    Raises:
        ConfigError: naming the file and what is wrong with it.
    """
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise _unreadable(folder, key, error) from error
    whole = {_INDEX, _SINGLE} & names or any(name.endswith(".bin") for name in names)
    if _ADAPTER in names:
        raise ConfigError(f"{key}: {_with_adapter(folder, key, bool(whole))}")
    if "config.json" not in names:
        raise ConfigError(f"{key}: the folder has no config.json; give one made by save_pretrained")
    contents = {}
    for name in (*_OBJECTS, *_TEXTS, *_OTHERS):
        if name not in names:
            continue
        data = _read(folder / name, key)
        if name in _OBJECTS:
            contents[name] = _object(data, folder / name, key)
        elif name in _TEXTS:
            _check_text(data, folder / name, key)
    for name, rules in _RULES.items():
        _check_values(contents.get(name, {}), rules, folder / name, key)
    described = contents["config.json"]
    text = described.get("text_config") or {}
    _check_values(text, _RULES["config.json"], folder / "config.json", key, "text_config.")
    for part in (described, text):
        check_quantization(part.get("quantization_config"), f"{key}: {folder / 'config.json'}")
    _check_weights(folder, names, key, pickle_key, allow_pickle)
    return contents


def check_quantization(quantization: Any, where: str) -> None:
    """Raise ConfigError for quantised weights, except mxfp4, which transformers turns into floats.

    where: the model's config.json, for the message.
    """
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if quantization and (method != "mxfp4" or method == quantization):
        raise ConfigError(
            f"{where}: quantization_config says {method!r:.80}: quantised weights cannot be "
            "trained; give the model with float weights, whose config.json has no such entry"
        )


def _with_adapter(folder: Path, key: str, whole: bool) -> str:
    if whole:
        return (
            f"has full weights and an adapter ({_ADAPTER}), which may or may not be merged into "
            "them already; merge it into the weights, and remove the file or give a folder "
            "without it"
        )
    base = _object(_read(folder / _ADAPTER, key), folder / _ADAPTER, key)
    base = base.get("base_model_name_or_path")
    return (
        f"the folder holds an adapter alone ({_ADAPTER}), made for {base!r:.200}; merge it into "
        "that model (PeftModel.merge_and_unload), save the result and give its folder"
    )


def _check_values(
    content: dict[str, Any], rules: dict[str, _Rule], path: Path, key: str, prefix: str = ""
) -> None:
    for name, (holds, what) in rules.items():
        value = content.get(name)
        if value is not None and not holds(value):
            raise ConfigError(
                f"{key}: {path}: {prefix}{name}={json.dumps(value):.80}: {what}; correct the file, "
                f"or {_AGAIN}"
            )


def _check_weights(
    folder: Path, names: set[str], key: str, pickle_key: str, allow_pickle: bool
) -> None:
    parts: dict[str, set[str]] = {_SINGLE: set()}  # the names that each file must have
    if _INDEX in names:
        index = _object(_read(folder / _INDEX, key), folder / _INDEX, key).get("weight_map")
        files = set(index.values()) if isinstance(index, dict) and _all_texts(index) else set()
        if not files or not all(Path(one).name == one and one.isprintable() for one in files):
            raise ConfigError(
                f"{key}: {folder / _INDEX} has no weight_map of names to files of the folder; "
                f"{_AGAIN}"
            )
        parts = {file: {name for name in index if index[name] == file} for file in files}
    elif _SINGLE not in names:
        pickled = sorted(name for name in names if name.endswith(".bin"))
        if pickled and allow_pickle:
            for name in pickled:
                _stat(folder / name, key)
            return
        if pickled:
            raise ConfigError(
                f"{key}: its weights are pickled ({pickled[0]}), which can run any code; save them "
                "as safetensors (load, then save_pretrained, in a safe environment), or set "
                f"{pickle_key}=true"
            )
        raise ConfigError(
            f"{key}: the folder has no weights ({_SINGLE}); give one made by save_pretrained"
        )
    for name, held in sorted(parts.items()):
        _check_safetensors(folder / name, held, key)


def _all_texts(index: dict[str, Any]) -> bool:
    return all(isinstance(one, str) for one in index.values())


def _check_safetensors(path: Path, held: set[str], key: str) -> None:
    _stat(path, key)
    try:
        path.open("rb").close()  # safetensors reports an unreadable file as missing
        with safe_open(path, "np") as file:  # reads the header, and compares it with the size
            missing = held.difference(file.keys())
    except OSError as error:
        raise _unreadable(path, key, error) from error
    except SafetensorError as error:
        raise ConfigError(
            f"{key}: {path} is not a whole safetensors file ({one_line(error)}); copy or "
            "download it again"
        ) from error
    if missing:
        raise ConfigError(
            f"{key}: {path} lacks {min(missing)}, which {_INDEX} says is there; {_AGAIN}"
        )


def _stat(path: Path, key: str) -> None:
    """Raise ConfigError unless this is a regular file: reading a pipe would never end."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        what = "a broken link" if os.path.islink(path) else "missing"
        raise ConfigError(f"{key}: {path} is {what}; {_AGAIN}") from error
    except OSError as error:
        raise _unreadable(path, key, error) from error
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{key}: {path} is not a file; {_AGAIN}")


def _read(path: Path, key: str) -> bytes:
    _stat(path, key)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, key, error) from error


def _unreadable(path: Path, key: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"{key}: {path} cannot be read ({error.strerror or one_line(error)}); make it "
        "readable for this user, or copy the model to a place where it is"
    )


def _check_text(data: bytes, path: Path, key: str) -> None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: {path}: not UTF-8 ({one_line(error)}); {_AGAIN}") from error


def _object(data: bytes, path: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(data.decode(), object_pairs_hook=reject_duplicate_keys)
    except json.JSONDecodeError as error:
        place, reason = f"{path}:{error.lineno}:{error.colno}", error.msg
    except RecursionError:
        place, reason = str(path), "lists or objects are nested too deeply"
    except ValueError as error:
        place, reason = str(path), one_line(error)
    else:
        if isinstance(content, dict):
            return content
        place, reason = str(path), "not an object"
    raise ConfigError(f"{key}: {place}: not JSON ({reason}); {_AGAIN}")
