"""Throughput as people read it: model FLOPs utilisation (MFU) and short numbers. Pure functions, no torch.

MFU is model FLOPs per second over the device's peak (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311,
appendix B). A device that is not in the table has no MFU: never a guess.
"""

import math
import re

# Dense peaks in TFLOP/s: (pattern of the whole CUDA device name, bf16, fp16, fp32). fp32 is without tensor cores (TF32
# off). Data sheets state tensor-core peaks with 2:4 sparsity from the A100 on: those are halved here.
_PEAKS: tuple[tuple[str, float | None, float | None, float | None], ...] = (
    # NVIDIA Blackwell, HGX B200 data sheet (2025): 4.5 PFLOP/s with sparsity
    (r"B200", 2250.0, 2250.0, 75.0),
    # NVIDIA H200 data sheet (2024): SXM 1,979 and NVL 1,671 with sparsity
    (r"H200", 989.5, 989.5, 67.0),
    (r"H200 NVL", 835.5, 835.5, 60.0),
    # NVIDIA H100 data sheet (2023): SXM 1,979, PCIe 1,513 and NVL 1,671 with sparsity
    (r"H100 80GB HBM3", 989.5, 989.5, 67.0),
    (r"H100 PCIe", 756.5, 756.5, 51.0),
    (r"H100 NVL", 835.5, 835.5, 60.0),
    # NVIDIA A100 data sheet (2021): the same compute on every board
    (r"A100-SXM4-(40|80)GB|A100-PCI[Ee]-(40|80)GB|A100 80GB PCIe", 312.0, 312.0, 19.5),
    # NVIDIA L40S data sheet (2023); L4 data sheet (2023): 242 with sparsity
    (r"L40S", 362.05, 362.05, 91.6),
    (r"L4", 121.0, 121.0, 30.3),
    # NVIDIA A10 data sheet (2021). Not A10G, which is another chip's cut
    (r"A10", 125.0, 125.0, 31.2),
    # NVIDIA V100 data sheet (2020). Its tensor cores have no bfloat16
    (r"V100-SXM2-(16|32)GB", None, 125.0, 15.7),
    (r"V100-PCIE-(16|32)GB", None, 112.0, 14.0),
    # NVIDIA Ada GPU architecture whitepaper (2023), appendix A: tensor cores accumulating in fp32
    (r"RTX 4090", 165.2, 165.2, 82.6),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak in FLOP/s of a device as `torch.cuda.get_device_name` names it; dtype is "bf16", "fp16" or "fp32".

    None for any other device (a slice of one, MIG, included) or dtype.
    """
    name = re.sub(r"^(NVIDIA|Tesla|GeForce) ", "", re.sub(r"^NVIDIA (?=Tesla|GeForce)", "", device_name.strip()))
    for pattern, bf16, fp16, fp32 in _PEAKS:
        if re.fullmatch(pattern, name):
            peak = {"bf16": bf16, "fp16": fp16, "fp32": fp32}.get(dtype)
            return None if peak is None else peak * 1e12
    return None


def mfu(flops_per_second: float, peak: float | None) -> float | None:
    """Fraction of the peak (of all devices together, if the FLOPs are); None where there is none."""
    return None if peak is None else flops_per_second / peak


def human(x: float) -> str:
    """Three digits and a unit of a thousand: 1.2e9 -> "1.20G", 950 -> "950", 0.25 -> "0.25"."""
    if not math.isfinite(x):
        return str(x)
    if abs(x) < 999.5:
        return f"{x:.3g}"
    for unit in "KMGTPE":
        x /= 1000.0
        if abs(x) < 999.5 or unit == "E":
            break
    digits = 2 if abs(x) < 9.995 else 1 if abs(x) < 99.95 else 0
    return f"{x:.{digits}f}{unit}"


def duration(seconds: float) -> str:
    """Two largest units, rounded: 8 -> "8s", 75 -> "1m15s", 3725 -> "1h02m", 90000 -> "1d01h"; "n/a" if not finite."""
    if not math.isfinite(seconds):
        return "n/a"
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    m = round(seconds / 60)
    if m < 1440:
        return f"{m // 60}h{m % 60:02d}m"
    h = round(seconds / 3600)
    return f"{h // 24}d{h % 24:02d}h"
