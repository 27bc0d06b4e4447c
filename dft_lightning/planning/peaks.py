"""The fastest that a device multiplies matrices by its maker's word, and how much memory it has.

Dense figures: data sheets often print the twice as high ones of 2:4 sparsity. Consumer and workstation cards are listed
with accumulation in float32, which is what torch's products use.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch

Product = Literal["bfloat16", "float16", "tf32", "float32"]
"""What the factors of a matrix product are rounded to."""


@dataclass(frozen=True)
class Device:
    """A kind of accelerator.

    Args:
        name: as one would call it.
        pattern: what the name that the driver gives matches, in lower case.
        half: TFLOP/s in bfloat16 and float16.
        tf32: TFLOP/s in TF32; 0 if it has none.
        float32: TFLOP/s in float32.
        gib: memory that a program sees, of the largest variant.
        bfloat16: whether it multiplies bfloat16 at that rate.
    """

    name: str
    pattern: str
    half: float
    tf32: float
    float32: float
    gib: float
    bfloat16: bool = True

    def peak(self, product: Product) -> float | None:
        """FLOP/s; None where the device has no such unit, or it is not known."""
        known = {
            "bfloat16": self.half if self.bfloat16 else 0.0,
            "float16": self.half,
            "tf32": self.tf32 or self.float32,  # the setting changes nothing on a device without it
            "float32": self.float32,
        }
        return known[product] * 1e12 or None


#: By NVIDIA's data sheets ("Tensor Core GPU Datasheet" of each; Ada and Blackwell: the architecture white papers'
#: tables; B200 and GB200: the HGX and NVL72 pages, an eighth and a 72nd) and AMD's for the MI300X.
DEVICES = (
    Device("B200", r"\bb200\b", 2250, 1125, 75, 178),
    Device("GB200", r"\bgb200\b", 2500, 1250, 80, 184),
    Device("H200 NVL", r"\bh200 nvl\b", 835.5, 417.5, 60, 139),
    Device("H200", r"\bh200\b", 989.4, 494.7, 66.9, 139),
    Device("GH200", r"\bgh200\b", 989.4, 494.7, 66.9, 94),
    Device("H100 PCIe", r"\bh100 pcie\b", 756, 378, 51.2, 79),
    Device("H100 NVL", r"\bh100 nvl\b", 835.5, 417.5, 60, 93),
    Device("H100", r"\bh100\b", 989.4, 494.7, 66.9, 79),
    Device("A100", r"\ba100\b", 312, 156, 19.5, 79),
    Device("A40", r"\ba40\b", 149.7, 74.8, 37.4, 44),
    Device("A30", r"\ba30\b", 165, 82, 10.3, 23),
    Device("A10", r"\ba10\b", 125, 62.5, 31.2, 22),
    Device("L40S", r"\bl40s\b", 362, 183, 91.6, 44),
    Device("L40", r"\bl40\b", 181, 90.5, 90.5, 44),
    Device("L4", r"\bl4\b", 121, 60, 30.3, 22),
    Device("V100 PCIe", r"\bv100-pcie\b", 112, 0, 14, 31, bfloat16=False),
    Device("V100", r"\bv100\b", 125, 0, 15.7, 31, bfloat16=False),
    Device("T4", r"\bt4\b", 65, 0, 8.1, 14, bfloat16=False),
    Device("RTX 5090", r"\brtx 5090(?! (d|laptop))", 209.5, 104.8, 104.8, 31),
    Device("RTX 4090", r"\brtx 4090(?! (d|laptop))", 165.2, 82.6, 82.6, 23),
    Device("RTX 3090", r"\brtx 3090(?! ti)", 71, 35.6, 35.6, 23),
    Device("RTX 6000 Ada", r"\brtx 6000 ada\b", 364.2, 182.1, 91.1, 47),
    Device("RTX A6000", r"\brtx a6000\b", 154.8, 77.4, 38.7, 47),
    Device("MI300X", r"\bmi300x\b", 1307.4, 653.7, 163.4, 191),
)


def find_device(name: str) -> Device | None:
    """The device by its driver's or a user's name, as "NVIDIA H100 80GB HBM3" or "h100"; None if it is not listed."""
    return next((device for device in DEVICES if re.search(device.pattern, name.lower())), None)


def product_of(precision: str, weights: torch.dtype) -> Product | None:
    """What the model's matrix products are rounded to; None for one whose peak is in no table.

    Args:
        precision: as in `trainer.precision`.
        weights: dtype of the model's weights.
    """
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    dtype = mixed.get(precision, weights)
    if dtype == torch.float32:
        return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    known: dict[torch.dtype, Product] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return known.get(dtype)
