"""Keys that take one of a few words. A key that takes names of a registry is a plain text instead,
and `RL2.config.names` checks it against the registry."""

from enum import StrEnum


class Overlong(StrEnum):
    error = "error"
    drop = "drop"


class Scheduler(StrEnum):
    """Names of `transformers.get_scheduler`."""

    constant = "constant"
    constant_with_warmup = "constant_with_warmup"
    linear = "linear"
    cosine = "cosine"
    cosine_with_restarts = "cosine_with_restarts"
    polynomial = "polynomial"
    inverse_sqrt = "inverse_sqrt"
    warmup_stable_decay = "warmup_stable_decay"


class KLType(StrEnum):
    loss = "loss"
    reward = "reward"
    advantage = "advantage"


class Divergence(StrEnum):
    tv = "tv"
    kl = "kl"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class WeightSync(StrEnum):
    auto = "auto"
    tensor = "tensor"
    distributed = "distributed"
    disk = "disk"


class Truncated(StrEnum):
    keep = "keep"
    mask = "mask"
    zero = "zero"
