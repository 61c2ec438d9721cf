"""Resolve `auto` for this machine, and report once each setting that has no effect on it."""

from collections.abc import Set

from omegaconf import DictConfig, OmegaConf

from RL2.config.engines import EMBEDDED, SERVERS
from RL2.config.flat import as_text
from RL2.config.groups import call_each
from RL2.config.schema.choices import Device, Dtype
from RL2.runtime.errors import ConfigError


def apply_fallbacks(config: DictConfig, cuda: bool, available: Set[str]) -> list[str]:
    """Resolve `auto`, and replace settings that this machine does not support, in place.

    Afterwards `device` is cpu or cuda, `rollout.engine` names an engine, `attn_implementation` is
    what transformers takes, `use_liger_kernel` is true or false, `dtype` is float32 or bfloat16.
    On CUDA attention and dtype may stay `auto`: they follow from the dtype of the checkpoint
    (`RL2.models.dtypes`).

    Args:
        config: composed and validated.
        cuda: whether the machine has a CUDA device.
        available: names of the optional packages that can be imported (`flash_attn`,
            `liger_kernel`, `peft`, `sglang`, `triton`, `vllm`).

    Returns:
        One line for each setting that has no effect here.

    Raises:
        ConfigError: `device=cuda` without a CUDA device; `token_stats=triton` or `triton_fused`
            without CUDA or triton; `actor.lora` without peft; `rollout.engine=sglang` or `vllm`
            where it is neither installed nor given; `rollout.tp_size` above 1 without servers.
    """
    lines = call_each(
        (
            _without_peft,
            _critic_without_peft,
            _saved_dtype,
            _actor,
            _ref_actor,
            _teacher,
            _critic,
            _rollout,
            _escaped_stops,
        ),  # fmt: skip
        config,
        cuda=cuda,
        available=available,
    )
    return [line for some in lines for line in some]


def _without_peft(actor: DictConfig, available: Set[str]) -> list[str]:
    return _check_peft(actor, "actor", available)


def _critic_without_peft(critic: DictConfig, available: Set[str]) -> list[str]:
    return _check_peft(critic, "critic", available)


def _check_peft(node: DictConfig, group: str, available: Set[str]) -> list[str]:
    rank = node.lora.rank
    if rank is not None and "peft" not in available:
        raise ConfigError(
            f"{group}.lora.rank={rank}: needs peft, which is not installed; install it "
            "(pip install RL2[lora]), or leave it out"
        )
    return []


def _saved_dtype(trainer: DictConfig, actor: DictConfig) -> list[str]:
    if trainer.save_dtype == Dtype.auto and actor.dtype != Dtype.auto:
        trainer.save_dtype = actor.dtype
    return []


def _actor(actor: DictConfig, cuda: bool, available: Set[str]) -> list[str]:
    return _model(actor, "actor", cuda, available)


def _ref_actor(ref_actor: DictConfig, cuda: bool, available: Set[str]) -> list[str]:
    return _model(ref_actor, "ref_actor", cuda, available)


def _critic(critic: DictConfig, cuda: bool, available: Set[str]) -> list[str]:
    return _model(critic, "critic", cuda, available)


def _teacher(teacher: DictConfig, cuda: bool, available: Set[str]) -> list[str]:
    return [] if teacher.model_name is None else _model(teacher, "teacher", cuda, available)


def _escaped_stops(rollout: DictConfig) -> list[str]:
    """Warn of stop texts with a backslash and a letter where a newline or a tab is meant: neither
    the shell nor hydra converts them."""
    warnings = []
    for name in ("train_sampling_params", "test_sampling_params"):
        stop = rollout[name].stop
        texts = [stop] if isinstance(stop, str) else stop or []
        if OmegaConf.is_interpolation(rollout[name], "stop"):
            continue  # reported for the other key
        for letter, what in (("n", "newline"), ("t", "tab"), ("r", "carriage return")):
            if any(f"\\{letter}" in text for text in texts):
                quoted = ",".join('"{}"'.format(text.replace("'", "\\'")) for text in texts)
                quoted = quoted if isinstance(stop, str) else f"[{quoted}]"
                warnings.append(
                    f"rollout.{name}.stop={as_text(stop)}: has a backslash and the letter "
                    f"{letter}, which a model hardly ever writes; for a {what} write "
                    f"rollout.{name}.stop=$'{quoted}' in bash, or \"\\{letter}\" in YAML"
                )
    return warnings


def _model(node: DictConfig, group: str, cuda: bool, available: Set[str]) -> list[str]:
    warnings = []

    def own(key: str) -> bool:
        # What follows another key was resolved, and warned about, there.
        return not OmegaConf.is_interpolation(node, key)

    def fall_back(key: str, value: object, why: str) -> None:
        warnings.append(f"{group}.{key}={as_text(node[key])}: {why}")
        node[key] = value

    if own("device"):
        if node.device == Device.cuda and not cuda:
            raise ConfigError(
                f"{group}.device=cuda: this machine has no CUDA device; use auto or cpu"
            )
        if node.device == Device.auto:
            node.device = Device.cuda if cuda else Device.cpu
    on_cuda = node.device == Device.cuda

    if own("dtype") and node.dtype == Dtype.auto and not on_cuda:
        node.dtype = Dtype.float32
    if own("attn_implementation"):
        flash = on_cuda and "flash_attn" in available
        if node.attn_implementation == "auto":
            # Flash attention has no fp32 kernels; with auto, the checkpoint decides later.
            if not flash or node.dtype == Dtype.float32:
                node.attn_implementation = "sdpa_varlen"
            elif node.dtype == Dtype.bfloat16:
                node.attn_implementation = "flash_attention_2"
        elif node.attn_implementation == "flash_attention_2" and not flash:
            needs = "needs flash-attn, which is not installed" if on_cuda else "needs CUDA"
            fall_back("attn_implementation", "sdpa_varlen", f"{needs}; using sdpa_varlen")
    if own("use_liger_kernel") and node.use_liger_kernel == "auto":
        # torch.compile fuses the same operations.
        compiled = "compile" in node and node.compile
        node.use_liger_kernel = on_cuda and "liger_kernel" in available and not compiled
    elif own("use_liger_kernel") and node.use_liger_kernel:
        if not on_cuda:
            fall_back("use_liger_kernel", False, "needs CUDA; running without it")
        elif "liger_kernel" not in available:
            why = "needs liger-kernel, which is not installed; running without it"
            fall_back("use_liger_kernel", False, why)
    if node.get("token_stats", "").startswith("triton"):
        asked = f"{group}.token_stats={node.token_stats}"
        if not on_cuda:
            raise ConfigError(f"{asked}: needs CUDA, and {group}.device is cpu; use auto")
        if "triton" not in available:
            raise ConfigError(
                f"{asked}: needs triton, which is not installed; use auto, or install it "
                "(pip install triton)"
            )
    for key in ("offload_model", "offload_optimizer", "offload_activations"):
        if not on_cuda and key in node and own(key) and node[key]:
            fall_back(key, False, "everything is in CPU memory already; ignored")
    return warnings


def _rollout(rollout: DictConfig, actor: DictConfig, available: Set[str]) -> list[str]:
    warnings, on_cuda = [], actor.device == Device.cuda
    if rollout.engine == "auto":
        installed = [name for name in SERVERS if name in available]
        rollout.engine = installed[0] if on_cuda and installed else EMBEDDED
        if on_cuda and not installed:
            warnings.append(
                f"rollout.engine=auto: neither {' nor '.join(SERVERS)} is installed; using "
                f"{EMBEDDED}, which is slow for long responses of large models"
            )
    if rollout.dtype == Dtype.auto:
        rollout.dtype = actor.dtype if on_cuda else Dtype.float32
    elif rollout.dtype == Dtype.bfloat16 and not on_cuda:
        warnings.append("rollout.dtype=bfloat16: needs CUDA; using float32")
        rollout.dtype = Dtype.float32
    if rollout.engine not in SERVERS:
        return warnings + _without_servers(rollout, on_cuda)

    ours = rollout.server_url is None
    if ours and rollout.server_python is None and rollout.engine not in available:
        raise ConfigError(
            f"rollout.engine={rollout.engine}: not installed here; install it (pip install "
            f"RL2[{rollout.engine}]), or give the interpreter of an environment that has it: "
            "rollout.server_python=<environment>/bin/python"
        )
    if rollout.sleep is None:
        rollout.sleep = on_cuda and ours and rollout.staleness == 0
    elif rollout.sleep and not on_cuda:
        warnings.append("rollout.sleep=true: needs CUDA; the servers stay awake")
        rollout.sleep = False
    if rollout.gpu_memory_utilization is not None and not on_cuda:
        warnings.append(
            f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization}: needs CUDA; ignored"
        )
        rollout.gpu_memory_utilization = None
    return warnings


def _without_servers(rollout: DictConfig, on_cuda: bool) -> list[str]:
    """Reset the options that only servers have."""
    if rollout.tp_size > 1:
        raise ConfigError(
            f"rollout.tp_size={rollout.tp_size}: is only for server engines, and rollout.engine is "
            f"{rollout.engine}; use 1"
        )
    warnings = []
    if rollout.gpu_memory_utilization is not None:
        takes = f"the {rollout.engine} engine takes memory as it needs it"
        why = takes if on_cuda else "needs CUDA"
        warnings.append(
            f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization}: {why}; ignored"
        )
        rollout.gpu_memory_utilization = None
    for key, off in _SERVER_OPTIONS.items():
        if rollout[key] not in (None, off):
            warnings.append(
                f"rollout.{key}={as_text(rollout[key])}: the {rollout.engine} engine starts no "
                "server; ignored"
            )
        rollout[key] = off
    return warnings


_SERVER_OPTIONS = {
    "base_port": None,
    "server_python": None,
    "server_args": [],
    "servers_per_node": None,
    "weight_sync": "auto",
    "weights_dir": None,
    "sleep": False,
}
