"""Columns and keys that say what is shown or trained on are refused by name in every kind of source, or ignored."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import tiny_tokenizer, write_jsonl

from dft_lightning import ChatDataModule, NuminaMathDataModule
from dft_lightning.__main__ import main
from dft_lightning.data.sources import Columns
from dft_lightning.data.unsupported import EFFECTIVE, unsupported, unused, unused_line
from dft_lightning.errors import UserError

CASES = Path(__file__).resolve().parents[2].parent / "shared" / "cases" / "chats"
ALPACA = {"prompt": "instruction", "completion": "output"}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def chat(of_user=None, of_assistant=None):
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    return {"messages": [user | (of_user or {}), assistant | (of_assistant or {})]}


def made(folder, rows, kind=ChatDataModule, stage="fit", **options):
    """A data module that is set up, without a trainer."""
    data = kind(str(rows if isinstance(rows, Path) else write_jsonl(folder / "rows.jsonl", rows)), **options)
    data.options.cache_dir = str(folder / "cache")
    data.tokenizer = tiny_tokenizer()
    data.setup(stage)
    return data


REFUSED_KEYS = [
    *(
        ({}, {key: off})
        for key in ("train", "trainable", "training", "loss", "loss_mask")
        for off in (False, 0, [1, 0])
    ),
    *(({key: True}, {}) for key in ("train", "loss")),
    ({}, {"train": "no"}),
    ({}, {"loss": 0.5}),
    ({}, {"masked": True}),
    ({"masked": False}, {}),
    ({}, {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}),
    ({"tools": TOOLS}, {}),
    ({"functions": "[{}, 1]"}, {}),
]
HARMLESS_KEYS = [
    *(
        ({}, {key: on})
        for key in ("train", "trainable", "training", "loss", "loss_mask")
        for on in (True, 1, 1.0, None)
    ),
    *(({key: off}, {}) for key in ("train", "loss") for off in (False, 0, None)),
    ({"masked": True}, {"masked": False}),
    ({}, {"train_detail": []}),
    ({"tools": []}, {"tools": None, "tool_calls": [], "function_call": None, "reasoning_content": ""}),
    ({"functions": " [] "}, {"name": "x", "id": 3}),
]
REFUSED_COLUMNS = [
    *({name: TOOLS} for name in ("tools", "functions", "documents")),
    {"tools": json.dumps(TOOLS)},
    {"system": "Be brief."},
    {"system_prompt": "Be brief."},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"loss_mask": [0, 1]},
]
HARMLESS_COLUMNS = [
    *(
        {name: nothing}
        for name in ("tools", "documents", "chat_template_kwargs")
        for nothing in (None, [], {}, "", "[]")
    ),
    {"system": ""},
    {"system": " \n"},
    {"chat_template_kwargs": {"enable_thinking": None}},
    {"source": "x", "id": 1, "input": "y", "train": 1},
]


class TestWhatIsRefused:
    @pytest.mark.parametrize(("of_user", "of_assistant"), REFUSED_KEYS, ids=str)
    def test_keys(self, of_user, of_assistant):
        key = next(iter(of_user or of_assistant))
        found = unsupported(chat(of_user, of_assistant), Columns())
        assert list(found) == [f"key {key}"]
        assert found[f"key {key}"].startswith(f"message {1 if of_user else 2} has {key}: ")
        assert not unsupported(chat(of_user, of_assistant), Columns(ignore=(key,)))

    @pytest.mark.parametrize(("of_user", "of_assistant"), HARMLESS_KEYS, ids=str)
    def test_keys_that_ask_for_what_happens_anyway_pass(self, of_user, of_assistant):
        assert not unsupported(chat(of_user, of_assistant), Columns())

    @pytest.mark.parametrize("cells", REFUSED_COLUMNS, ids=str)
    def test_columns(self, cells):
        (name,) = cells
        assert list(unsupported(chat() | cells, Columns())) == [f"column {name}"]
        assert not unsupported(chat() | cells, Columns(ignore=(name,)))

    @pytest.mark.parametrize("cells", HARMLESS_COLUMNS, ids=str)
    def test_columns_that_say_nothing_pass(self, cells):
        assert not unsupported(chat() | cells, Columns())

    def test_sharegpt_messages_are_read_as_they_are(self):
        turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "train": True}]
        assert not unsupported({"c": turns}, Columns("c"))
        turns[1]["train"] = False
        assert list(unsupported({"c": turns}, Columns("c"))) == ["key train"]

    def test_a_system_prompt_that_is_the_first_message_too_passes(self):
        row = {"system": "s", "messages": [{"role": "system", "content": "s"}, *chat()["messages"]]}
        assert not unsupported(row, Columns())
        assert unsupported(row | {"system": "other"}, Columns())

    @pytest.mark.parametrize(("prompt", "other"), [("instruction", "input"), ("input", "instruction")])
    def test_both_halves_of_alpacas_prompt(self, prompt, other):
        columns, row = Columns(prompt=prompt, completion="output"), {prompt: "a", "output": "b"}
        assert list(unsupported(row | {other: "c"}, columns)) == [f"column {other}"]
        assert not unsupported(row | {other: ""}, columns)

    def test_columns_that_are_read_pass(self):
        assert not unsupported({"system": "a", "output": "b"}, Columns(prompt="system", completion="output"))
        assert not unsupported(chat() | {"loss_mask": [1]}, Columns(weight="loss_mask"))


class TestRuns:
    @pytest.mark.parametrize(
        ("row", "name"), [(chat({}, {"train": False}), "train"), (chat() | {"tools": TOOLS}, "tools")]
    )
    @pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "arrow", "hub"])
    def test_every_kind_of_source(self, row, name, ending, tmp_path, monkeypatch):
        rows = [chat({}, {"train": True}) | {"tools": []}] * 3 + [{"tools": []} | row] * 2
        path, place = tmp_path / f"rows.{ending}", "row 3"
        if ending == "hub":
            table = datasets.Dataset.from_list(rows)
            monkeypatch.setattr(datasets, "load_dataset", lambda **_: table)
        elif ending == "jsonl":
            write_jsonl(path, rows)
            place = r"rows\.jsonl line 4"
        elif ending == "json":
            path.write_text(json.dumps(rows))
        elif ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            table = pa.Table.from_pylist(rows)
            with path.open("wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        given = {"dataset": "some/set"} if ending == "hub" else {"path": str(path)}
        with pytest.raises(UserError, match=rf"{name} in 2 of 5 rows \([^)]*{place}: .*data.ignore '\[{name}\]'"):
            self.set_up(ChatDataModule(**given, cache_dir=str(tmp_path)))
        assert len(self.set_up(ChatDataModule(**given, cache_dir=str(tmp_path), ignore=[name])).train_rows) == 5

    @staticmethod
    def set_up(data, stage="fit"):
        data.tokenizer = tiny_tokenizer()
        data.setup(stage)
        return data

    @pytest.mark.parametrize(
        ("stage", "option"), [("fit", "val_path"), ("validate", "val_path"), ("test", "test_path"), ("predict", "path")]
    )
    def test_rows_of_every_command(self, stage, option, tmp_path):
        good, bad = write_jsonl(tmp_path / "good.jsonl", [chat()]), write_jsonl(tmp_path / "bad.jsonl", [chat()])
        write_jsonl(bad, [chat() | {"documents": ["d"]}])
        paths = {"path": str(good)} | {option: str(bad)}
        with pytest.raises(UserError, match=r"column documents in 1 of 1 rows .*bad\.jsonl line 1"):
            self.set_up(ChatDataModule(**paths, cache_dir=str(tmp_path)), stage)

    def test_it_is_no_matter_of_the_share_of_unusable_rows(self, tmp_path):
        rows = [chat()] * 99 + [chat({}, {"loss_mask": 0})]
        with pytest.raises(UserError, match=r"key loss_mask in 1 of 100 rows .*rows\.jsonl line 100: message 2 has"):
            made(tmp_path, rows, max_unusable_share=1)

    def test_all_that_a_row_has_is_named_at_once(self, tmp_path):
        rows = [chat({}, {"train": False}) | {"system": "s"}, chat() | {"tools": TOOLS}]
        with pytest.raises(UserError, match=r"ignore '\[system, tools, train\]'.*given as data\.system_prompt"):
            made(tmp_path, rows)
        assert len(made(tmp_path, rows, ignore=["system", "tools", "train"]).train_rows) == 2

    def test_many_rows_are_refused_before_they_are_tokenized(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise AssertionError("the rows were tokenized")

        monkeypatch.setattr("dft_lightning.data.tokenized._build", refuse)
        with pytest.raises(UserError, match=r"column tools in 1 of the first 1000 rows \(rows\.jsonl line 8: "):
            made(tmp_path, [chat()] * 7 + [chat() | {"tools": TOOLS}] + [chat()] * 993)

    def test_a_row_behind_the_first_thousand_is_found(self, tmp_path):
        with pytest.raises(UserError, match=r"column tools in 1 of 1001 rows \(rows\.jsonl line 1001: "):
            made(tmp_path, [chat()] * 1000 + [chat() | {"tools": TOOLS}])

    def test_tokens_cached_by_an_earlier_version_are_not_used(self, tmp_path, monkeypatch):
        with monkeypatch.context() as earlier:
            earlier.setattr("dft_lightning.data.tokenized._FORMAT", "3")
            earlier.setattr("dft_lightning.data.tokenized.refuse_row", lambda *_: None)
            assert len(made(tmp_path, [chat({}, {"train": False})]).train_rows) == 1
        with pytest.raises(UserError, match="key train in 1 of 1 rows"):
            made(tmp_path, [chat({}, {"train": False})])

    def test_ignoring_is_part_of_the_datas_identity_only_if_it_changes_something(self, tmp_path):
        def key(**options):
            return made(tmp_path, [chat({}, {"train": True, "id": 1})], **options).train_rows.fingerprint

        assert key(ignore=["id"]) == key() == key(ignore=[])
        assert len({key(), key(ignore=["train"]), key(ignore=["tools"])}) == 3
        assert key(ignore=["tools", "train"]) == key(ignore=["train", "tools", "train"])

    def test_what_the_rows_are_read_from_cannot_be_ignored(self):
        for options in ({"ignore": ["messages"]}, {"ignore": ["content"]}, {**ALPACA, "ignore": ["output"]}):
            with pytest.raises(UserError, match=r"data\.ignore names what the rows are read from"):
                ChatDataModule("x", **options)

    def test_reasoning_can_be_passed_over(self, tmp_path):
        row = chat({}, {"reasoning_content": "thoughts"})
        with pytest.raises(UserError, match=r"--data\.ignore '\[reasoning_content\]'"):
            made(tmp_path, [row])
        rows = made(tmp_path, [row], ignore=["reasoning_content"]).train_rows
        assert rows.content_hash([0]) == made(tmp_path, [chat()]).train_rows.content_hash([0])


class TestWhatIsListed:
    @pytest.mark.parametrize("ending", ["jsonl", "parquet"])
    def test_columns_and_keys_that_nothing_reads(self, ending, tmp_path, caplog):
        rows = [chat({"name": "n"}, {"train": True}) | {"id": 1, "source": "s", "system": "", "tools": []}]
        path = tmp_path / f"rows.{ending}"
        write_jsonl(path, rows) if ending == "jsonl" else pq.write_table(pa.Table.from_pylist(rows), path)
        with caplog.at_level("INFO"):
            data = made(tmp_path, path, val_path=str(path))
            data.setup("fit")
        lines = [record.message for record in caplog.records if "Not used" in record.message]
        assert lines == ["Not used: columns 'id'; keys of messages 'name' (data.ignore takes names off this list)"]
        caplog.clear()
        with caplog.at_level("INFO"):
            made(tmp_path, path, ignore=["id", "name"])
        assert "Not used" not in caplog.text

    def test_numina_maths_own_columns_are_no_news(self, tmp_path, caplog):
        row = {"source": "s", "problem": "p", "solution": "q", **chat()}
        with caplog.at_level("INFO"):
            data = made(tmp_path, [row], NuminaMathDataModule)
            made(tmp_path, [row | {"level": 1}], NuminaMathDataModule)
        assert len(data.train_rows) == 1
        assert (
            len(
                made(
                    tmp_path, [row], NuminaMathDataModule, messages="messages", prompt=None, completion=None
                ).train_rows
            )
            == 1
        )
        assert [r.message for r in caplog.records if "Not used" in r.message] == [
            "Not used: columns 'level' (data.ignore takes names off this list)"
        ]

    def test_names_of_hostile_rows_are_few_short_and_printed_as_text(self):
        names = unused(chat() | {f"\x1b[31m{index}" + "x" * 1000: 1 for index in range(1000)}, Columns())
        assert len(names) == 20
        assert max(map(len, names)) <= 60
        assert "\x1b" not in unused_line(names)
        assert not unused_line([])

    def test_what_changes_tokens_is_what_the_identity_has(self):
        assert {"train", "tools", "input", "weight", "reasoning_content", "tool_calls"} <= EFFECTIVE


TOOL_CALL = chat({}, {"content": "", "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]})
RESULT = {"messages": [*chat()["messages"], {"role": "tool", "content": "{}"}, *chat()["messages"][1:]]}
PARTS = chat({"content": [{"type": "text", "text": "a"}]})
DEVELOPER = {"messages": [{"role": "developer", "content": "s"}, *chat()["messages"]]}
CALL = {"messages": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}]}
SEEN = {"messages": [{"from": "human", "value": "a"}, {"from": "observation", "value": "{}"}]}


class TestSampleFiles:
    """The kinds that practitioners have, made here; those of the shared folder where it is there."""

    @pytest.mark.parametrize(
        ("row", "why"),
        [
            (TOOL_CALL, r"unusable: tool calls are not supported \(rows\.jsonl line 1: the key tool_calls"),
            (chat({}, {"content": None, "tool_calls": [{}]}), "unusable: tool calls are not supported"),
            (chat({}, {"content": None, "function_call": {"name": "f"}}), "unusable: tool calls are not supported"),
            (RESULT, r"the result of a tool is not supported \(rows\.jsonl line 1: a message of the role tool"),
            (PARTS, r"content in parts is not supported \(rows\.jsonl line 1: write their texts as one text"),
            (DEVELOPER, r"the role developer is not supported \(rows\.jsonl line 1: write system in its place"),
            (CALL, "tool calls are not supported"),
            (SEEN, "the result of a tool is not supported"),
            (chat({}, {"reasoning_content": "c"}), "reasoning outside the content is not supported"),
            (chat({}, {"content": "", "thinking": "c"}), "reasoning outside the content is not supported"),
        ],
    )
    def test_rows_have_the_right_reason(self, row, why, tmp_path):
        with pytest.raises(UserError, match=why):
            made(tmp_path, [row])

    def test_the_advice_for_the_role_developer_works(self, tmp_path):
        first, *rest = DEVELOPER["messages"]
        assert len(made(tmp_path, [{"messages": [first | {"role": "system"}, *rest]}]).train_rows) == 1

    @pytest.mark.parametrize(
        ("name", "options", "refused", "ignored"),
        [
            ("tools", {}, "column tools in 1 of 1", None),
            ("tools_as_text", {}, "column tools in 1 of 1", None),
            ("sharegpt_tools", {"messages": "conversations"}, r"column system in 1 .*column tools in 1 ", None),
            ("flags", {}, r"key loss_mask in 1 of 2 .*line 2.*; the key train in 1 of 2 .*line 1", 2),
            ("alpaca", ALPACA, r"column input in 1 of 2 rows \(alpaca\.jsonl line 1: 'good morning'", 2),
            ("kwargs", {}, "column chat_template_kwargs in 1 of 1 .*data.template_kwargs", 1),
            ("content_parts", {}, "content in parts is not supported", None),
            ("developer", {}, "the role developer is not supported", None),
            ("reasoning_content", {}, r"reasoning outside .*data\.ignore '\[reasoning_content\]'", 1),
        ],
    )
    def test_shared_files(self, name, options, refused, ignored, tmp_path):
        if not (path := CASES / f"{name}.jsonl").is_file():
            pytest.skip(f"the sample file is not at {path}")
        with pytest.raises(UserError, match=refused) as error:
            made(tmp_path, path, **options)
        if ignored is not None:
            names = str(error.value).partition("data.ignore '[")[2].partition("]'")[0].split(", ")
            assert len(made(tmp_path, path, **options, ignore=names).train_rows) == ignored


COMMANDS = ["fit", "validate", "test", "predict", "diagnose", "inspect", "plan"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_and_ignores(command, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = str(write_jsonl(tmp_path / "rows.jsonl", [chat({}, {"train": False}) | {"tools": TOOLS}] * 4))
    options = ["--model.model_name", str(model_dir), "--model.weighting", "DFT", "--data.cache_dir", "cache"]
    options += ["--data", "ChatDataModule", "--data.path", rows, "--data.val_path", rows, "--data.test_path", rows]
    options += ["--data.global_batch_size", "4"]
    options += {"plan": ["--device", "cpu"]}.get(command, ["--trainer.accelerator", "cpu", "--run_dir", "run"])
    options += ["--trainer.max_steps", "1"] if command == "fit" else []
    if command in ("diagnose", "inspect"):
        options = [option for option in options if option not in ("--model.weighting", "DFT")]
    assert main([command, *options]) == 2
    assert "the column tools in 4 of 4 rows (rows.jsonl line 1" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert main([command, *options, "--data.ignore", "[train, tools]"]) == 0
    if command == "fit":
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["init_args"]["ignore"] == [
            "train",
            "tools",
        ]
