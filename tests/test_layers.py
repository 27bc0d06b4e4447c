"""Recomputation and compilation of a decoder's layers: the same gradients, for less memory or time."""

import lightning.pytorch as pl
import pytest
import torch
from conftest import tiny_model
from harness import fit
from torch._dynamo.utils import counters

from dft_lightning import compilation, varlen
from dft_lightning.data.batch import Collator
from dft_lightning.errors import UserError
from dft_lightning.models import WeightedLM
from dft_lightning.recomputation import recompute
from dft_lightning.weighting import DFT

PACKED = {"packing": True, "micro_batch_size": 2}


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 40, (count,), generator=generator).tolist()
    return [
        {"row": i, "input_ids": torch.randint(320, (n,), generator=generator).numpy(), "supervised": [True] * n}
        for i, n in enumerate(lengths)
    ]


def network(attention="sdpa", dtype=torch.float32, **changes):
    lm = tiny_model(dtype=dtype, **changes).train()
    varlen.register()
    lm.set_attn_implementation(attention)
    return WeightedLM(lm)


def gradient(made, batch):
    torch.manual_seed(1)
    loss, _ = made(batch, DFT())
    loss.backward()
    return torch.cat([p.grad.flatten() for p in made.parameters()])


class TestRecomputation:
    """What is computed a second time is the same to the bit, dropout too; and what is not kept is not kept."""

    @pytest.mark.parametrize("kind", ["selective", "full"])
    @pytest.mark.parametrize("attention", ["eager", "sdpa", "varlen"])
    def test_gradients_are_the_same_to_the_bit(self, kind, attention):
        dropout = 0.0 if attention == "varlen" else 0.3
        batch = Collator(packed=True)([rows(3)])
        plain, made = (network(attention, attention_dropout=dropout) for _ in range(2))
        recompute(made.base.get_decoder(), kind)
        assert torch.equal(gradient(made, batch), gradient(plain, batch))

    @pytest.mark.parametrize(("kind", "products", "norms"), [("none", 1, 1), ("selective", 1, 2), ("full", 2, 2)])
    def test_what_is_computed_again(self, kind, products, norms, monkeypatch):
        """Counted at the operators: the forward's products once or twice, its square roots likewise."""
        calls = {"products": 0, "norms": 0}

        class Count(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                name = str(function)
                calls["products"] += name == "aten.mm.default"
                calls["norms"] += name == "aten.rsqrt.default"
                return function(*args, **(kwargs or {}))

        made = network()
        recompute(made.base.get_decoder(), kind)
        decoder, batch = made.base.get_decoder(), Collator()([rows(2)[:1]])
        with Count():
            states = decoder(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            once = dict(calls)
            states.sum().backward()
        layers, again = 2, calls["products"] - 3 * once["products"]  # each product has two in its backward
        assert again == (once["products"] - layers if products == 2 else 0)  # a layer's last is not needed again
        assert calls["norms"] - 1 == norms * (once["norms"] - 1)  # the last norm is outside the layers

    @pytest.mark.parametrize("kind", ["selective", "full"])
    def test_a_run(self, model_dir, rows_file, kind):
        plain = fit(model_dir, rows_file, max_steps=2)[1]
        saved = fit(model_dir, rows_file, module={"activation_checkpointing": kind}, max_steps=2)[1]
        assert all(torch.equal(*pair) for pair in zip(saved.gradients, plain.gradients, strict=True))

    def test_a_model_without_layers_is_refused(self):
        with pytest.raises(UserError, match=r"no list of layers: set model.activation_checkpointing to none"):
            recompute(torch.nn.Linear(2, 2), "full")


@pytest.mark.slow
class TestCompilation:
    """Each takes its compilers some seconds."""

    @pytest.mark.parametrize(("kind", "attention"), [("none", "sdpa"), ("selective", "varlen"), ("full", "varlen")])
    def test_the_same_gradients_and_one_graph_for_the_run(self, model_dir, rows_file, attention, kind):
        """Two epochs of steps with other documents in each micro-batch, empty ones included, and validations between.

        Float32 in another order of operations: the bound of the table of exactness.
        """
        torch._dynamo.reset()
        counters.clear()
        module = {"attn_implementation": attention, "activation_checkpointing": kind}
        data = PACKED | {"val_size": 4, "pack_length": 100, "max_length": 100}
        plain = fit(model_dir, rows_file, module=module, data=data, max_epochs=2)[1]
        graphs: list[int] = []
        watch = Watch(graphs)
        compiled = fit(
            model_dir, rows_file, module=module | {"compile": True}, data=data, max_epochs=2, callbacks=[watch]
        )[1]
        assert len(plain.gradients) == len(compiled.gradients) >= 4
        for ours, theirs in zip(compiled.gradients, plain.gradients, strict=True):
            assert (ours - theirs).norm() < 1e-5 * theirs.norm()
        assert watch.empty, "no empty micro-batch was tried"
        assert graphs[0] >= 1
        assert set(graphs) == {graphs[0]}, "something was compiled after the start"

    def test_mixed_precision(self, model_dir, rows_file):
        """Bfloat16 products in both: 8 bits, in another order; the plain gradient is off by as much from float32."""
        module, data = {"attn_implementation": "varlen"}, PACKED
        exact = fit(model_dir, rows_file, module=module, data=data, max_steps=1)[1].gradients[0]
        plain, compiled = (
            fit(model_dir, rows_file, module=module | more, data=data, max_steps=1, precision="bf16-mixed")[
                1
            ].gradients[0]
            for more in ({}, {"compile": True})
        )
        assert (compiled - exact).norm() < 2**0.5 * (plain - exact).norm()

    def test_a_run_with_adapters(self, model_dir, rows_file):
        module = {"lora": {"rank": 2}, "attn_implementation": "varlen"}
        plain, compiled = (
            fit(model_dir, rows_file, module=module | more, data=PACKED, max_steps=2)[1].gradients[-1]
            for more in ({}, {"compile": True})
        )
        assert (compiled - plain).norm() < 1e-5 * plain.norm()


class Watch(pl.Callback):
    """Keeps how many graphs there are after each micro-batch."""

    def __init__(self, graphs):
        self.graphs, self.empty = graphs, False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.empty |= len(batch) == 0
        self.graphs.append(counters["stats"]["unique_graphs"])


def test_batches_of_one_shape_are_no_larger_than_they_have_to_be(model_dir, rows_file, monkeypatch):
    """Under compilation, whose own part is left out here: each has as many rows as the fullest; the share says so."""
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    shapes, longest = [], []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            shapes.append(tuple(batch.input_ids.shape))
            longest.append((batch.longest, len(batch.cu_seqlens)))

    data = {"packing": True, "micro_batch_size": 8, "max_length": 120}
    _, _, trainer = fit(model_dir, rows_file, module={"compile": True}, data=data, callbacks=[Look()])
    sampler, module = trainer.datamodule.sampler(), trainer.datamodule
    most = max(len(part) for number in range(sampler.steps) for part in sampler.parts(0, number))
    assert set(shapes) == {(most, 120)}
    assert len(set(longest)) == 1
    assert most < 8
    share = int(module.train_rows.lengths.sum()) / sum(rows * width for rows, width in shapes)
    assert sampler.share_used(fixed=True) == pytest.approx(share)


def test_compiling_needs_packed_rows(model_dir, rows_file):
    with pytest.raises(
        UserError, match=r"model.compile needs batches of one shape, and data.packing is False: set --data.packing"
    ):
        fit(model_dir, rows_file, module={"compile": True})


def test_a_process_may_compile_many_models(model_dir, rows_file, monkeypatch):
    """All layers share one function, of which torch keeps a limited number of variants; no code is generated here."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    monkeypatch.setattr(compilation, "_OPTIONS", {"dynamic": False, "fullgraph": True, "backend": "eager"})
    for micro_batch_size in (1, 2, 3, 4):
        data = PACKED | {"micro_batch_size": micro_batch_size}
        assert fit(model_dir, rows_file, module={"compile": True}, data=data, max_steps=1)[1].gradients


def test_what_cannot_be_compiled_is_named(model_dir, rows_file, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with pytest.raises(UserError, match=r"model.compile: the layers of LlamaForCausalLM cannot be compiled.*no such"):
        fit(model_dir, rows_file, module={"compile": True}, data=PACKED)
