"""Adapters beside a base in 4 bits: which weights it stands for, what is learnt beside it, and what is refused."""

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from exactness import GRADIENT, relative
from harness import fit
from lightning.pytorch.callbacks import ModelCheckpoint
from quantized import BIG, needs_bitsandbytes, quantized, saved
from test_adapters import KINDS, learnt

from dft_lightning import FineTuner
from dft_lightning.adapters import LoRA, add_lora
from dft_lightning.callbacks import RunSummary
from dft_lightning.errors import UserError
from dft_lightning.loading import ModelSource, load_model
from dft_lightning.models import WeightedLM
from dft_lightning.quantization import BLOCK, numbers, quantized_layers, read_out, weight_of
from dft_lightning.sharding import FSDP2Strategy
from dft_lightning.sharding.initial import initial_network
from dft_lightning.weighting import DFT, ImportanceWeighted

IDS = torch.arange(3, 40)[None]
FOUR = {"lora": LoRA(rank=4), "quantization": "nf4"}
#: The 16 numbers, to the four decimals of the paper's appendix E.
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]


@pytest.fixture
def four_bits(tmp_path):
    """The model's folder."""
    return saved(tmp_path / "model")


@needs_bitsandbytes
class TestTheBase:
    @pytest.mark.parametrize("tied", [False, True])
    def test_all_linear_layers_but_the_head(self, tmp_path, tied):
        model = quantized(tmp_path, tie_word_embeddings=tied)
        assert len([*quantized_layers(model)]) == 2 * 7
        truth = tiny_model(**BIG, tie_word_embeddings=tied)
        assert torch.equal(model.get_output_embeddings().weight, truth.get_output_embeddings().weight)
        assert torch.equal(model.get_input_embeddings().weight, truth.get_input_embeddings().weight)

    def test_each_weight_is_the_nearest_of_16_numbers_times_its_blocks_largest(self, tmp_path):
        """As near as that, as two may be as near.

        The scales are in 8 bits, of which the coarsest step is 1.5 % of the largest deviation from their mean.
        """
        truth = dict(tiny_model(**BIG).named_modules())
        for name, layer in quantized_layers(quantized(tmp_path)):
            weight = truth[name].weight.detach().reshape(-1, BLOCK)
            scale = weight.abs().amax(1, keepdim=True)
            values = torch.tensor(NF4)
            expected = values[(weight[..., None] / scale[..., None] - values).abs().argmin(-1)] * scale
            allowed = 0.015 * (scale - scale.mean()).abs().max() + 1e-4 * scale.max()
            apart = (weight_of(layer).reshape(-1, BLOCK) - weight).abs() - (expected - weight).abs()
            assert apart.abs().max() <= allowed

    def test_evaluated_once_it_still_computes_alike_and_lets_gradients_through(self, tmp_path):
        """Some CPUs would go on in bfloat16, and without gradient."""
        model = learnt(add_lora(quantized(tmp_path), LoRA(rank=4)))

        def trained():
            model.zero_grad()
            logits = model.train()(input_ids=IDS).logits
            logits.square().sum().backward()
            return [logits, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

        before = trained()
        with torch.no_grad():
            evaluated = model.eval()(input_ids=IDS).logits
        assert torch.equal(before[0], evaluated)
        assert all(map(torch.equal, before, trained()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_read_out_it_is_the_same_model(self, tmp_path, dtype):
        model = quantized(tmp_path, dtype, dtype, attention_bias=True).eval()
        with torch.no_grad():
            logits = model(input_ids=IDS).logits
            plain = read_out(model)
            assert torch.equal(plain(input_ids=IDS).logits, logits)
        assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
        plain.save_pretrained(tmp_path / "plain")
        back = load_model(ModelSource(str(tmp_path / "plain"), dtype)).eval()
        assert torch.equal(back(input_ids=IDS).logits, logits)


@needs_bitsandbytes
class TestTraining:
    @pytest.mark.parametrize("kind", KINDS)
    def test_gradients_are_those_beside_the_weights_that_it_stands_for(self, four_bits, rows_file, tmp_path, kind):
        """The very products, in another place of the graph: the bound for sums in another order."""
        read_out(load_model(ModelSource(str(four_bits), quantization="nf4"))).save_pretrained(tmp_path / "plain")
        tiny_tokenizer().save_pretrained(tmp_path / "plain")
        found = []
        for folder, more in ((four_bits, {"quantization": "nf4"}), (tmp_path / "plain", {})):
            found.append(fit(folder, rows_file, DFT(), module={"lora": KINDS[kind]} | more, max_steps=3)[1].gradients)
        for ours, truth in zip(*found, strict=True):
            assert relative(ours, truth) < GRADIENT
        plain = fit(four_bits, rows_file, DFT(), module={"lora": KINDS[kind]}, max_steps=1)[1].gradients[0]
        assert relative(found[0][0], plain) > 1e-3

    def test_the_run_says_so_and_counts_all_numbers(self, four_bits, rows_file, capsys):
        finetuner = fit(four_bits, rows_file, module=FOUR, callbacks=[RunSummary()], max_steps=1)[0]
        adapters = sum(p.numel() for p in finetuner.parameters() if p.requires_grad)
        assert numbers(finetuner) == adapters + sum(p.numel() for p in tiny_model(**BIG).parameters())
        assert "weights in float32, beside adapters in 4 bits" in " ".join(capsys.readouterr().out.split())

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
    def test_with_its_adapter_off_it_is_the_reference_to_the_bit(self, four_bits, rows_file, kind, precision):
        """Importance weights begin at exactly 1, and do not stay there."""

        class Watched(FineTuner):
            seen = ()

            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                self.seen = [*self.seen, self.trained_on.weight]
                return loss

        module = FOUR | {"lora": KINDS[kind], "optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "warmup_ratio": 0.0}
        module["lora"] = LoRA(**(vars(module["lora"]) | {"dropout": 0.0}))
        tuner = fit(
            four_bits, rows_file, ImportanceWeighted(), module=module, kind=Watched, max_steps=2, precision=precision
        )[0]
        assert torch.equal(tuner.seen[0], torch.ones_like(tuner.seen[0]))
        assert not torch.equal(tuner.seen[1], torch.ones_like(tuner.seen[1]))

    @pytest.mark.parametrize("kind", ["plain", "dora"])
    def test_a_checkpoint_is_the_adapter_alone_and_goes_on_to_the_bit(self, four_bits, rows_file, tmp_path, kind):
        constant = {"lr_schedule": "constant", "warmup_ratio": 0.0}
        options = {
            "module": FOUR | constant | {"lora": KINDS[kind]},
            "default_root_dir": tmp_path,
            "enable_checkpointing": True,
        }
        whole = fit(four_bits, rows_file, **options)[0]
        keep = ModelCheckpoint(tmp_path, "kept", every_n_train_steps=2)
        fit(four_bits, rows_file, max_steps=2, callbacks=[keep], **options)
        names = torch.load(tmp_path / "kept.ckpt", weights_only=True)["state_dict"].keys()
        assert names
        assert all("lora_" in name for name in names)
        rest = fit(four_bits, rows_file, ckpt_path=str(tmp_path / "kept.ckpt"), **options)[0]
        for (name, ours), truth in zip(rest.model.named_parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, truth), name

    def test_beside_another_base_it_does_not_go_on(self, four_bits, rows_file, tmp_path):
        """The folder has the same name, but one weight is another by now; or the base is in whole precision."""
        options = {"default_root_dir": tmp_path, "enable_checkpointing": True}
        keep = ModelCheckpoint(tmp_path, "kept", every_n_train_steps=2)
        fit(four_bits, rows_file, module=FOUR, max_steps=2, callbacks=[keep], **options)
        start = str(tmp_path / "kept.ckpt")
        with pytest.raises(UserError, match=r"lora \(quantization\): nf4 → None"):
            fit(four_bits, rows_file, module={"lora": FOUR["lora"]}, ckpt_path=start, **options)
        other = tiny_model(**BIG)
        other.model.layers[1].mlp.up_proj.weight.data[3, 5] *= -1
        other.save_pretrained(four_bits)
        with pytest.raises(UserError, match=r"model \(weights left out of checkpoints\)"):
            fit(four_bits, rows_file, module=FOUR, ckpt_path=start, **options)


class TestRefusals:
    def test_nothing_to_train(self):
        with pytest.raises(UserError, match=r"model\.quantization is nf4.*set model\.lora"):
            FineTuner("model", DFT(), quantization="nf4")

    def test_shards(self):
        tuner = FineTuner("model", DFT(), **FOUR)
        tuner._trainer = type("Trainer", (), {"strategy": FSDP2Strategy()})()
        with pytest.raises(UserError, match=r"model\.quantization is nf4.*set trainer\.strategy ddp"):
            initial_network(tuner)

    def test_no_bitsandbytes(self, tmp_path, monkeypatch):
        monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: False)
        with pytest.raises(UserError, match=r"install it with pip install 'dft-lightning\[qlora\]'"):
            quantized(tmp_path)

    @needs_bitsandbytes
    def test_a_precision_that_it_does_not_know(self, four_bits, rows_file):
        with pytest.raises(UserError, match=r"not in torch\.float64: set trainer\.precision"):
            fit(four_bits, rows_file, module=FOUR, precision="64-true")

    @needs_bitsandbytes
    def test_rows_over_the_end_of_which_a_scale_would_go(self, tmp_path):
        tiny_model(**(BIG | {"intermediate_size": 96})).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"rows of model\.layers\.0\.mlp\.down_proj have 96 weights.* of 64"):
            load_model(ModelSource(str(tmp_path), quantization="nf4"))


@needs_bitsandbytes
def test_a_state_without_an_adapter_is_not_taken(tmp_path):
    """What a state may leave out is the base."""
    network = WeightedLM(add_lora(quantized(tmp_path), LoRA(rank=4)))
    state = network.state_dict()
    network.load_state_dict(state)
    state.pop(next(name for name in state if "lora_B" in name))
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_B"):
        network.load_state_dict(state)
