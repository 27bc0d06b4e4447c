"""Local files in every state of repair, the hub's own code, and rows of every shape."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dft_lightning.chats import UnusableRow
from dft_lightning.data.readers import place_of, read_row
from dft_lightning.data.sources import Columns, conversation, load_rows
from dft_lightning.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"


def row(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}], "source": text}


def write_parquet(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([row(text) for text in texts]), path)
    return path


def load(path: Path | str, cache: Path, **options: Any) -> datasets.Dataset:
    return load_rows(dataset=None, path=str(path), cache_dir=cache, **options)


def sources(rows: datasets.Dataset) -> list[Any]:
    return [read_row(raw)["source"] for raw in rows]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


class TestColumns:
    def test_prompt_and_completion_put_the_default_messages_aside(self) -> None:
        assert Columns(prompt="q", completion="a") == Columns(None, "q", "a")
        assert Columns().wanted == ["messages"]
        assert Columns(prompt="q", completion="a").wanted == ["q", "a"]

    @pytest.mark.parametrize(
        "given", [(None, None, None), ("messages", "q", None), (None, None, "a"), ("chat", "q", "a"), ("", None, None)]
    )
    def test_anything_else_is_refused(self, given: tuple[str | None, str | None, str | None]) -> None:
        with pytest.raises(UserError, match=r"data\.messages.*data\.prompt"):
            Columns(*given)


class TestWhichFiles:
    def test_either_the_hub_or_a_path(self, tmp_path: Path) -> None:
        for dataset, path in [(None, None), ("a/b", str(tmp_path))]:
            with pytest.raises(UserError, match=r"either data\.dataset .* or data\.path"):
                load_rows(dataset=dataset, path=path)

    @pytest.mark.parametrize("option", ["name", "revision"])
    def test_a_path_has_no_name_and_no_revision(self, option: str, tmp_path: Path, cache: Path) -> None:
        with pytest.raises(UserError, match=r"data\.revision"):
            load(write_parquet(tmp_path / "a.parquet", "1"), cache, **{option: "x"})

    def test_a_folder_is_read_in_the_order_of_its_names(self, tmp_path: Path, cache: Path) -> None:
        for name in ["b.parquet", "deep/c.parquet", "a.parquet", ".hidden/d.parquet"]:
            write_parquet(tmp_path / "rows" / name, name)
        (tmp_path / "rows" / "README.md").write_text("no rows")
        rows = load(tmp_path / "rows", cache)
        assert sources(rows) == ["a.parquet", "b.parquet", "deep/c.parquet"]
        assert [place_of(raw, 9) for raw in rows][2] == "deep/c.parquet row 0"
        assert sources(load(tmp_path / "rows" / "?.parquet", cache)) == ["a.parquet", "b.parquet"]

    def test_only_the_files_of_the_split_are_read(self, tmp_path: Path, cache: Path) -> None:
        names = ["train-00000-of-00002", "train-00001-of-00002", "val", "heldout"]
        for name in names:
            write_parquet(tmp_path / "rows" / f"{name}.parquet", name)
        assert sources(load(tmp_path / "rows", cache)) == names[:2]
        assert sources(load(tmp_path / "rows", cache, split="validation")) == ["val"]
        assert sources(load(tmp_path / "rows", cache, split="heldout")) == ["heldout"]
        assert sources(load(tmp_path / "rows" / "val.parquet", cache)) == ["val"], "a named file is what is asked for"
        for path in [tmp_path / "rows", tmp_path / "rows" / "va*.parquet"]:
            with pytest.raises(UserError, match=r"'test'.*val\.parquet"):
                load(path, cache, split="test")

    def test_a_lone_file_in_a_folder_is_not_taken_for_another_split(self, tmp_path: Path, cache: Path) -> None:
        write_parquet(tmp_path / "rows" / "train.parquet", "1")
        with pytest.raises(UserError, match="'validation'"):
            load(tmp_path / "rows", cache, split="validation")

    @pytest.mark.parametrize("name", ["missing.jsonl", "no*match.jsonl", "empty_folder"])
    def test_what_is_not_there_is_named(self, name: str, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "empty_folder").mkdir()
        with pytest.raises(UserError, match=r"matches no files.*\.parquet, \.jsonl, \.json") as caught:
            load(tmp_path / name, cache)
        assert name in str(caught.value)

    def test_unknown_endings_and_mixtures_are_refused(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "rows.csv").write_text("a,b\n")
        with pytest.raises(UserError, match=r"rows\.csv.*'\.csv'.*expected"):
            load(tmp_path / "rows.csv", cache)
        write_parquet(tmp_path / "a.parquet", "1")
        (tmp_path / "b.jsonl").write_text("{}\n")
        with pytest.raises(UserError, match=r"mixes '\.jsonl', '\.parquet'"):
            load(tmp_path, cache)


class TestDamagedFiles:
    @pytest.mark.parametrize("content", [b"", b"\n \n\r\n"])
    @pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".json"])
    def test_an_empty_file_is_named(self, ending: str, content: bytes, tmp_path: Path, cache: Path) -> None:
        (tmp_path / f"rows{ending}").write_bytes(content)
        with pytest.raises(UserError, match=rf"rows\{ending}"):
            load(tmp_path / f"rows{ending}", cache)
        assert not list(cache.rglob("*.arrow"))

    def test_a_parquet_file_without_rows_is_named(self, tmp_path: Path, cache: Path) -> None:
        pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "rows.parquet")
        with pytest.raises(UserError, match=r"rows\.parquet' has no rows"):
            load(tmp_path / "rows.parquet", cache)

    def test_a_cut_off_parquet_file_is_named_among_good_ones(self, tmp_path: Path, cache: Path) -> None:
        write_parquet(tmp_path / "rows" / "a.parquet", "1")
        whole = write_parquet(tmp_path / "rows" / "b.parquet", *map(str, range(500))).read_bytes()
        (tmp_path / "rows" / "b.parquet").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=r"cannot read .*b\.parquet"):
            load(tmp_path / "rows", cache)

    @pytest.mark.parametrize("ending", ["parquet", "arrow"])
    def test_wherever_a_file_was_cut_off_it_is_named(self, ending: str, tmp_path: Path, cache: Path) -> None:
        table, path = pa.Table.from_pylist([row(str(i)) for i in range(30)]), tmp_path / f"rows.{ending}"
        if ending == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, 10)
        whole = path.read_bytes()
        unseen = {at for at in range(len(whole)) if whole[at:].startswith(b"\xff" * 4)}  # by Arrow: between its batches
        assert len(unseen) >= 4 * (ending == "arrow")
        for cut in {*range(0, len(whole), 61), *unseen, len(whole) - 1}:
            path.write_bytes(whole[:cut])
            with pytest.raises(UserError, match=path.name):
                load(path, cache)

    def test_a_parquet_file_with_broken_pages_is_named(self, tmp_path: Path, cache: Path) -> None:
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist([row(f"{i:050d}") for i in range(5000)]), path, row_group_size=1000)
        content = bytearray(path.read_bytes())
        middle = len(content) // 2  # the first rows and the footer stay whole: only reading on finds it
        content[middle : middle + 2000] = b"\xff" * 2000
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*rows\.parquet"):
            load(path, cache)
        assert list(cache.rglob("*")) == [cache / "dft_rows"], "no part is left behind"

    def test_files_with_other_columns_are_named(self, tmp_path: Path, cache: Path) -> None:
        write_parquet(tmp_path / "rows" / "a.parquet", "1")
        pq.write_table(pa.table({"text": ["x"]}), tmp_path / "rows" / "b.parquet")
        with pytest.raises(UserError, match=r"b\.parquet.*'text'.*'messages'"):
            load(tmp_path / "rows", cache)

    def test_types_that_datasets_does_not_know_are_named(self, tmp_path: Path, cache: Path) -> None:
        table = pa.table({"a": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int32()))})
        pq.write_table(table, tmp_path / "rows.parquet")
        with pytest.raises(UserError, match=r"rows\.parquet.*map<string"):
            load(tmp_path / "rows.parquet", cache)

    def test_categories_are_read_as_their_values(self, tmp_path: Path, cache: Path) -> None:
        expected = [f"{name} {i // 700}" for name in "ab" for i in range(3000)]
        for name, cells in [("a", expected[:3000]), ("b", expected[3000:])]:  # every piece has its own categories
            table = pa.table({"source": pa.array(cells).dictionary_encode()})
            pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=900)
        rows = load(tmp_path / "*.parquet", cache)
        assert sources(rows) == expected
        assert sources(rows.select([5999, 0])) == ["b 4", "a 0"]


HOSTILE = [
    (b'{"source": "plain"}', "plain"),
    ('{"source": "line\u2028separator\u0085and\x0bmore"}'.encode(), None),  # json forbids a raw \x0b
    ('{"source": "line\u2028separator\u0085"}'.encode(), "line\u2028separator\u0085"),
    (b'{"source":\r "carriage"}\r', "carriage"),
    (b'{"source": ["a", ["nested"]]}', ["a", ["nested"]]),
    (b'{"source": 7, "other": {"a": null}}', 7),
    (b'{"source": "\\ud800"}', "\ud800"),
    (b'{"source": "\xff\xfe"}', None),
    (b"[" * 100_000, None),
    (b"3", None),
    (b'{"source": "cut', None),
]


class TestJson:
    def test_no_line_disturbs_another(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(line for line, _ in HOSTILE))
        rows = load(tmp_path / "rows.jsonl", cache)
        assert len(rows) == len(HOSTILE)
        for number, (raw, (_, expected)) in enumerate(zip(rows, HOSTILE, strict=True), start=1):
            assert place_of(raw, 99) == f"rows.jsonl line {number}"
            if expected is None:
                with pytest.raises(UnusableRow, match=r"not valid JSON|not a JSON object"):
                    read_row(raw)
            else:
                assert read_row(raw)["source"] == expected

    def test_blank_lines_are_no_rows_but_count_as_lines(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "rows.jsonl").write_bytes(b'\n{"source": 1}\r\n  \r\n\t\n{"source": 2}\n\n')
        rows = load(tmp_path / "rows.jsonl", cache)
        assert sources(rows) == [1, 2]
        assert [place_of(raw, 0) for raw in rows] == ["rows.jsonl line 2", "rows.jsonl line 5"]

    def test_numbers_go_on_over_reads_and_begin_anew_with_a_file(
        self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dft_lightning.data.readers._READ_BYTES", 50)
        for name in "ab":
            lines = [json.dumps({"source": f"{name}{i}"}) for i in range(1, 31)]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        rows = load(tmp_path / "*.jsonl", cache)
        assert sources(rows) == [f"{name}{i}" for name in "ab" for i in range(1, 31)]
        assert [place_of(raw, 0) for raw in rows] == [f"{name}.jsonl line {i}" for name in "ab" for i in range(1, 31)]

    @pytest.mark.parametrize(
        "content",
        [[{"source": 1}, {"source": "x"}], {"version": "1", "tags": ["a"], "data": [{"source": 1}, {"source": "x"}]}],
    )
    def test_a_list_of_rows_or_an_object_with_one(self, content: Any, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "rows.json").write_text(json.dumps(content, indent=1))
        rows = load(tmp_path / "rows.json", cache)
        assert sources(rows) == [1, "x"]
        assert place_of(rows[1], 0) == "rows.json row 1"

    def test_lines_under_the_ending_json(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "rows.json").write_text('{"source": 1}\n{"source": 2}\n')
        assert sources(load(tmp_path / "rows.json", cache)) == [1, 2]

    @pytest.mark.parametrize("content", ['{"a": [{}], "b": [{}]}', '{"a": 1}', "[1, 2]", "7", '[{"a": 1}', '"\ud800"'])
    def test_other_json_is_refused_by_name(self, content: str, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "rows.json").write_bytes(content.encode(errors="surrogatepass"))
        with pytest.raises(UserError, match=r"cannot read .*rows\.json"):
            load(tmp_path / "rows.json", cache)


class TestSaved:
    def test_a_saved_dataset(self, tmp_path: Path, cache: Path) -> None:
        datasets.Dataset.from_list([row(str(i)) for i in range(2500)]).save_to_disk(tmp_path / "saved", num_shards=3)
        rows = load(tmp_path / "saved", cache)
        assert sources(rows) == [str(i) for i in range(2500)]
        assert rows[7]["messages"] == row("7")["messages"]

    def test_saved_splits(self, tmp_path: Path, cache: Path) -> None:
        splits = {name: datasets.Dataset.from_list([row(name)]) for name in ("train", "test")}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
        assert sources(load(tmp_path / "saved", cache)) == ["train"]
        assert sources(load(tmp_path / "saved", cache, split="test")) == ["test"]
        with pytest.raises(UserError, match="'validation'"):
            load(tmp_path / "saved", cache, split="validation")


class TestSlices:
    @pytest.mark.parametrize(
        ("split", "expected"),
        [("train[:3]", [0, 1, 2]), ("train[90%:]", [9]), ("train[8:100]", [8, 9]), ("train[:1]+train[-1:]", [0, 9])],
    )
    def test_a_slice(self, split: str, expected: list[int], tmp_path: Path, cache: Path) -> None:
        path = write_parquet(tmp_path / "rows.parquet", *map(str, range(10)))
        rows = load(path, cache, split=split)
        assert sources(rows) == [str(i) for i in expected]
        assert rows._fingerprint == load(path, cache, split=split)._fingerprint != load(path, cache)._fingerprint
        assert place_of(rows[-1], 0) == f"rows.parquet row {expected[-1]}", "the place in the file, not in the slice"

    @pytest.mark.parametrize("split", ["train[", "train[:x]", "train+test", "train[:5]+test[:5]"])
    def test_what_is_no_slice(self, split: str, tmp_path: Path, cache: Path) -> None:
        with pytest.raises(UserError, match=r"data\.split 'train"):
            load(write_parquet(tmp_path / "rows.parquet", "1"), cache, split=split)


class TestFingerprint:
    def test_it_follows_content_not_place_or_time(self, tmp_path: Path, cache: Path) -> None:
        path = write_parquet(tmp_path / "rows.parquet", "aaaa")
        first = load(path, cache)
        (tmp_path / "copy").mkdir()
        copy = Path(shutil.copy(path, tmp_path / "copy"))
        os.utime(copy, (1, 1))
        assert load(copy, cache)._fingerprint == first._fingerprint
        before = path.stat()
        write_parquet(path, "bbbb")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size, "else the test does not test what it says"
        second = load(path, cache)
        assert second._fingerprint != first._fingerprint
        assert (sources(first), sources(second)) == (["aaaa"], ["bbbb"])

    @pytest.mark.slow
    def test_another_process_finds_the_same(self, tmp_path: Path, cache: Path) -> None:
        path = write_parquet(tmp_path / "rows.parquet", *"abcdef")
        code = (
            "from dft_lightning.data.sources import load_rows\n"
            f"rows = load_rows(dataset=None, path={str(path)!r}, split='train[2:4]', cache_dir={str(cache)!r})\n"
            "print(rows._fingerprint)"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert other.stdout.strip() == load(path, cache, split="train[2:4]")._fingerprint

    def test_a_cut_off_arrow_file_is_written_anew(self, tmp_path: Path, cache: Path) -> None:
        path = write_parquet(tmp_path / "rows.parquet", *map(str, range(3000)))
        load(path, cache)
        (arrow,) = cache.rglob("*.arrow")
        arrow.write_bytes(arrow.read_bytes()[:20_000])
        assert sources(load(path, cache)) == [str(i) for i in range(3000)]


class TestHub:
    def test_without_a_network_the_error_names_the_way_out(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match=r"AI-MO/NuminaMath-CoT.*data\.path") as caught:
            load_rows(dataset="AI-MO/NuminaMath-CoT", path=None, cache_dir=cache)
        assert caught.value.__cause__ is not None

    def test_the_options_reach_datasets(self, tmp_path: Path, cache: Path) -> None:
        for split in ("train", "test"):
            write_parquet(tmp_path / "set" / f"{split}.parquet", f"{split} 0", f"{split} 1")
        rows = load_rows(dataset=str(tmp_path / "set"), path=None, split="test[1:]", cache_dir=cache)
        assert sources(rows) == ["test 1"]
        assert place_of(rows[0], 5) == "row 5"
        with pytest.raises(UserError, match="nosuch"):
            load_rows(dataset=str(tmp_path / "set"), path=None, name="nosuch", cache_dir=cache)


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "system", "value": ""}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PAIR = Columns(prompt="p", completion="c")


class TestConversation:
    @pytest.mark.parametrize(
        ("columns", "given", "expected"),
        [
            (Columns(), {"messages": CHAT}, CHAT),
            (Columns("chat"), {"chat": SHAREGPT, "messages": None}, [{"role": "system", "content": ""}, *CHAT]),
            (Columns(), {"messages": [{"role": "tool", "content": "x"}]}, [{"role": "tool", "content": "x"}]),
            (PAIR, {"p": "q", "c": "a"}, CHAT),
            (PAIR, {"p": [*CHAT, CHAT[0]], "c": "b"}, [*CHAT, CHAT[0], {"role": "assistant", "content": "b"}]),
            (PAIR, {"p": CHAT[:1], "c": CHAT[1:]}, CHAT),
        ],
    )
    def test_shapes(self, columns: Columns, given: dict[str, Any], expected: list[dict[str, str]]) -> None:
        assert conversation(given, columns) == expected

    def test_arrow_gives_messages_every_key_of_any_row(self) -> None:
        given = [message | {"from": None, "value": None} for message in CHAT]
        got = conversation({"messages": given}, Columns())
        assert [(message["role"], message["content"]) for message in got] == [("user", "q"), ("assistant", "a")]
        mixed = [{"role": None, "content": None, "from": "human", "value": "q"}]
        assert conversation({"messages": mixed}, Columns()) == CHAT[:1]

    def test_what_else_a_message_has_is_the_renderer_s_to_refuse(self) -> None:
        assert conversation({"messages": [CHAT[1] | {"tool_calls": ["x"]}]}, Columns())[0]["tool_calls"] == ["x"]

    @pytest.mark.parametrize(
        ("columns", "given", "reason"),
        [
            (Columns(), {}, "a column is missing or null"),
            (Columns(), {"messages": None}, "a column is missing or null"),
            (PAIR, {"p": "q"}, "a column is missing or null"),
            (Columns(), {"messages": []}, "not a list of messages"),
            (Columns(), {"messages": "q"}, "not a list of messages"),
            (Columns(), {"messages": {"role": "user", "content": "q"}}, "not a list of messages"),
            (Columns(), {"messages": [CHAT]}, "not a list of messages"),
            (PAIR, {"p": "q", "c": 7}, "not a list of messages"),
            (Columns(), {"messages": [{"content": "q"}]}, "a message has no known role"),
            (Columns(), {"messages": [{"role": 3, "content": "q"}]}, "a message has no known role"),
            (Columns(), {"messages": [{"from": "narrator", "value": "q"}]}, "a message has no known role"),
            (Columns(), {"messages": [{"from": ["human"], "value": "q"}]}, "a message has no known role"),
            (Columns(), {"messages": [{"role": "user"}]}, "a message is not text"),
            (Columns(), {"messages": [{"from": "gpt", "value": ["a"]}]}, "a message is not text"),
            (Columns(), {"messages": [{"role": "user", "content": " \n"}]}, "a message is empty"),
            (PAIR, {"p": "q", "c": ""}, "a message is empty"),
        ],
    )
    def test_reasons(self, columns: Columns, given: dict[str, Any], reason: str) -> None:
        with pytest.raises(UnusableRow) as caught:
            conversation(given, columns)
        assert caught.value.reason == reason


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real rows are not there: {SHARED}")
class TestRealRows:
    def test_the_training_rows_are_not_the_validation_rows(self, cache: Path) -> None:
        folder = SHARED / "data" / "numina_schema"
        train, validation = load(folder, cache), load(folder, cache, split="validation")
        assert (len(train), len(validation)) == (14_973, 500)
        assert train[0]["messages"] == pq.read_table(folder / "train.parquet")["messages"][0].as_py()
        first = read_row(train[0])
        assert conversation(first, Columns(prompt="problem", completion="solution")) == conversation(first, Columns())

    def test_benchmark_lines(self, cache: Path) -> None:
        rows = load(SHARED / "data" / "benchmarks" / "math500.jsonl", cache)
        assert len(rows) == 500
        chat = conversation(rows[0], Columns(prompt="problem", completion="answer"))
        assert [message["role"] for message in chat] == ["user", "assistant"]
