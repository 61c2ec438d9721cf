"""Checks of a model without loading it: whether its files are whole, and whether they run code.

Pickled weights and Python files that come with a model run with the rights of the user who loads
them. Both are off by default, and code from the hub needs a fixed commit.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from RL2.config.model_files import read_folder
from RL2.config.paths import not_there
from RL2.runtime.errors import ConfigError, first_line

POLICY = "policy"
"""As the name of a teacher: the actor itself."""
HUB_NAME = r"[\w\-][\w.\-]*"
_HUB_MODEL = re.compile(rf"{HUB_NAME}/{HUB_NAME}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_TIMEOUT = 5.0  # seconds for the one request that finds out whether the hub answers


def hub_options(node: DictConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` of a config, tokenizer or model for `node.model_name`.

    `code_revision` belongs to the repository that holds the code. If that is not the model's, the
    commit does not exist there, and nothing is loaded.
    """
    options = {"trust_remote_code": node.trust_remote_code}
    if node.revision is not None:
        options |= {"revision": node.revision, "code_revision": node.revision}
    return options


def weight_options(node: DictConfig) -> dict[str, Any]:
    """As `hub_options`, for weights: by default transformers falls back to pickled ones."""
    return hub_options(node) | ({} if node.allow_pickle else {"use_safetensors": True})


def check_model(node: DictConfig, group: str) -> None:
    """Check that a model is a folder whose files are whole, or has the form of a hub id.

    Raises:
        ConfigError: it is neither, or its code or pickled weights would run without permission.
    """
    name = node.model_name
    key = f"{group}.model_name={name}"
    folder = Path(name)
    local = bool(name) and os.path.isdir(folder)
    # `models/tiny` also has the form of a hub id, but if there is a folder `models`, it is a typing
    # error that must not turn into a download.
    if not local and (not _HUB_MODEL.fullmatch(name) or os.path.isdir(folder.parent)):
        raise ConfigError(
            f"{key}: {not_there(name, 'folder')}, and not a hub id; give a folder made by "
            "save_pretrained, or org/name such as Qwen/Qwen3-4B-Thinking-2507"
        )
    contents = None
    if local:
        contents = read_folder(folder, key, f"{group}.allow_pickle", node.allow_pickle)
    _check_revision(node, group, contents)


def ask_hub(node: DictConfig, group: str) -> None:
    """Ask the hub once for a model that is not a folder: without a network `from_pretrained`
    repeats its own request for most of a minute. A cached copy is enough.

    Raises:
        ConfigError: the hub has no such model, or does not answer and nothing is cached.
    """
    name = node.model_name
    if os.path.isdir(name):
        return
    # Imported here, as runs on folders do not need it.
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    key = f"{group}.model_name={name}"
    try:
        # The same request as the first one of from_pretrained, so that it has the same answer.
        url = hf_hub_url(name, "config.json", revision=node.revision)
        get_hf_file_metadata(url, timeout=HUB_TIMEOUT)
    except EntryNotFoundError as error:
        raise ConfigError(
            f"{key}: the hub has no config.json there, so it is not a transformers model; give one "
            "that is, or a folder made by save_pretrained"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{key}: the hub has no model of this name that you may read; check the name, or log "
            "in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(
            f"{group}.revision={node.revision}: {name} has no such commit; the hub lists its "
            "commits under the model's history"
        ) from error
    except Exception as error:  # no network, a proxy, offline mode: many unrelated classes
        cached = try_to_load_from_cache(name, "config.json", revision=node.revision)
        if not isinstance(cached, str):
            raise ConfigError(
                f"{key}: the request to the hub failed ({first_line(error)}), and no "
                "copy is cached; give a folder made by save_pretrained"
            ) from error


def context_length(name: str) -> int | None:
    """Positions that the model of a local folder was made for; None where its files do not say."""
    try:
        described = json.loads(Path(name, "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    described = described.get("text_config") or described  # both checked by `check_model`
    length = described.get("max_position_embeddings", described.get("n_positions"))
    return length if isinstance(length, int) else None


def _check_revision(node: DictConfig, group: str, contents: dict[str, Any] | None) -> None:
    """contents: the JSON files of a local folder; None for a hub id."""
    revision, key = node.revision, f"{group}.revision"
    if revision is not None and not _COMMIT.fullmatch(revision):
        raise ConfigError(
            f"{key}={revision}: must be a commit, 40 digits of 0-9 and a-f, as branches and tags "
            "move; the hub shows it under the model's history"
        )
    # A folder has no revisions, but may name code on the hub: "owner/name--file.Class".
    files = [(contents or {}).get(name, {}) for name in ("config.json", "tokenizer_config.json")]
    elsewhere = any("--" in json.dumps(file.get("auto_map")) for file in files)
    if contents is not None and not elsewhere:
        if revision is not None and not OmegaConf.is_interpolation(node, "revision"):
            raise ConfigError(
                f"{key}={revision}: has no effect on the folder {node.model_name}; leave it out"
            )
    elif node.trust_remote_code and revision is None:
        raise ConfigError(
            f"{group}.trust_remote_code=true: would run whatever code is on the hub at the time "
            f"of the run; set {key} to the commit that you have read, or download the model "
            "with its code and give the folder"
        )
