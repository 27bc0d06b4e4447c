"""What several tests need: a tiny chat model with a tokenizer, rows to train on, and the real model where it is."""

import json
import logging
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
logging.raiseExceptions = False  # Lightning's logger holds on to a stream that pytest has closed by then
torch.set_num_threads(1)  # the models are tiny: a second thread only waits
settings.register_profile("any machine", deadline=None)  # a busy one is no fault of what is tested
settings.load_profile("any machine")

# Where the processes of a run find each other: Lightning reads and writes these.
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and tokenizers beside the repository."""
    if not SHARED.exists():
        pytest.skip(f"needs the real data in {SHARED.name}/ beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def embedded_model_dir() -> Path:
    """SmolLM2-135M-Instruct, converted."""
    from dft_lightning.embedded import embedded_model
    from dft_lightning.errors import UserError

    try:
        return embedded_model()
    except UserError as missing:
        pytest.skip(str(missing))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    """Tokens and references of a test stay in its own folder; the converted model is shared by all."""
    if "embedded_model_dir" not in request.fixturenames:
        monkeypatch.setenv("DFT_CACHE", str(tmp_path / "cache"))


def end_process_group(before: dict[str, str | None]) -> list[str]:
    """Close the process group and restore the address; what there was to close."""
    left = [name for name, value in before.items() if os.environ.get(name) != value]
    for name in left:
        os.environ.pop(name, None)
    os.environ.update({name: value for name, value in before.items() if value is not None})
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        left.append("a process group")
    return left


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """A test that leaves a process group or its address behind fails: later ranks would meet there."""
    before = {name: os.environ.get(name) for name in RENDEZVOUS}
    yield
    left = end_process_group(before)
    assert not left, f"left behind by this test: {', '.join(left)}"


@pytest.fixture
def process_group():
    """For a test that trains in this process with a strategy that has a group: it is closed afterwards."""
    before = {name: os.environ.get(name) for name in RENDEZVOUS}
    yield
    end_process_group(before)


def tiny_tokenizer():
    """A byte-level BPE with a ChatML template, trained on a few lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the sum of two numbers is", "add them, so the answer is 12"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=special,
        chat_template=CHATML,
    )


def tiny_config(family: str = "llama", **changes):
    """A two-layer model of a family, for the tiny tokenizer."""
    import transformers

    name = {
        "llama": "Llama",
        "qwen2": "Qwen2",
        "gemma2": "Gemma2",
        "cohere": "Cohere",
        "granite": "Granite",
        "phi": "Phi",
        "mistral": "Mistral",
        "qwen3": "Qwen3",
    }
    options = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,
    }
    extra = {
        "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
        "cohere": {"logit_scale": 0.25},
        "granite": {"logits_scaling": 3.0},
        "phi": {"num_key_value_heads": 4},
    }
    return getattr(transformers, f"{name[family]}Config")(**(options | extra.get(family, {}) | changes))


def tiny_model(family: str = "llama", dtype=torch.float32, **changes):
    """Such a model with random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=dtype, attn_implementation="eager")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A tiny Llama with its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sums(count: int, seed: int = 0) -> list[dict]:
    """Rows in NuminaMath-CoT's schema, of very unequal lengths."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = rng.randint(1, 99), rng.randint(1, 99)
        problem = f"Add {a} and {b}."
        solution = " ".join(["add them,"] * rng.choice([1, 1, 2, 12])) + f" so the answer is {a + b}"
        messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
        rows.append({"source": "sums", "problem": problem, "solution": solution, "messages": messages})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def maths_rows(folder: Path, count: int) -> Path:
    """Real maths rows of a moderate length where they are, else practice problems."""
    path = SHARED / "data" / "numina_schema" / "train.parquet"
    if not path.exists():
        from dft_lightning.data.problems import practice_problems

        return write_jsonl(folder / "rows.jsonl", practice_problems(count))
    import pyarrow.parquet as pq

    rows = [row for row in pq.read_table(path).to_pylist() if len(row["problem"] + row["solution"]) < 700]
    return write_jsonl(folder / "rows.jsonl", rows[:count])


@pytest.fixture
def rows_file(tmp_path) -> Path:
    """26 rows of sums."""
    return write_jsonl(tmp_path / "sums.jsonl", sums(26))
