"""Names of devices as their drivers give them."""

import pytest
import torch

from dft_lightning.planning.peaks import DEVICES, find_device, product_of


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla V100-PCIE-32GB", "V100 PCIe"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("h200", "H200"),
    ],
)
def test_drivers_names(name, expected):
    assert find_device(name).name == expected


@pytest.mark.parametrize("name", ["cpu", "mps", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A1000"])
def test_what_is_not_listed_is_not_guessed(name):
    assert find_device(name) is None


def test_every_device_is_found_by_its_own_name():
    for device in DEVICES:
        name = device.name.replace("V100 PCIe", "V100-PCIE")
        assert find_device(name) is device


def test_the_peak_is_of_the_products():
    h100, v100 = find_device("h100"), find_device("v100")
    assert h100.peak("bfloat16") == pytest.approx(989.4e12)
    assert h100.peak("tf32") == h100.peak("bfloat16") / 2
    assert h100.peak("float32") == pytest.approx(66.9e12)
    assert v100.peak("bfloat16") is None  # it has no such unit
    assert v100.peak("tf32") == v100.peak("float32") == pytest.approx(15.7e12)


def test_precisions(monkeypatch):
    assert product_of("bf16-true", torch.bfloat16) == "bfloat16"
    assert product_of("bf16-mixed", torch.float32) == "bfloat16"
    assert product_of("16-mixed", torch.float32) == "float16"
    assert product_of("32-true", torch.bfloat16) == "bfloat16"  # model.dtype
    assert product_of("64-true", torch.float64) is None
    for setting, product in (("highest", "float32"), ("high", "tf32"), ("medium", "tf32")):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda setting=setting: setting)
        assert product_of("32-true", torch.float32) == product
