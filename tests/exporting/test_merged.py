"""An adapter as trained, exported, merged, and exported from its checkpoint gives the same logits, whatever it changes.

As such to the bit. Merged, each weight W + BA is rounded once, and products are summed in another order: the bound is
some units of float32 rounding of the largest logit.
"""

import itertools

import pytest
import torch
from conftest import sums, tiny_model, tiny_tokenizer, write_jsonl
from harness import fit
from peft import AutoPeftModelForCausalLM
from torch import nn
from transformers import AutoModelForCausalLM

from dft_lightning import FineTuner
from dft_lightning.__main__ import main
from dft_lightning.adapters import LoRA, add_lora
from dft_lightning.callbacks import Checkpoints, Export
from dft_lightning.errors import UserError
from dft_lightning.weighting import DFT

IDS = torch.arange(3, 40)[None]
FAST = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), "warmup_ratio": 0.0}
TARGETS = {
    "all-linear": "all-linear",
    "some": ["q_proj", "v_proj"],
    "a pattern": r".*\.layers\.1\..*(up|down|fc1|fc2)(_proj)?",
    "embedding": ["embed_tokens", "q_proj"],
    "head": ["lm_head", "q_proj"],
}
VARIANTS = {"plain": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "both": {"rslora": True, "dora": True}}
COPIES = {
    "none": None,
    "embedding": ["embed_tokens"],
    "head": ["lm_head"],
    "both": ["embed_tokens", "lm_head"],
    "norm": ["norm"],
}
FAMILIES = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"family": "qwen2"},
    "gemma2": {"family": "gemma2"},
    "granite": {"family": "granite"},
    "phi": {"family": "phi"},
}
EVERY = [*itertools.product(TARGETS, VARIANTS, COPIES, FAMILIES, ["tied", "untied"])]


def is_refused(targets, copies, tied):
    """The head is read as one weight; and a weight that two modules share cannot be changed for one of them alone."""
    return (targets == "head" and copies not in ("head", "both")) or (
        tied == "tied" and (targets in ("embedding", "head") or copies not in ("none", "norm"))
    )


#: Each pair of values in some row, of targets and copies with every variant.
COVERING = {(t, "dora", c, "llama", "untied") for t in TARGETS for c in ("none", "both", "norm")}
COVERING |= {("all-linear", v, "head", "gemma2", "untied") for v in VARIANTS}
COVERING |= {("all-linear", "dora", "none", f, t) for f in FAMILIES for t in ("tied", "untied")}


def cases(refused):
    for case in EVERY:
        targets, variant, copies, family, tied = case
        if targets == "embedding" and copies in ("embedding", "both"):
            continue  # one of the two takes no effect: peft lets the copy win
        if is_refused(targets, copies, tied) == refused:
            slow = case not in COVERING and not (refused and variant == "plain" and family in ("llama", "gemma2"))
            yield pytest.param(*case, marks=pytest.mark.exhaustive if slow else ())


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def model_of(family, tied):
    changes = FAMILIES[family] | {"tie_word_embeddings": tied == "tied"}
    model = tiny_model(**changes)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", sums(16))


@pytest.mark.parametrize(("targets", "variant", "copies", "family", "tied"), cases(refused=False))
def test_four_ways_to_the_same_logits(rows, tmp_path, targets, variant, copies, family, tied):
    model_of(family, tied).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    lora = LoRA(rank=4, target_modules=TARGETS[targets], modules_to_save=COPIES[copies], **VARIANTS[variant])
    if family == "phi" and copies == "norm":
        lora.modules_to_save = ["final_layernorm"]
    saving = {"default_root_dir": tmp_path, "enable_checkpointing": True, "max_steps": 2}
    callbacks = [Checkpoints(), Export(merge_lora=True)]
    live = logits(fit(tmp_path / "model", rows, module=FAST | {"lora": lora}, callbacks=callbacks, **saving)[0].model)
    base = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert (live - base).abs().max() > 1e-3
    command = ["export", str(tmp_path / "checkpoints" / "last.ckpt")]
    assert main([*command, str(tmp_path / "out")]) == 0
    assert main([*command, str(tmp_path / "out-merged"), "--merge_lora", "true"]) == 0
    for name in ("export", "out"):
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / name)), live)
    for name in ("export-merged", "out-merged"):
        merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / name))
        torch.testing.assert_close(merged, live, rtol=1e-5, atol=1e-5 * float(live.abs().max()))


@pytest.mark.parametrize(("targets", "variant", "copies", "family", "tied"), cases(refused=True))
def test_what_could_not_be_merged_is_refused_at_the_start(tmp_path, targets, variant, copies, family, tied):
    model_of(family, tied).save_pretrained(tmp_path)
    lora = LoRA(rank=4, target_modules=TARGETS[targets], modules_to_save=COPIES[copies], **VARIANTS[variant])
    with pytest.raises(UserError, match=r"--model\.lora\.(target_modules|modules_to_save)"):
        FineTuner(str(tmp_path), DFT(), lora=lora).configure_model()


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (LoRA(modules_to_save=["nonsense"]), r"modules_to_save has 'nonsense', but no module of LlamaForCausalLM"),
        (LoRA(modules_to_save=["norm", "last_norm"]), "modules_to_save has 'last_norm'"),
        (LoRA(modules_to_save=["proj"]), "modules_to_save"),
    ],
)
def test_names_that_stand_for_nothing(lora, said):
    with pytest.raises(UserError, match=said):
        add_lora(tiny_model(), lora)


def test_in_half_precision_all_ways_round_alike(rows, tmp_path):
    """Trained copies in float32 around a bfloat16 model: exported, they are rounded to what the model computes in.

    Three runs: the plain formula in float32 is the truth; each export may be off as much as training is, and a little.
    """
    model_of("llama", "untied").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    lora = LoRA(rank=4, modules_to_save=["embed_tokens", "lm_head"])
    options = {"default_root_dir": tmp_path, "max_steps": 2, "precision": "bf16-true"}
    options["callbacks"] = [Export(merge_lora=True)]
    live = logits(fit(tmp_path / "model", rows, module=FAST | {"lora": lora}, **options)[0].model).float()
    half = {"dtype": torch.bfloat16}
    adapter = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "export", **half)).float()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "export-merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    truth = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32))
    error = (live - truth).abs().max()
    assert (adapter - truth).abs().max() <= 2 * error
    assert (logits(merged).float() - truth).abs().max() <= 2 * error
