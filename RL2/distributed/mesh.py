"""Device meshes."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from RL2.distributed.process_group import world_size


def build_mesh(device_type: str, ddp_size: int) -> DeviceMesh:
    """Mesh `(ddp, fsdp)` over all ranks: replicas outside, shards inside (HSDP).

    `ddp_size` must divide the world size; `RL2.config.validate` has checked that with the key's
    name long before.
    """
    return init_device_mesh(
        device_type, (ddp_size, world_size() // ddp_size), mesh_dim_names=("ddp", "fsdp")
    )
