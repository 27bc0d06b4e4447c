"""The files of `configs/` as they may be combined, and a tiny model of the family of each model that they name."""

import os
from collections.abc import Callable
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import sums, write_jsonl

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class Recipe(NamedTuple):
    """One file of each kind, or "" for none; in the order of the README."""

    weighting: str
    """sft, dft or iw_sft, on top of base; or demo, which needs neither base nor model."""
    model: str
    adapter: str
    layout: str
    strategy: str
    precision: str

    @property
    def files(self) -> list[str]:
        """Names below `configs/`, without their ending."""
        first = ["demo"] if self.weighting == "demo" else ["base", self.weighting]
        model = [f"models/{self.model}"] if self.model else []
        precision = [f"precision/{self.precision}"] if self.precision else []
        return [*first, *model, *filter(None, (self.adapter, self.layout, self.strategy)), *precision]

    @property
    def id(self) -> str:
        return "+".join(name.rpartition("/")[2] for name in self.files)

    @property
    def is_sharded(self) -> bool:
        """Whether a block chooses the strategy fsdp2."""
        return "fsdp2" in self.strategy + self.precision


MODELS = sorted(path.stem for path in (CONFIGS / "models").glob("*.yaml"))
#: All values of each field of a recipe.
VALUES = Recipe(
    ("sft", "dft", "iw_sft", "demo"),
    ("", *MODELS),
    ("", "lora", "qlora"),
    ("", "packing", "fast"),
    ("", "fsdp2"),
    ("", "fp32-master", "fsdp2-fp32-master"),
)
#: Files that do not go together, in this order: what the message says.
REFUSED = {
    ("qlora", "fsdp2"): "model.quantization is nf4",  # 4-bit weights cannot be sharded
    ("qlora", "precision/fsdp2-fp32-master"): "model.quantization is nf4",
    ("fast", "packing"): "data.packing is padding_free",  # compiled layers need one shape; the other order is fine
    ("precision/fsdp2-fp32-master", "precision/fp32-master"): "trainer.strategy.compute",  # two choices of one thing
}


def is_complete(recipe: Recipe) -> bool:
    """The demo has a model of its own; with base.yaml one has to be chosen."""
    return (recipe.weighting == "demo") == (recipe.model == "")


def refusal(files: list[str]) -> str | None:
    """What the message says where these files are refused."""
    pairs_in_order = {*combinations(files, 2)}
    return next((said for names, said in REFUSED.items() if names in pairs_in_order), None)


ALL = [recipe for recipe in map(Recipe._make, product(*VALUES)) if is_complete(recipe)]
RUNNING = [recipe for recipe in ALL if refusal(recipe.files) is None]


def pairs(row: tuple) -> set[tuple]:
    """All pairs of values of different fields, with their fields."""
    return set(combinations(enumerate(row), 2))


def covering(rows: list, cost: Callable[[Any, list], float] = lambda row, chosen: 1.0) -> list:
    """Some of the rows, in which each pair of values is that is in any of them: greedy, the same every time.

    Args:
        cost: of a row beside those that are chosen already.
    """
    known = {row: pairs(row) for row in rows}
    missing, chosen = set().union(*known.values()), []
    while missing:
        best = max(rows, key=lambda row: len(known[row] & missing) / cost(row, chosen))  # the first of them
        chosen.append(best)
        missing -= known[best]
    return chosen


def compiled_once(recipe: Recipe, chosen: list[Recipe]) -> float:
    """A layer that has not been compiled yet takes as long as ten other recipes."""
    is_new = recipe.layout == "fast" and graph(recipe) not in map(graph, chosen)
    return 10.0 if is_new else 1.0


def graph(recipe: Recipe) -> tuple:
    """What decides what is compiled: layers, their adapters and precision, and the shape of the rows."""
    return recipe.layout, FAMILIES[recipe.model].kind, recipe.adapter, recipe.precision, recipe.weighting == "demo"


# -- models ------------------------------------------------------------------------------------------------------------


class Family(NamedTuple):
    """What a tiny model has in common with the real one."""

    kind: str
    special: tuple[str, ...]
    eos: str
    pad: str | None = None
    bos: str | None = None
    changes: tuple[tuple[str, object], ...] = ()
    template: str | None = None


_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA_3 = partial(
    Family,
    "Llama",
    ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    eos="<|end_of_text|>",
    bos="<|begin_of_text|>",
)
_CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nReason step by step.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN = partial(
    Family,
    "Qwen2",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    eos="<|endoftext|>",
    pad="<|endoftext|>",
    template=_CHATML,
)
_LONG = {**_ROPE, "original_max_position_embeddings": 128}
FAMILIES = {
    "qwen2.5-math-1.5b": _QWEN(changes=(("tie_word_embeddings", True),)),
    "qwen2.5-math-7b": _QWEN(changes=(("tie_word_embeddings", False),)),
    "llama-3.2-3b": _LLAMA_3(changes=(("tie_word_embeddings", True), ("rope_parameters", _LONG))),
    "llama-3.1-8b": _LLAMA_3(changes=(("rope_parameters", _LONG),)),
    "deepseek-math-7b": Family(
        "Llama",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        eos="<｜end▁of▁sentence｜>",
        pad="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
    ),
    "": Family(  # of the demo: SmolLM2
        "Llama",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        pad="<|im_end|>",
        bos="<|im_start|>",
        changes=(("tie_word_embeddings", True),),
        template=_CHATML,
    ),
}


def tokenizer_of(family: Family):
    """A byte-level BPE with the family's special tokens; where there is a bos, it is put first as in the original."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[*family.special], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the sum of two numbers is", "add them, so the answer is 12"] * 4, trainer)
    if family.bos and family.template is None:
        first = [(family.bos, backend.token_to_id(family.bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=first)
    roles = {"eos_token": family.eos, "pad_token": family.pad, "bos_token": family.bos}
    given = {name: token for name, token in roles.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=family.template, **given)


def write_model(name: str, folder: Path) -> Path:
    """A two-layer model of the family with random weights, and its tokenizer; there are more ids than tokens."""
    import transformers

    family, tokenizer = FAMILIES[name], tokenizer_of(FAMILIES[name])
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    config = getattr(transformers, f"{family.kind}Config")(
        **(sizes | heads | ids | {"initializer_range": 0.2} | dict(family.changes))
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # as all of them are stored
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_all(folder: Path) -> Path:
    """The model of each family, and rows in NuminaMath's schema."""
    for name in FAMILIES:
        write_model(name, folder / (name or "demo"))
    write_jsonl(folder / "rows.jsonl", sums(28))
    return folder


#: Of an epoch, and of the run in the end.
STEPS = 3

# -- runs --------------------------------------------------------------------------------------------------------------


def configs(files: list[str]) -> list[str]:
    """The options that name these files."""
    return [word for name in files for word in ("--config", str(CONFIGS / f"{name}.yaml"))]


def options(recipe: Recipe, folder: Path, ranks: int) -> list[str]:
    """The recipe's files; and of what they say, sizes, paths and the number of devices alone are replaced."""
    sizes = {"global_batch_size": 8, "micro_batch_size": 4, "max_length": 256}
    rows = {"problems": 24, "held_out": 4}
    if recipe.weighting != "demo":
        rows = {"path": folder / "rows.jsonl", "num_samples": 24, "val_size": 4}
    given = {
        "model.model_name": folder / (recipe.model or "demo"),
        "run_dir": folder / recipe.id,
        "trainer.accelerator": "cpu",
    }
    given |= {"trainer.devices": ranks}
    given |= {
        "token_probabilities.figure": "false"
    }  # drawing takes longer than all the rest, and no recipe is about it
    given |= {f"data.{key}": value for key, value in (sizes | rows).items()}
    return configs(recipe.files) + [word for key, value in given.items() for word in (f"--{key}", str(value))]


def run(recipe: Recipe, folder: Path, ranks: int = 1) -> list[int]:
    """Exit codes of a fit of two steps, a validation of it, and the fit resumed for the rest."""
    from dft_lightning.__main__ import main

    given = options(recipe, folder, ranks)
    steps = lambda count: ["--trainer.max_steps", str(count)]  # noqa: E731
    commands = [["fit", *given, *steps(2)], ["validate", *given, "--ckpt_path", "last"], ["fit", *given, *steps(STEPS)]]
    return [main(command) for command in commands]


def run_all(folder: Path, *names: str) -> None:
    """On each rank: the recipes of these names, one after another."""
    for recipe in (recipe for recipe in RUNNING if recipe.id in names):
        print(f"== {recipe.id}", flush=True)
        assert run(recipe, folder, int(os.environ["WORLD_SIZE"])) == [0, 0, 0], recipe.id
