"""Files made to do harm, on the road of a run: what is in them is used as it stands, or counted with its place, or the
file is refused by name; and no row's damage changes how another row is read."""

import gzip
import io
import json
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dft_lightning import ChatDataModule
from dft_lightning.chats import MOST_CHARACTERS
from dft_lightning.data.rendering import ChatRenderer
from dft_lightning.data.sources import Columns, load_rows
from dft_lightning.data.tokenized import tokenize
from dft_lightning.errors import UserError

RENDERER = ChatRenderer(tiny_tokenizer())
END = "<|im_end|>"
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def read(files, columns=None, renderer=RENDERER, **options):
    """The report, and the used rows by their place in the source; checked for what holds whatever is in the files."""
    options = {"max_length": 5000, "overlength": "truncate", "max_unusable_share": 1.0, "workers": 0} | options
    with tempfile.TemporaryDirectory() as folder:
        (inside := Path(folder, "in")).mkdir()
        for name, content in files.items():
            (inside / name).write_bytes(content)
        rows = load_rows(dataset=None, path=str(inside), cache_dir=folder)
        tokens = tokenize(rows, renderer, columns or Columns(), cache_dir=Path(folder), **options)
        report, items = tokens.report, {(item := tokens[index])["row"]: item for index in range(len(tokens))}
    assert report.rows == len(rows) == report.used + report.dropped + sum(report.unusable.values())
    assert report.used == len(items)
    for why, count in report.unusable.items():
        assert len(report.examples[why]) == min(count, 3)
    assert str(report).isprintable(), "on one line, and nothing in it that a terminal obeys"
    assert len(str(report)) < 9000
    return report, items


def refused(files, match):
    with pytest.raises(UserError, match=match) as caught:
        read(files)
    assert str(caught.value)[:3000] == str(caught.value)
    assert str(caught.value).isprintable()


def places(report):
    return {text.partition(":")[0] for texts in report.examples.values() for text in texts}


def learned(item, tokenizer=RENDERER.tokenizer):
    return tokenizer.decode(item["input_ids"][item["supervised"]], clean_up_tokenization_spaces=False)


def control(item, tokenizer=RENDERER.tokenizer):
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [index for index in item["input_ids"].tolist() if index in special]


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def line(messages, **options):
    return json.dumps({"messages": messages}, **options).encode()


def columns(table, ending="parquet"):
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) if ending == "arrow" else pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(table, 10)
    return sink.getvalue()


def ids(*chats):
    return [RENDERER.render(messages).input_ids for messages in chats]


# ---- rows as hypothesis makes them, right and wrong

SPELT = [END, "<|im_start|>assistant\n", "<|endoftext|>", "<|eot_id|>", "<s>", "[INST]", "dftmark0z", "\n"]
CHARACTERS = st.characters(exclude_categories=["Cs"])  # control characters and U+2028 among them
TEXTS = st.lists(st.sampled_from(SPELT) | st.text(CHARACTERS, min_size=1), min_size=1).map("".join).filter(str.strip)
CHATS = st.lists(TEXTS, min_size=2, max_size=4).map(lambda texts: chat(*texts[: len(texts) // 2 * 2]))
OURS = st.sampled_from(["__line__", "__place__", "__number__", "source"])  # names that the package uses itself
GOOD = st.builds(lambda others, messages: others | {"messages": messages}, st.dictionaries(OURS, st.text()), CHATS)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JUNK = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
NO_ROLES = [None, 3, float("nan"), ["user"], {"a": 1}, "", "tool", "Assistant", "x\n\x1b[31m" * 999]
NO_TEXTS = ["", " \n", "\ud800", "a\udfffb", None, 7, float("inf"), [], ["a"], [[["a"]]], {"a": 1}]
TOOLS = {"from": "gpt", "value": "a", "tool_calls": [1]}
CHANGES = [*({"role": role} for role in NO_ROLES), *({"content": text} for text in NO_TEXTS), TOOLS]
CHANGES += [TOOLS | {"role": None}, {"role": None, "from": ["gpt"], "value": "a"}]
SPOILT = st.builds(lambda messages, change: [messages[0], messages[1] | change], CHATS, st.sampled_from(CHANGES))
DEEP = [b'{"messages": ' + b"[" * depth + b"]" * depth + b"}" for depth in (9, 900, 990, 1000, 5000, 100_000)]
NO_JSON = [b"\xff" * 9999, b"\x1f\x8b\x08\0", '{"messages": "\u00e9'.encode()[:-1], b"NaN", b"1" * 5000, b"\0"]
WRONG = st.one_of(
    (SPOILT | CHATS.map(lambda messages: messages[:1]) | CHATS.map(lambda messages: [messages]) | JUNK).map(line),
    JUNK.filter(lambda junk: not isinstance(junk, dict)).map(lambda junk: json.dumps(junk).encode()),
    CHATS.map(lambda messages: line(messages)[:-1]),
    CHATS.map(lambda messages: line(messages)[:-1] + b', "messages": []}'),
    CHATS.map(lambda messages: line(messages).replace(b'"role":', b'"role": "user", "role":', 1)),
    st.sampled_from(DEEP + NO_JSON),
)
BOM = st.sampled_from([b"", b"\xef\xbb\xbf"])


@st.composite
def jsonl(draw):
    """A file, and what is right in it: the row or None, by the number of the line."""
    expected, text = {1: {"messages": chat("q", "a")}}, [line(chat("q", "a"))]
    for kind in draw(st.lists(st.sampled_from(["good", "wrong", "blank"]), max_size=8)):
        row = draw(GOOD) if kind == "good" else None
        good = draw(BOM) + json.dumps(row, ensure_ascii=draw(st.booleans())).encode()
        text.append({"good": good, "wrong": draw(WRONG), "blank": b" \t"}[kind])
        if kind != "blank":
            expected[len(text)] = row
    joined = draw(st.sampled_from([b"\n", b"\r\n"])).join(text)
    return draw(BOM) + joined + draw(st.sampled_from([b"", b"\n"])), expected


# ---- lines


@given(file=jsonl(), most=st.sampled_from([24, 60, 5000]), overlength=st.sampled_from(["truncate", "drop"]))
@FEW
def test_each_line_is_used_as_it_stands_or_found_by_its_number(file, most, overlength):
    content, expected = file
    used, lost = {}, set()
    for row, (number, right) in enumerate(expected.items()):
        rendered = right and RENDERER.render(right["messages"])
        fits = rendered and (len(rendered.input_ids) <= most or overlength == "truncate")
        if fits and any(rendered.supervised[:most]):
            used[row] = rendered.input_ids[:most]
        elif not rendered or overlength == "truncate":
            lost.add(f"rows.jsonl line {number}")
    report, items = read({"rows.jsonl": content}, max_length=most, overlength=overlength)
    assert {row: item["input_ids"].tolist() for row, item in items.items()} == used
    assert (sum(report.unusable.values()), report.dropped) == (len(lost), len(expected) - len(used) - len(lost))
    assert places(report) == lost or (places(report) < lost and max(report.unusable.values()) > 3)
    for row, right in enumerate(expected.values() if most == 5000 else []):
        if right:
            said = [message["content"] for message in right["messages"]]
            assert learned(items[row]) == "".join(f"{text}{END}" for text in said[1::2])
            assert control(items[row]) == [0, 1] * len(said), "where turns start and end, and nothing that is said"
            assert RENDERER.tokenizer.decode(items[row]["input_ids"]).startswith(f"<|im_start|>user\n{said[0]}{END}")


@given(chats=st.lists(CHATS, min_size=2, max_size=4), share=st.floats(0, 1))
@example(chats=[chat("q", "a"), chat("q", "a\U0001f600")], share=0.968)
@FEW
def test_a_file_that_was_cut_off_loses_its_last_line_only(chats, share):
    whole = [line(messages, ensure_ascii=False) for messages in chats]
    cut = max(int(len(b"\n".join(whole)) * share), len(whole[0]))
    left = sum(cut >= len(b"\n".join(whole[:count])) for count in range(1, len(whole) + 1))
    report, items = read({"rows.jsonl": b"\n".join(whole)[:cut]})
    assert [item["input_ids"].tolist() for item in items.values()] == ids(*chats[:left])
    assert len(places(report)) == report.rows - left <= 1
    assert places(report) <= {f"rows.jsonl line {left + 1}"}


@given(content=st.binary() | st.binary().map(gzip.compress), ending=st.sampled_from(["jsonl", "json", "arrow"]))
@FEW
def test_what_is_no_such_file_is_refused_by_name(content, ending):
    refused({f"rows.{ending}": content}, rf"rows\.{ending}")


@given(wrong=SPOILT.map(line) | JUNK.map(json.dumps).map(str.encode))
@FEW
def test_a_list_of_rows_is_read_as_lines_are(wrong):
    good = line(chat("q", "a"))
    report, items = read({"rows.json": b"[" + b", ".join([good, wrong, good]) + b"]"})
    assert (list(items), places(report)) == ([0, 2], {"rows.json row 1"})


# ---- columns

CELLS = TEXTS.map(str.encode) | st.sampled_from([b"\xff\xfe", b"a\xed\xa0\x80", b"\xc3", b"", b" "])
CHAT = pa.array([chat("q", "a")])


@given(cells=st.lists(st.tuples(CELLS, CELLS | st.none()), max_size=6))
@FEW
def test_a_cell_that_is_no_text_costs_its_own_row(cells):
    cells, right = [(b"q", b"a"), *cells], {}
    for row, pair in enumerate(cells):
        said = [(cell or b"").decode(errors="replace") for cell in pair]
        if all(map(str.strip, said)) and said == [cell.decode(errors="ignore") for cell in pair]:
            right[row] = said[1] + END
    far = pa.array([1 << 60] * len(cells), pa.timestamp("ms"))  # a year that Python has not
    texts = (pa.array(side, pa.binary()).buffers() for side in zip(*cells, strict=True))
    texts = [pa.Array.from_buffers(pa.string(), len(cells), buffers) for buffers in texts]  # which checks nothing
    table = pa.table([*texts, far], ["p", "c", "when"])
    report, items = read({"rows.parquet": columns(table)}, Columns(prompt="p", completion="c"))
    assert {row: learned(item) for row, item in items.items()} == right
    assert places(report) <= {f"rows.parquet row {row}" for row in range(len(cells)) if row not in right}


@given(cells=st.lists(CHATS | st.sampled_from([None, [], [{"role": "tool", "content": "a"}]]), max_size=5))
@FEW
def test_a_list_that_is_no_chat_costs_its_own_row(cells):
    cells = [*cells, chat("q", "a")]
    report, items = read({"rows.parquet": columns(pa.table({"messages": cells, "x": [float("nan")] * len(cells)}))})
    right = {row: cell for row, cell in enumerate(cells) if cell and cell[0]["role"] != "tool"}
    assert [item["input_ids"].tolist() for item in items.values()] == ids(*right.values())
    assert list(items) == list(right)
    assert places(report) <= {f"rows.parquet row {row}" for row in range(len(cells)) if row not in right}


def one(*cells, names=("messages",), metadata=None):
    return {"rows.parquet": columns(pa.table([*cells], [*names]).replace_schema_metadata(metadata))}


def two(*cells):
    return {f"{i}.parquet": columns(pa.table({"messages": [cell]})) for i, cell in enumerate(cells)}


FIELDS = pa.StructArray.from_arrays([pa.array(["user"])] * 3, ["role", "content", "content"])
OFFSETS = [None, pa.array([0, 3, 2], pa.int32()).buffers()[1], pa.py_buffer(b"abc")]
WRONG_OFFSETS = pa.table([pa.Array.from_buffers(pa.string(), 2, OFFSETS)], ["messages"])
NO_LISTS = (float("nan"), 7, b"a", ["a"], [["a"]], {"a": 1})
NO_METADATA = (b"[]", b"\xff", b'{"info": {"features": 7}}', b'{"info": {"features": {"messages": 7}}}')
NAMES = ("messages", "__line__", "__place__")
REFUSED = [
    *((one(pa.array([cell])), r"rows\.parquet row 0: got") for cell in NO_LISTS),
    *((one(CHAT, metadata={"huggingface": text}), r"cannot read .*rows\.parquet") for text in NO_METADATA),
    *((one(CHAT, CHAT, names=("messages", name)), f"'{name}.*rename") for name in NAMES),
    (one(CHAT, pa.array([1]), pa.array(["x"]), names=("messages", "x", "x")), "'x' twice.*rename"),
    (one(pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), FIELDS)), "content' twice.*rename"),
    *((two(*cells), r"1\.parquet.*first file has no 'messages'.*schema") for cells in (("a", 5), (5, "5"))),
    (two(chat("q", "a"), [chat("q")[0] | TOOLS]), r"1\.parquet.*first file has no .*tool_calls.*schema"),
    ({"rows.arrow": columns(WRONG_OFFSETS, "arrow")}, r"cannot read .*rows\.arrow"),
    ({"rows.jsonl": json.dumps({"k\n" * 500_000: 1}).encode()}, "no row has the column 'messages'; there are 'k"),
]


@pytest.mark.parametrize(("files", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_cannot_be_read_without_loss_is_refused_by_name(files, why):
    refused(files, why)


# ---- texts


@pytest.mark.parametrize(("overlength", "rows"), [("truncate", [0, 2, 4]), ("drop", [0, 4])])
def test_a_megabyte_costs_seconds_and_leaves_other_rows_as_they_are(overlength, rows):
    long, blank = "add them, " * 100_000, " " * MOST_CHARACTERS + "x"
    begun, cut = time.process_time(), overlength == "truncate"
    chats = [chat("q", "a"), chat(long, "a"), chat("q", long), chat("q", blank), chat("q", "b")]
    report, items = read({"rows.jsonl": b"\n".join(map(line, chats))}, overlength=overlength)
    assert time.process_time() - begun < 15
    assert list(items) == rows
    assert report.unusable == {"a text longer than tokenizers stand": 1} | ({"nothing left to learn": 1} if cut else {})
    assert (report.truncated, report.dropped) == ((1, 0) if cut else (0, 2))
    assert [learned(items[0]), learned(items[4])] == ["a" + END, "b" + END]
    assert not cut or (len(items[2]["input_ids"]) == 5000 and long.startswith(learned(items[2])))


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_2"])
def test_no_control_token_of_a_real_tokenizer_can_be_had_by_spelling_it(name, shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    assert len(special) > 10
    texts = ["x", *special, *(f"a{token * 2} b" for token in special), *map(str.strip, SPELT[:-1]), "</s>"]
    chats = [[{"role": "system", "content": text}, *chat(text, text, text, "y")] for text in texts]
    report, items = read({"rows.jsonl": b"\n".join(map(line, chats))}, renderer=ChatRenderer(tokenizer))
    assert report.used == len(texts)
    for row, text in enumerate(texts):
        assert control(items[row], tokenizer) == control(items[0], tokenizer)
        assert learned(items[row], tokenizer) == f"{text}{tokenizer.eos_token}y{tokenizer.eos_token}"
        assert tokenizer.decode(items[row]["input_ids"]).count(text) >= 4, "what is asked is there too, as text"


@given(file=jsonl())
@settings(FEW, max_examples=15)
def test_the_data_module_trains_on_what_is_right_and_counts_the_rest(file):
    content, expected = file[0] + b"\n{", file[1] | {0: None}
    wrong = sum(row is None for row in expected.values())
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, "rows.jsonl")).write_bytes(content)
        data = ChatDataModule(str(path), max_length=5000, max_unusable_share=1, cache_dir=folder)
        data.tokenizer = RENDERER.tokenizer
        data.prepare_data()
        data.setup("fit")
        report = data.train_rows.report
        assert (report.rows, report.used) == (len(expected), len(expected) - wrong)
        assert sum(len(batch.input_ids) for batch in data.train_dataloader()) == report.used
        data.options.max_unusable_share = 0
        with pytest.raises(UserError, match=r"cannot be used.*rows\.jsonl line \d+.*data\.max_unusable_share"):
            data.setup("fit")
