"""The GPU and the ranks of a run as Lightning wants to be told of them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy

from data.cluster import Place, place
from toolkit import ranks


class Gpu(CUDAAccelerator):
    """Lightning's, which lets cuBLAS keep its scratch memory where a Trainer begins and ends.

    CUDA graphs have its place written down: the decoder's, and the steps of other rows in the process.
    """

    def setup(self, trainer: L.Trainer) -> None:
        pass

    def teardown(self) -> None:
        pass


class Launched(ClusterEnvironment):
    """Where data.cluster.place found this process. To Lightning each process is a node with one device.

    So the device is the one that the run has chosen, also where the launcher shows each process only its own.
    The processes have met before (`ranks.joined`), so nothing is started and no address is used again.
    """

    def __init__(self, found: Place) -> None:
        super().__init__()
        self.found = found

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self.found.master[0] if self.found.master else "localhost"

    @property
    def main_port(self) -> int:
        return self.found.master[1] if self.found.master else 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.found.world

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.found.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return self.found.rank


def placed(device: torch.device) -> dict[str, Any]:
    """Arguments of a Trainer: one process on `device`, or DDP over the ranks that have joined."""
    accelerator = Gpu() if device.type == "cuda" else "cpu"
    here = {"accelerator": accelerator, "devices": 1 if device.index is None else [device.index]}
    if ranks.world() == 1:
        return here
    # A micro batch without a picture gives the projector no gradient, on this rank alone perhaps: without the
    # search for unused parameters the others would wait for it for ever.
    strategy = DDPStrategy(find_unused_parameters=True)
    return {**here, "num_nodes": ranks.world(), "strategy": strategy, "plugins": [Launched(place())]}
