"""Process groups, meshes, FSDP and the movement of batches between ranks."""

from RL2.distributed.comm import ScatterPlan, broadcast, gather, scatter, sum_over_ranks
from RL2.distributed.fsdp import clip_gradients, full_tensors, shard
from RL2.distributed.mesh import Layout, build_mesh, sequence_parallel_mesh
from RL2.distributed.process_group import process_group, rank, second_group, world_size
from RL2.distributed.tensor_parallel import ProcessGroupShard, parallelize, shard_of
from RL2.distributed.traffic import Traffic

__all__ = [
    "Layout",
    "ProcessGroupShard",
    "ScatterPlan",
    "Traffic",
    "broadcast",
    "build_mesh",
    "clip_gradients",
    "full_tensors",
    "gather",
    "parallelize",
    "process_group",
    "rank",
    "scatter",
    "second_group",
    "sequence_parallel_mesh",
    "shard",
    "shard_of",
    "sum_over_ranks",
    "world_size",
]
