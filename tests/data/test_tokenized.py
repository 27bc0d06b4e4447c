"""Rows in tokens: what is stored, what is refused, when the cache is used, and that nothing on disk can mislead."""

import json
import logging
import multiprocessing
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from dft_lightning.chats import UnusableRow
from dft_lightning.data.rendering import ChatRenderer, Rendered
from dft_lightning.data.sources import Columns, load_rows
from dft_lightning.data.store import TokenizedRows
from dft_lightning.data.tokenized import tokenize
from dft_lightning.errors import UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real rows and tokenizers are not there: {SHARED}")
PAIR = Columns(prompt="p", completion="c")


class Bytes:
    """A token a byte, and a stop token. "!" in a prompt is refused; the key of a cache is `name`."""

    def __init__(self, name: str = "bytes", barrier: Any = None) -> None:
        self.name, self.barrier = name, barrier

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": self.name}

    def render_batch(self, conversations: Sequence[Sequence[dict[str, str]]]) -> list[Rendered | UnusableRow]:
        if self.barrier is not None:
            self.barrier.wait(timeout=60)
        return [self._render(*(message["content"] for message in chat)) for chat in conversations]

    def _render(self, prompt: str, answer: str) -> Rendered | UnusableRow:
        if "!" in prompt:
            return UnusableRow("the prompt is refused", f"it is {prompt}")
        ids = [*prompt.encode(errors="replace"), *answer.encode(errors="replace"), 300_000]
        first = 0 if "^" in prompt else len(prompt.encode(errors="replace"))
        return Rendered(ids, [first <= index for index in range(len(ids))], [len(ids) - 1])


class Untouchable(Bytes):
    def render_batch(self, conversations: Sequence[Any]) -> list[Rendered | UnusableRow]:
        raise AssertionError("the cache was not used")


def source(*pairs: tuple[Any, Any], name: str = "lines") -> datasets.Dataset:
    return datasets.Dataset.from_list([{"p": p, "c": c, "source": name} for p, c in pairs])


def run(
    rows: datasets.Dataset, cache: Path, renderer: Any = None, columns: Columns = PAIR, **options: Any
) -> TokenizedRows:
    options = {"max_length": 100, "overlength": "truncate", "workers": 0} | options
    return tokenize(rows, renderer or Bytes(), columns, cache_dir=cache, **options)


def unpacked(tokens: TokenizedRows) -> list[tuple[int, list[int], list[bool], str]]:
    items = [tokens[index] for index in range(len(tokens))]
    return [(item["row"], item["input_ids"].tolist(), item["supervised"].tolist(), item["source"]) for item in items]


def everything(tokens: TokenizedRows) -> str:
    return tokens.content_hash(np.arange(len(tokens)))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


class TestRows:
    def test_tokens_masks_order_and_repeats(self, cache: Path) -> None:
        tokens = run(source(("b", "cd"), ("a!", "x"), ("b", "cd"), ("", "")), cache, max_unusable_share=1)
        expected = ([98, 99, 100, 300_000], [False, True, True, True])
        assert unpacked(tokens) == [(0, *expected, "lines"), (2, *expected, "lines")]
        item = tokens[-1]
        assert (item["input_ids"].dtype, item["supervised"].dtype) == (np.int64, np.bool_)
        assert item["input_ids"].flags.writeable, "torch warns about others"
        assert item["supervised"].flags.writeable
        with pytest.raises(IndexError):
            tokens[2]

    def test_lengths_and_targets_over_many_batches(self, cache: Path) -> None:
        rows = source(*(("q" * (i % 7 + 1), "a" * (i * 13 % 29 + 1)) for i in range(2345)))
        tokens = run(rows, cache, max_length=20)
        assert (tokens.lengths.dtype, tokens.targets.dtype) == (np.int32, np.int32)
        assert len(tokens) == 2345
        for index in (0, 1, 999, 1000, 1001, 2344):
            item = tokens[index]
            assert len(item["input_ids"]) == len(item["supervised"]) == tokens.lengths[index]
            assert item["supervised"][1:].sum() == tokens.targets[index]
            assert item["row"] == index
        assert tokens.lengths.tolist() == [min(i % 7 + i * 13 % 29 + 3, 20) for i in range(2345)]
        assert tokens.targets.tolist() == [min(i * 13 % 29 + 2, 19 - i % 7) for i in range(2345)]

    def test_a_first_token_is_no_target_of_the_loss(self, cache: Path) -> None:
        tokens = run(source(("^", "ab")), cache)
        assert (tokens[0]["supervised"].tolist(), tokens.targets.tolist()) == ([True] * 4, [3])

    @pytest.mark.parametrize("given", [None, 7, "caf\u00e9"])
    def test_source_is_text_or_empty(self, given: Any, cache: Path) -> None:
        tokens = run(datasets.Dataset.from_list([{"p": "q", "c": "a", "source": given}]), cache)
        assert tokens[0]["source"] == (given if isinstance(given, str) else "")
        assert run(source(("q", "a")).remove_columns("source"), cache)[0]["source"] == ""

    def test_worker_processes_change_nothing(self, cache: Path, tmp_path: Path) -> None:
        rows = source(*((f"{i}" + "!" * (i % 50 == 0), f"{i * i}") for i in range(4321)))
        alone, shared = run(rows, cache), run(rows, tmp_path / "other", workers=2)
        assert unpacked(shared) == unpacked(alone)
        assert (shared.report, everything(shared)) == (alone.report, everything(alone))
        assert alone.report.unusable == {"the prompt is refused": 87}

    def test_a_batch_is_rendered_in_pieces_that_fit_in_memory(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes: list[int] = []

        class Counting(Bytes):
            def render_batch(self, conversations: Sequence[Any]) -> list[Rendered | UnusableRow]:
                sizes.append(len(conversations))
                return super().render_batch(conversations)

        rows = source(("q", "a"), ("q", "a" * 30), ("q", None), ("q", "ab"), ("q!", "a"))
        whole = run(rows, cache, Counting(), max_unusable_share=0.5)
        monkeypatch.setattr("dft_lightning.data.tokenized._BATCH_CHARACTERS", 10)
        pieces = run(rows, tmp_path / "other", Counting(), max_unusable_share=0.5)
        assert sizes == [4, 2, 2]
        assert (unpacked(pieces), pieces.report) == (unpacked(whole), whole.report)

    def test_it_is_sent_to_other_processes_by_name(self, cache: Path) -> None:
        tokens = run(source(*(("q", "a" * 90) for _ in range(3000))), cache).select(range(5, 15))
        sent = pickle.dumps(tokens)
        assert len(sent) < 5000
        assert unpacked(pickle.loads(sent)) == unpacked(tokens)


class TestLength:
    rows = (("qqqq", "aaaa"), ("q", "a"), ("q" * 8, "a"))  # 9, 3 and 10 tokens

    def test_truncate(self, cache: Path) -> None:
        tokens = run(source(*self.rows), cache, max_length=6, max_unusable_share=0.5)
        assert [row[1] for row in unpacked(tokens)] == [[*b"qqqqaa"], [*b"qa", 300_000]]
        assert (tokens.report.truncated, tokens.report.dropped) == (1, 0)
        assert tokens.report.unusable == {"nothing left to learn": 1}
        assert tokens.report.examples == {"nothing left to learn": ["row 2: 10 tokens, data.max_length 6"]}

    def test_drop_is_no_fault_of_the_rows(self, cache: Path) -> None:
        tokens = run(source(*self.rows), cache, max_length=9, overlength="drop", max_unusable_share=0)
        assert tokens.lengths.tolist() == [9, 3]
        assert (tokens.report.truncated, tokens.report.dropped, tokens.report.unusable) == (0, 1, {})
        assert "1 dropped" in str(tokens.report)

    def test_nothing_left_at_all(self, cache: Path) -> None:
        with pytest.raises(UserError, match=r"no row.*3 dropped.*data\.max_length"):
            run(source(*self.rows), cache, max_length=2, overlength="drop")

    @pytest.mark.parametrize(
        "option", [{"max_length": 1}, {"overlength": "split"}, {"max_unusable_share": 1.1}, {"max_unusable_share": -1}]
    )
    def test_options_out_of_range(self, option: dict[str, Any], cache: Path) -> None:
        with pytest.raises(UserError, match=rf"data\.{next(iter(option))}"):
            run(source(*self.rows), cache, **option)


class TestUnusable:
    def lines(self, tmp_path: Path, *lines: str) -> datasets.Dataset:
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        return load_rows(dataset=None, path=str(tmp_path / "rows.jsonl"), cache_dir=tmp_path)

    def test_each_is_counted_by_reason_and_found_by_line(self, tmp_path: Path, cache: Path) -> None:
        good = '{"p": "q", "c": "a", "source": "s"}'
        bad = ['{"p": "q!", "c": "a"}', '{"p": "q", "c"', "", '{"p": null, "c": "a"}', '{"p": ["x", 1], "c": "a"}']
        rows = self.lines(tmp_path, good, *bad, good, *['{"p": "q!", "c": "\\ud800", "source": "\\ud800"}'] * 5)
        tokens = run(rows, cache, max_unusable_share=0.9)
        report = tokens.report
        assert (report.rows, report.used) == (11, 2)
        assert report.unusable == {
            "the prompt is refused": 6,
            "not valid JSON": 1,
            "a column is missing or null": 1,
            "not a list of messages": 1,
        }
        places = [f"rows.jsonl line {line}: it is q!" for line in (2, 8, 9)]
        assert report.examples["the prompt is refused"] == places, "three are enough"
        assert report.examples["a column is missing or null"] == ["rows.jsonl line 5: p"]
        assert report.examples["not valid JSON"][0].startswith("rows.jsonl line 3: JSONDecodeError")
        assert [row[0] for row in unpacked(tokens)] == [0, 5]

    def test_too_many_are_refused_also_from_the_cache(self, cache: Path) -> None:
        rows = source(*(("q!" if i < 3 else "q", "a") for i in range(10)))
        for renderer in (Bytes(), Untouchable()):
            with pytest.raises(UserError, match=r"30\.0%.*3 unusable.*refused.*row 0.*max_unusable_share") as caught:
                run(rows, cache, renderer, max_unusable_share=0.29)
            assert "\n" not in str(caught.value)
            assert len(run(rows, cache, renderer, max_unusable_share=0.3)) == 7

    def test_none_usable_is_refused_whatever_the_share(self, cache: Path) -> None:
        with pytest.raises(UserError, match="no row"):
            run(source(("q!", "a")), cache, max_unusable_share=1)

    def test_no_rows(self, cache: Path) -> None:
        with pytest.raises(UserError, match="no rows"):
            run(source(("q", "a")).select([]), cache)

    def test_a_column_that_no_row_has(self, tmp_path: Path, cache: Path) -> None:
        for rows in (source(("q", "a")), self.lines(tmp_path, '{"p": "q", "c": "a"}', "cut", '{"source": 1}')):
            with pytest.raises(UserError, match=r"'messages'; there are 'c', 'p', 'source'\..*data\.prompt"):
                run(rows, cache, Untouchable(), Columns())
            with pytest.raises(UserError, match="'answer'; there"):
                run(rows, cache, Untouchable(), Columns(prompt="p", completion="answer"))

    def test_a_column_that_only_a_later_line_has(self, tmp_path: Path, cache: Path) -> None:
        rows = self.lines(tmp_path, '{"p": "q"}', "cut", '{"p": "q", "c": "a"}')
        assert [row[0] for row in unpacked(run(rows, cache, max_unusable_share=0.7))] == [2]

    def test_lines_none_of_which_can_be_read(self, tmp_path: Path, cache: Path) -> None:
        with pytest.raises(UserError, match=r"2 unusable: not valid JSON \(rows\.jsonl line 1"):
            run(self.lines(tmp_path, "cut", "off"), cache)


class TestSelection:
    @pytest.fixture
    def tokens(self, cache: Path) -> TokenizedRows:
        return run(source(("x!", "y"), *((f"{i}", "a" * i) for i in range(1, 40))), cache)

    def test_any_order_any_number_of_times(self, tokens: TokenizedRows) -> None:
        picked = tokens.select([5, 0, 5]).select(np.array([2, 1]))
        assert [row[0] for row in unpacked(picked)] == [6, 1]
        assert picked.lengths.tolist() == [tokens.lengths[5], tokens.lengths[0]]
        assert picked.targets.tolist() == [tokens.targets[5], tokens.targets[0]]
        assert picked.report is tokens.report
        assert len(tokens.select([])) == len(tokens.select(range(0))) == 0

    def test_fingerprints_tell_selections_apart(self, tokens: TokenizedRows) -> None:
        prints = {tokens.fingerprint, *(tokens.select(rows).fingerprint for rows in ([0], [1], [0, 1], [1, 0]))}
        assert len(prints) == 5
        assert tokens.select([1, 0]).fingerprint == tokens.select(np.array([1, 0], dtype=np.int32)).fingerprint

    def test_the_hash_is_of_tokens_and_masks_in_order(self, tokens: TokenizedRows, cache: Path) -> None:
        assert tokens.content_hash([3, 1]) == tokens.select([9, 3, 1]).content_hash([1, 2])
        assert len({tokens.content_hash(rows) for rows in ([], [1], [1, 3], [3, 1], [1, 3, 3])}) == 5
        pairs = [("ab", "c"), ("a", "bc"), ("abc", "")]
        shifted = run(source(*(((p, c)) for p, c in pairs), ("a", "b"), ("q", "abc")), cache, max_unusable_share=1)
        assert len({shifted.content_hash([row]) for row in range(len(shifted))}) == len(shifted), "masks count"

    def test_the_hash_sees_where_a_row_ends(self, cache: Path) -> None:
        class Joined(Bytes):
            def _render(self, prompt: str, answer: str) -> Rendered:
                return Rendered([*answer.encode()], [True] * len(answer), [len(answer) - 1])

        tokens = run(
            source(("", "x"), ("q", "abc"), ("q", "de"), ("q", "ab"), ("q", "cde")),
            cache,
            Joined(),
            max_unusable_share=1,
        )
        assert tokens.content_hash([0, 1]) != tokens.content_hash([2, 3])


class TestCache:
    def test_it_is_used_and_reports_the_same(self, cache: Path) -> None:
        rows = source(*(("q!" if i % 20 == 0 else "q", "a" * i) for i in range(200)))
        first, again = run(rows, cache), run(rows, cache, Untouchable())
        assert (again.report, again.fingerprint) == (first.report, first.fingerprint)
        assert first.report.truncated > 0
        assert unpacked(again) == unpacked(first)
        assert not list(cache.glob(".*")), "no drafts are left"

    @pytest.mark.parametrize(
        "change",
        [
            {"rows": source(("q", "b"))},
            {"rows": source(("q", "a"), ("q", "a"))},
            {"renderer": Bytes("other")},
            {"columns": Columns(prompt="c", completion="p")},
            {"message_weights": False},
            {"max_length": 99},
            {"overlength": "drop"},
        ],
    )
    def test_whatever_changes_the_tokens_changes_the_key(self, change: dict[str, Any], cache: Path) -> None:
        given = {"rows": source(("q", "a")), "cache": cache}
        assert run(**given | change).fingerprint != run(**given).fingerprint
        assert len(list(cache.iterdir())) == 2

    def test_so_does_a_new_version_of_this_code(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = run(source(("q", "a")), cache).fingerprint
        monkeypatch.setattr("dft_lightning.data.tokenized.TOKENIZED_VERSION", 0)
        assert run(source(("q", "a")), cache).fingerprint != before

    def test_a_file_with_new_content_is_read_anew(self, tmp_path: Path, cache: Path) -> None:
        path = tmp_path / "rows.jsonl"
        for answer in ("old", "new"):
            path.write_text(json.dumps({"p": "q", "c": answer}))
            tokens = run(load_rows(dataset=None, path=str(path), cache_dir=cache), cache)
            assert bytes(tokens[0]["input_ids"][1:-1].tolist()).decode() == answer

    @pytest.mark.parametrize("damage", ["cut", "grown", "missing", "no report", "bad report", "other report", "empty"])
    def test_damage_is_found_and_mended(self, damage: str, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
        rows = source(*((f"{i}", "abc") for i in range(1500)))
        before = everything(run(rows, cache))
        (arrow,), (report,) = cache.glob("*/*.arrow"), cache.glob("*/report.json")
        match damage:
            case "cut":
                arrow.write_bytes(arrow.read_bytes()[:-5000])
            case "grown":
                arrow.write_bytes(arrow.read_bytes() * 2)
            case "missing":
                arrow.unlink()
            case "no report":
                report.unlink()
            case "bad report":
                report.write_text(report.read_text()[:-9])
            case "other report":
                report.write_text('{"files": {}, "report": {}}')
            case "empty":
                shutil.rmtree(arrow.parent)
                arrow.parent.mkdir()
        with caplog.at_level(logging.WARNING):
            assert everything(run(rows, cache)) == before
        assert "damaged" in caplog.text
        assert everything(run(rows, cache, Untouchable())) == before
        assert not list(cache.glob(".*"))

    def test_a_failure_leaves_nothing_behind(self, cache: Path) -> None:
        with pytest.raises(AssertionError, match="the cache was not used"):
            run(source(("q", "a")), cache, Untouchable())
        assert list(cache.iterdir()) == []

    @pytest.mark.parametrize("damaged", [False, True])
    def test_two_processes_that_race_both_end_well(self, damaged: bool, cache: Path) -> None:
        rows = source(*((f"{i}", "abc") for i in range(900)))
        if damaged:
            run(rows, cache)
            next(cache.glob("*/report.json")).write_text("{")
        fork = multiprocessing.get_context("fork")
        barrier, results = fork.Barrier(2), fork.Queue()

        def race() -> None:
            results.put(everything(run(rows, cache, Bytes(barrier=barrier))))

        racers = [fork.Process(target=race) for _ in range(2)]
        for racer in racers:
            racer.start()
        hashes = {results.get(timeout=60) for _ in racers}
        for racer in racers:
            racer.join()
        assert hashes == {everything(run(rows, cache, Untouchable()))}
        assert len(list(cache.iterdir())) == 1


@pytest.fixture(scope="module")
def qwen() -> ChatRenderer:
    from transformers import AutoTokenizer

    return ChatRenderer(AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen2_5"))


@real
class TestRealRows:
    def load(self, cache: Path, split: str = "train[:300]") -> datasets.Dataset:
        folder = SHARED / "data" / "numina_schema"
        return load_rows(dataset=None, path=str(folder), split=split, cache_dir=cache)

    def test_rows_are_what_the_renderer_makes_of_each(self, qwen: ChatRenderer, cache: Path) -> None:
        rows = self.load(cache)
        tokens = run(rows, cache, qwen, Columns(), max_length=4096)
        assert len(tokens) == 300
        for index in range(0, 300, 17):
            expected = qwen.render(rows[index]["messages"])
            assert unpacked(tokens.select([index])) == [
                (index, expected.input_ids, expected.supervised, rows[index]["source"])
            ]

    def test_every_road_to_the_same_rows_gives_the_same_tokens(
        self, qwen: ChatRenderer, cache: Path, tmp_path: Path
    ) -> None:
        rows = self.load(cache)
        lines = [
            {"conversations": [{"from": "human", "value": row["problem"]}, {"from": "gpt", "value": row["solution"]}]}
            for row in rows
        ]
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
        sharegpt = load_rows(dataset=None, path=str(tmp_path / "rows.jsonl"), cache_dir=cache)
        roads = [
            run(rows, cache, qwen, Columns(), max_length=512),
            run(rows, cache, qwen, Columns(prompt="problem", completion="solution"), max_length=512),
            run(sharegpt, cache, qwen, Columns("conversations"), max_length=512),
            run(rows, tmp_path / "other", qwen, Columns(), max_length=512, workers=2),
        ]
        assert len({everything(road) for road in roads}) == 1
        assert roads[0].report.truncated > 0
