import math

import pytest

from dltrain.meter import duration, human, mfu, peak_flops


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "fp16", 756.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA B200", "fp32", 75),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A10", "fp16", 125),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
    ],
)
def test_known_peaks(name: str, dtype: str, tflops: float):
    assert peak_flops(name, dtype) == tflops * 1e12


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16"),
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA L40", "bf16"),
        ("NVIDIA H20", "bf16"),
        ("NVIDIA GH200 480GB", "bf16"),
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("Tesla V100-SXM2-32GB", "bf16"),  # no such tensor cores
        ("NVIDIA H100 80GB HBM3", "fp8"),
        ("AMD Instinct MI300X", "bf16"),
        ("cpu", "fp32"),
    ],
)
def test_unknown_device_has_no_peak(name: str, dtype: str):
    assert peak_flops(name, dtype) is None


def test_mfu():
    assert mfu(156e12, 312e12) == 0.5
    assert mfu(156e12, None) is None


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (7, "7"),
        (950, "950"),
        (999.4, "999"),
        (999.6, "1.00K"),
        (1000, "1.00K"),
        (9996, "10.0K"),
        (12345, "12.3K"),
        (123456, "123K"),
        (999_600, "1.00M"),
        (1.2e9, "1.20G"),
        (-1.2e9, "-1.20G"),
        (5e12, "5.00T"),
        (1.5e21, "1500E"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_human(x: float, text: str):
    assert human(x) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (8.4, "8s"),
        (59.6, "1m00s"),
        (75, "1m15s"),
        (3599.6, "1h00m"),
        (3725, "1h02m"),
        (86399, "1d00h"),
        (90000, "1d01h"),
        (math.inf, "n/a"),
        (math.nan, "n/a"),
    ],
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text
