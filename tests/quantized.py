"""A tiny model whose base is in 4 bits, where bitsandbytes is."""

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from transformers.utils import is_bitsandbytes_available

from dft_lightning.loading import ModelSource, load_model

needs_bitsandbytes = pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes (extra qlora)")
#: 64 weights share a scale, so that rows have to be multiples of that.
BIG = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def saved(folder, **changes):
    """Such a model in whole precision, as a folder."""
    tiny_model(**BIG, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def quantized(folder, dtype=torch.float32, compute=torch.float32, **changes):
    """It, loaded in 4 bits."""
    return load_model(ModelSource(str(saved(folder, **changes)), dtype, quantization="nf4", compute=compute))
