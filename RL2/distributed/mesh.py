"""The layout of the ranks, and torch's device mesh over it."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from RL2.distributed.process_group import world_size


@dataclass(frozen=True)
class Layout:
    """How the ranks share the tokens: rank = (dp * sp_size + sp) * tp_size + tp.

    Data-parallel ranks work on different micro-batches, the ranks of a sequence-parallel group on
    consecutive slices of the same one, the ranks of a tensor-parallel group on the same tokens.
    Neighbours communicate most, so that tensor parallelism stays inside a machine.
    """

    world_size: int = 1
    sp_size: int = 1
    tp_size: int = 1

    @property
    def dp_size(self) -> int:
        return self.world_size // (self.sp_size * self.tp_size)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """`(dp, sp, tp)` of a rank."""
        rest, tp = divmod(rank, self.tp_size)
        dp, sp = divmod(rest, self.sp_size)
        return dp, sp, tp


def build_mesh(device_type: str, ddp_size: int, tp_size: int = 1) -> DeviceMesh:
    """Mesh `(ddp, fsdp, tp)` over all ranks: replicas of a model outside, shards of it inside.

    A model is sharded over both sequence-parallel and data-parallel ranks: they see different
    tokens, whose gradients are summed. The product of the sizes must divide the world size, which
    `RL2.config.validate` has checked before.
    """
    shape = (ddp_size, world_size() // (ddp_size * tp_size), tp_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("ddp", "fsdp", "tp"))


def sequence_parallel_mesh(device_type: str, layout: Layout) -> DeviceMesh:
    """One-dimensional mesh of the ranks that share this rank's packs."""
    shape = (layout.dp_size, layout.sp_size, layout.tp_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("dp", "sp", "tp"))["sp"]
