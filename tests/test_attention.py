"""Trap 18: a packed row gives every document the logits that it has alone, or the run is refused."""

import numpy as np
import pytest
import torch
from conftest import sums, tiny_config, tiny_model, write_jsonl
from harness import fit

from dft_lightning import varlen
from dft_lightning.attention import inputs
from dft_lightning.data.batch import Collator
from dft_lightning.errors import UserError
from dft_lightning.models import WeightedLM
from dft_lightning.weighting import DFT

#: Windows shorter than the documents, so that the sliding mask matters within them too.
MODELS = {
    "llama": {},
    "qwen2": {},
    "qwen2 sliding": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "mistral sliding": {"sliding_window": 4},
    "gemma2 sliding and soft-cap": {"sliding_window": 4, "attn_logit_softcapping": 2.0},
    "phi": {},
}
LENGTHS = (9, 1, 14, 6, 11)


def model(name, attention):
    from transformers import AutoModelForCausalLM

    varlen.register()
    torch.manual_seed(0)
    config = tiny_config(name.split(" ")[0], **MODELS[name])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def documents():
    rng = np.random.default_rng(0)
    return [
        {"row": number, "input_ids": rng.integers(0, 320, length), "supervised": np.arange(length) > 0}
        for number, length in enumerate(LENGTHS)
    ]


ROWS = [[[0, 1, 2], [3, 4]], [[0, 1, 2, 3, 4]], [[2], [0, 3], [4, 1]]]


@pytest.mark.parametrize("layout", ROWS, ids=["two rows", "one row", "three rows"])
@pytest.mark.parametrize("width", [None, 50], ids=["padding-free", "padding tail"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "varlen"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_packed_row_are_those_of_its_documents_alone(name, attention, width, layout):
    """Float32: 1e-5 of the largest logit is a hundred units of rounding; one that sees another is off by 1."""
    if name.startswith("gemma2") and attention != "eager":
        pytest.skip("neither sdpa nor varlen has a soft-cap: refused, see below")
    lm, rows = model(name, attention), documents()
    batch = Collator(packed=True, width=width)([[rows[number] for number in row] for row in layout])
    with torch.no_grad():
        packed = lm(**inputs(batch, attention)).logits.flatten(0, 1)
        alone = [lm(input_ids=torch.from_numpy(row["input_ids"])[None], use_cache=False).logits[0] for row in rows]
    for row, numbers in enumerate(layout):
        start = row * batch.input_ids.shape[1]
        for number in numbers:
            ours = packed[start : start + LENGTHS[number]]
            assert (ours - alone[number]).abs().max() < 1e-5 * alone[number].abs().max()
            start += LENGTHS[number]


def test_flex_attention_keeps_documents_apart():
    """Its mask by flex attention's own plain computation: torch's compiled kernel for CPUs does not build here."""
    lm, truth, rows = model("llama", "flex_attention"), model("llama", "eager"), documents()
    batch = Collator(packed=True, width=50)([rows])
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        WeightedLM(lm).check_borders()
        ours = lm(**inputs(batch, "flex_attention")).logits
        theirs = truth(**inputs(batch, "eager")).logits
    assert (ours - theirs)[0, : sum(LENGTHS)].abs().max() < 1e-5 * theirs.abs().max()


def test_kernels_for_varying_lengths_get_all_rows_as_one_with_their_borders():
    rows = documents()
    batch = Collator(packed=True, width=30)([rows[:3], rows[3:]])
    given = inputs(batch, "flash_attention_2")
    assert given["input_ids"].shape == given["position_ids"].shape == (1, 60)
    assert given["cu_seq_lens_q"].tolist() == given["cu_seq_lens_k"].tolist() == [0, 9, 10, 24, 30, 36, 47, 60]
    assert given["max_length_q"] == given["max_length_k"] == 14
    assert "attention_mask" not in given
    assert "position_ids" not in inputs(Collator()([[rows[0]]]), "flash_attention_2")


class TestVarlen:
    @pytest.mark.parametrize("name", ["llama", "mistral sliding"])
    def test_its_gradients_are_those_of_eager_attention(self, name):
        """Packed, and padded rows without borders, which are documents of their own."""
        for collate in (Collator(packed=True, width=30), Collator(3)):
            rows = documents()
            batch = collate([rows[:3], rows[3:]] if collate.packed else [[row] for row in rows])
            found = []
            for attention in ("eager", "varlen"):
                lm = WeightedLM(model(name, attention))
                lm(batch, DFT())[0].backward()
                found.append(torch.cat([parameter.grad.flatten() for parameter in lm.parameters()]))
            assert (found[1] - found[0]).norm() < 1e-5 * found[0].norm()

    def test_dropout_is_dropped_out(self):
        lm = model("llama", "varlen").train()
        lm.config.attention_dropout = 0.5
        for layer in lm.model.layers:
            layer.self_attn.attention_dropout = 0.5
        network, batch = WeightedLM(lm), Collator(packed=True)([documents()])
        torch.manual_seed(0)
        first, second = network.hidden(batch), network.hidden(batch)
        assert not torch.equal(first, second)

    def test_what_it_cannot_do_is_refused(self):
        with pytest.raises(UserError, match="without mask, soft-cap, sinks and cache"):
            WeightedLM(model("gemma2 sliding and soft-cap", "varlen"))

    def test_a_run_with_it(self, model_dir, rows_file):
        truth = fit(model_dir, rows_file, DFT())[1].gradients
        for packing in (True, "padding_free", False):
            module = {"attn_implementation": "varlen"}
            ours = fit(model_dir, rows_file, DFT(), module=module, data={"packing": packing})[1].gradients
            for one, other in zip(ours, truth, strict=True):
                assert (one - other).norm() < 1e-5 * other.norm()


@pytest.fixture
def careless():
    """An attention that is causal and knows nothing of documents."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(module, query, key, value, mask, scaling=None, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None

    AttentionInterface.register("test_careless", attend)
    AttentionMaskInterface.register("test_careless", lambda *_, **__: None)
    return "test_careless"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mistral sliding", "gemma2 sliding and soft-cap"])
def test_the_proof_tells_who_honours_borders(name, dtype, careless):
    WeightedLM(model(name, "eager").to(dtype)).check_borders()
    with pytest.raises(UserError, match=r"'test_careless' of \w+ lets packed sequences see each other"):
        WeightedLM(model(name, careless).to(dtype)).check_borders()


def test_a_packed_run_proves_it_first(tmp_path, model_dir, careless):
    rows = write_jsonl(tmp_path / "rows.jsonl", sums(8))
    careful = {"module": {"attn_implementation": careless}}
    fit(model_dir, rows, DFT(), **careful, max_steps=1)  # padded rows have one document each
    for packing in (True, "padding_free"):
        with pytest.raises(UserError, match=r"set --model\.attn_implementation to varlen or sdpa or eager, or"):
            fit(model_dir, rows, DFT(), **careful, data={"packing": packing}, max_steps=1)


def test_the_proof_leaves_the_training_mode_as_it_was():
    lm = WeightedLM(tiny_model().train())
    lm.check_borders()
    assert lm.model.training


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_for_compiled_code_is_the_plain_call(dtype, window):
    """The same kernels in both, so that they differ by the order in which a shared key's gradients are added."""
    torch.manual_seed(0)
    borders = torch.tensor([0, 9, 10, 10, 24, 41, 41], dtype=torch.int32)  # two empty documents
    found = []
    q, k, v = torch.randn(41, 4, 8), torch.randn(41, 2, 8), torch.randn(41, 2, 8)
    for call in (varlen._one_by_one, varlen._opaque):
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = call(*given, borders, 0.3, 0.0, window)
        out.backward(torch.ones_like(out).cumsum(0) / 41)
        found.append([out, *(x.grad for x in given)])
    for plain, ours in zip(*found, strict=True):
        assert (ours - plain).abs().max() <= 4 * torch.finfo(dtype).eps * plain.abs().max()


def test_under_autocast_attention_is_in_the_products_precision():
    """Rotary positions leave query and key in float32; a GPU's kernel takes half precision only."""
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = varlen.attend(None, q, k, v, None)[0]
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, varlen.attend(None, q.bfloat16(), k.bfloat16(), v, None)[0])


def test_the_operator_says_its_shapes_and_gradients_rightly():
    torch.manual_seed(0)
    borders = torch.tensor([0, 5, 12], dtype=torch.int32)
    arguments = [torch.randn(12, 2, 8, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(
        varlen._attend, (*arguments, borders, 0.3, None), test_utils=("test_schema", "test_faketensor")
    )
