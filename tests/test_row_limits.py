"""Rows against a model's tables: ids by the embedding, positions by learned ones; before anything is trained."""

import json
import re

import pytest
import torch
import transformers
from conftest import sums, tiny_config, tiny_model, tiny_tokenizer, write_jsonl
from harness import fit
from transformers import AutoModelForCausalLM

from dft_lightning.__main__ import main
from dft_lightning.callbacks import Checkpoints
from dft_lightning.data.store import Store, TokenizedRows
from dft_lightning.errors import UserError
from dft_lightning.row_limits import position_limit, window_of

COMMANDS = ["fit", "validate", "test", "predict", "diagnose", "inspect", "plan"]
SIZES = {"vocab_size": 289, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
NARROW = SIZES | {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 40}
WIDE = SIZES | {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 40}
#: Models with a table of 40 positions; OPT and BioGPT begin theirs at row 2.
TABLES = {
    "GPT2": NARROW,
    "OPT": WIDE | {"num_hidden_layers": 2, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTNeo": WIDE | {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "GPTJ": NARROW | {"rotary_dim": 8},
    "GPTBigCode": NARROW,
    "BioGpt": WIDE | {"num_hidden_layers": 2, "intermediate_size": 48},
}
TABLES["Mpt"] = SIZES | {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 40}  # of distances
#: Models that take any position.
OPEN = {
    "Llama": WIDE | {"num_hidden_layers": 2, "intermediate_size": 48},
    "GPTNeoX": WIDE | {"num_hidden_layers": 2, "intermediate_size": 48},
    "Qwen2Moe": WIDE | {"num_hidden_layers": 2, "intermediate_size": 48, "num_key_value_heads": 2},
    "Bloom": SIZES | {"hidden_size": 32, "n_head": 2, "n_layer": 2},
    "Mamba": SIZES | {"hidden_size": 32, "num_hidden_layers": 2},
}


def config(family):
    return getattr(transformers, f"{family}Config")(**(TABLES | OPEN)[family])


def metadata(family):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(family))


def saved(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def grown_tokenizer(*tokens):
    tokenizer = tiny_tokenizer()
    assert tokenizer.add_tokens(list(tokens)) == len(tokens)
    return tokenizer


# -- positions --------------------------------------------------------------------------------------------------------


class TestPositions:
    @pytest.mark.parametrize("family", TABLES)
    def test_a_table_is_found_and_measured(self, family):
        assert position_limit(metadata(family), 41) == position_limit(metadata(family), 5000) == 40
        assert position_limit(metadata(family), 40) is None

    @pytest.mark.parametrize("family", TABLES)
    def test_that_is_where_the_model_itself_fails(self, family):
        torch.manual_seed(0)
        decoder = AutoModelForCausalLM.from_config(config(family)).get_decoder()
        decoder(input_ids=torch.ones(1, 40).long())
        with pytest.raises((IndexError, RuntimeError)):
            decoder(input_ids=torch.ones(1, 41).long())

    @pytest.mark.parametrize("family", OPEN)
    def test_others_have_none(self, family):
        assert position_limit(metadata(family), 500) is None
        AutoModelForCausalLM.from_config(config(family)).get_decoder()(input_ids=torch.ones(1, 60).long())

    @pytest.mark.parametrize(
        ("scaling", "expected"),
        [
            (None, 256),
            ({"rope_type": "linear", "factor": 4.0}, 1024),
            ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
            # already in max_position_embeddings, as Llama 3 has it
            ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}, 256),
        ],
    )
    def test_the_window_of_rotary_positions(self, scaling, expected):
        changes = {} if scaling is None else {"rope_parameters": scaling | {"rope_theta": 1e4}}
        assert window_of(tiny_config(**changes)) == expected

    def test_a_longer_row_is_refused_and_the_advice_taken(self, tmp_path, rows_file):
        model = saved(tmp_path / "model", AutoModelForCausalLM.from_config(config("OPT")))
        with pytest.raises(
            UserError, match=r"a row of the train data has \d+ tokens.*a table of 40 positions"
        ) as refused:
            fit(model, rows_file)
        advised = int(re.search(r"set --data.max_length (\d+)", str(refused.value))[1])
        fit(model, rows_file, data={"max_length": advised}, max_steps=1)
        fit(model, rows_file, data={"max_length": advised, "overlength": "drop"}, max_steps=1)

    @pytest.mark.parametrize("packing", [True, "padding_free"])
    def test_the_longest_sequence_counts_not_the_packed_row(self, tmp_path, rows_file, packing):
        """Padding, too, is longer here than the table."""
        model = saved(tmp_path / "model", AutoModelForCausalLM.from_config(config("GPT2")))
        packed = {"packing": packing, "pack_length": 300, "micro_batch_size": 2}
        with pytest.raises(UserError, match="a table of 40 positions"):
            fit(model, rows_file, data=packed)
        fit(model, rows_file, data=packed | {"max_length": 40}, max_steps=2, module={"attn_implementation": "sdpa"})

    def test_a_rotary_model_warns_once_with_both_numbers(self, tmp_path, rows_file):
        model = saved(tmp_path / "model", tiny_model(max_position_embeddings=40))
        with pytest.warns(
            UserWarning, match=r"has \d+ tokens, but config.json of the model names 40 positions"
        ) as said:
            fit(model, rows_file, max_steps=1)
        assert sum("40 positions" in str(each.message) for each in said) == 1

    def test_rows_within_the_window_say_nothing(self, tmp_path, rows_file, recwarn):
        fit(saved(tmp_path / "model", tiny_model(vocab_size=289)), rows_file, max_steps=1)
        assert not [each for each in recwarn if "positions" in str(each.message)]


# -- ids --------------------------------------------------------------------------------------------------------------


class TestIds:
    @pytest.mark.parametrize("where", ["train", "val"])
    def test_a_row_beyond_the_embedding_is_refused(self, tmp_path, rows_file, where):
        model = saved(tmp_path / "model", tiny_model(vocab_size=289), grown_tokenizer("<a>", "<b>"))
        rows = sums(12)
        rows[7]["problem"] += " <b> and <a>"
        other = write_jsonl(tmp_path / "other.jsonl", rows)
        train, val = (other, rows_file) if where == "train" else (rows_file, other)
        pattern = rf"row 7 of the {where} data has the token id 290 \('<b>'\).* has 289 rows.*to 291 rows"
        with pytest.raises(UserError, match=pattern):
            fit(model, train, data={"val_path": str(val)})

    def test_a_pad_token_beyond_it(self, tmp_path, rows_file):
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        model = saved(tmp_path / "model", tiny_model(vocab_size=289), tokenizer)
        with pytest.raises(UserError, match=r"rows are padded with the token id 289 \('<pad>'\).*has 289 rows"):
            fit(model, rows_file)

    def test_one_that_no_row_has_is_warned_of(self, tmp_path, rows_file):
        model = saved(tmp_path / "model", tiny_model(vocab_size=289), grown_tokenizer("<a>"))
        with pytest.warns(UserWarning, match=r"ids up to 289 \('<a>'\).*289 rows"):
            fit(model, rows_file, max_steps=1)

    def test_the_tokenizer_of_another_model(self, tmp_path, rows_file):
        model = saved(tmp_path / "model", tiny_model(vocab_size=280))
        other = saved(tmp_path / "other", tiny_model(vocab_size=289))
        with pytest.raises(UserError, match=r"has 280 rows.*use the tokenizer of this model \(tokenizer_name is"):
            fit(model, rows_file, module={"tokenizer_name": str(other)})

    def test_a_resumed_run(self, tmp_path, rows_file):
        """The data may have changed since."""
        model = saved(tmp_path / "model", tiny_model(vocab_size=289), grown_tokenizer("<a>"))
        saving = {"enable_checkpointing": True, "default_root_dir": tmp_path / "run", "callbacks": [Checkpoints()]}
        fit(model, rows_file, max_steps=1, **saving)
        rows_file.write_text(rows_file.read_text().replace("Add ", "<a> "))
        last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
        with pytest.raises(UserError, match="the token id 289"):
            fit(model, rows_file, ckpt_path=last, max_steps=2, allow_changes=frozenset({"data"}), **saving)


@pytest.fixture(scope="module")
def beyond(tmp_path_factory):
    """A model, and rows with a token that it has no row for."""
    folder = tmp_path_factory.mktemp("beyond")
    saved(folder / "model", tiny_model(vocab_size=289), grown_tokenizer("<a>"))
    rows = sums(12)
    rows[3]["messages"][1]["content"] += " <a>"
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses(beyond, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = str(beyond / "rows.jsonl")
    weighting = [] if command in ("diagnose", "inspect") else ["--model.weighting", "DFT"]
    given = ["--model.model_name", str(beyond / "model"), *weighting, "--data", "ChatDataModule", "--data.path", rows]
    given += ["--data.val_path", rows, "--data.test_path", rows, "--trainer.accelerator", "cpu"]
    assert main([command, *given]) == 2
    said = capsys.readouterr()
    assert re.search(r"row 3 of the \w+ data has the token id 289 \('<a>'\).* has 289 rows", said.err)
    assert "fits" not in said.out
    assert not [path for path in tmp_path.glob("runs/default/*") if path.name != "cache"]


class TestTheStore:
    def test_the_largest_id_is_kept_and_an_older_store_is_scanned(self, beyond, tmp_path):
        from dft_lightning import ChatDataModule

        data = ChatDataModule(str(beyond / "rows.jsonl"), cache_dir=str(tmp_path))
        data.tokenizer = grown_tokenizer("<a>")
        data.setup("predict")
        assert (data.train_rows.largest_id, data.train_rows.first_row_with_id_from(289)) == (289, 3)
        report = next(tmp_path.glob("tokens/*/report.json"))
        manifest = json.loads(report.read_text())
        assert manifest.pop("largest_id") == 289
        report.write_text(json.dumps(manifest))
        store = Store(report.parent)
        assert store.largest_id == 289
        assert TokenizedRows(store, data.train_rows._rows, "").longest == max(
            len(row["input_ids"]) for row in _all(data)
        )


def _all(data):
    return [data.train_rows[index] for index in range(len(data.train_rows))]


@pytest.mark.parametrize("special", [True, False])
def test_an_added_special_token_in_messages_is_warned_of(tmp_path, recwarn, special):
    """It is read as text there, so that its new row would not be trained; a plain added token is not."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<x{i}>" for i in range(40)])
    tokenizer.add_tokens(["<note>"], special_tokens=special)
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [row | {"messages": [row["messages"][0], {"role": "assistant", "content": "<note>a"}]} for row in sums(8)]
    rows_file = write_jsonl(tmp_path / "rows.jsonl", rows)
    fit(tmp_path / "model", rows_file, module={"resize_embeddings": True})
    said = [str(each.message) for each in recwarn if "special_tokens=False" in str(each.message)]
    assert len(said) == special
    assert all("<note>" in each for each in said)
