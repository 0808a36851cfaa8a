"""Machines by name: memory, bandwidths and latencies, as their makers state them. Compute peaks are dltrain.meter's."""

from dataclasses import dataclass

from dltrain.errors import UserError
from dltrain.meter import peak_flops

GB = 1e9


@dataclass(frozen=True)
class Machine:
    """Bandwidths in bytes/s, each way; latencies in seconds. `node` is GPUs of a node."""

    name: str
    device: str  # as torch.cuda.get_device_name has it: what meter.peak_flops knows
    memory: float  # bytes of a GPU
    hbm: float  # to its memory
    watts: float  # of a GPU at its limit
    node: int
    link: float  # of a GPU to the others of its node
    network: float  # of a GPU's share of its node's network
    link_latency: float = 3e-6  # of one message
    network_latency: float = 8e-6

    def peak(self, precision: str) -> float | None:
        """FLOP/s."""
        return peak_flops(self.device, precision)


MACHINES = {
    machine.name: machine
    for machine in (
        # NVIDIA DGX H100 data sheet (2023): NVLink 900 GB/s both ways together, eight 400 Gb/s InfiniBand
        Machine("h100", "NVIDIA H100 80GB HBM3", 80 * GB, 3350 * GB, 700, 8, 450 * GB, 50 * GB),
        # NVIDIA DGX H200 data sheet (2024)
        Machine("h200", "NVIDIA H200", 141 * GB, 4800 * GB, 700, 8, 450 * GB, 50 * GB),
        # NVIDIA DGX B200 data sheet (2024): 1,440 GB in eight GPUs, NVLink 1,800 GB/s, eight 400 Gb/s
        Machine("b200", "NVIDIA B200", 180 * GB, 8000 * GB, 1000, 8, 900 * GB, 50 * GB),
        # NVIDIA DGX A100 data sheet (2021): NVLink 600 GB/s, eight 200 Gb/s
        Machine("a100", "NVIDIA A100-SXM4-80GB", 80 * GB, 2039 * GB, 400, 8, 300 * GB, 25 * GB),
        Machine("a100-40", "NVIDIA A100-SXM4-40GB", 40 * GB, 1555 * GB, 400, 8, 300 * GB, 25 * GB),
        # NVIDIA L40S data sheet (2023): PCIe 4.0 x16, no NVLink; a 100 Gb/s Ethernet port for two
        Machine("l40s", "NVIDIA L40S", 48 * GB, 864 * GB, 350, 8, 32 * GB, 6.25 * GB, 5e-6, 30e-6),
        # NVIDIA V100 data sheet (2020), DGX-1: NVLink 300 GB/s, four 100 Gb/s InfiniBand
        Machine("v100", "Tesla V100-SXM2-32GB", 32 * GB, 900 * GB, 300, 8, 150 * GB, 6.25 * GB),
    )
}


def machine(name: str) -> Machine:
    """Raises UserError for a name that is not in the table."""
    if name not in MACHINES:
        raise UserError(f"no machine {name!r}: choose one of {', '.join(MACHINES)}")
    return MACHINES[name]
