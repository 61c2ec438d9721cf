"""Process groups, meshes, FSDP and the movement of batches between ranks."""

from RL2.distributed.comm import ScatterPlan, broadcast, gather, scatter, sum_over_ranks
from RL2.distributed.fsdp import full_tensors, shard
from RL2.distributed.mesh import build_mesh
from RL2.distributed.process_group import process_group, rank, second_group, world_size
from RL2.distributed.tensor_parallel import ProcessGroupShard, shard_of

__all__ = [
    "ProcessGroupShard",
    "ScatterPlan",
    "broadcast",
    "build_mesh",
    "full_tensors",
    "gather",
    "process_group",
    "rank",
    "scatter",
    "second_group",
    "shard",
    "shard_of",
    "sum_over_ranks",
    "world_size",
]
