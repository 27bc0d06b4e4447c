"""From a chat to token ids, and which of them are to be learned: the assistant's text and its stop token, exactly.

The template is rendered once for each sequence of roles, with a mark in place of every text. A row is cut along what
stands between the marks, not at lengths of tokenised prefixes, which go wrong where tokens merge across the seam.
Each piece is tokenised as the model meets it at inference: all that stands before the assistant's text in one go, the
text by itself (the model writes it after the prompt), the stop token by its id.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import TemplateError

from dft_lightning.chats import Chat, Message, UnusableRow, checked, turns
from dft_lightning.errors import UserError
from dft_lightning.template_fit import REWRITES, Parts, fitted
from dft_lightning.thoughts import behind, thoughts_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDERING_VERSION = 2  # to be raised whenever the same row comes out as other ids or another mask: it keys the cache
TEMPLATES = {path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
# For templates that write today's date (Llama-3.2, Granite): data must not change overnight. Llama's own fallback date.
FIXED_DATE = datetime(2024, 7, 26)
CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
REFUSED = "the chat template refuses these roles"
NO_STOP = "no stop token after an assistant turn"
PROBES = ("1 + 1 = 2", "\n leading", "\n\ntwo", "trailing \n", " Ω≈ç, 你好 🙂", "12345 6789", "- {x}\n\n```\ty\n```")


@dataclass(frozen=True)
class Rendered:
    """A conversation in T tokens, up to the last one that is to be learned. Not shifted."""

    input_ids: list[int]  # (T,)
    supervised: list[bool]  # (T,) whether token i is itself a target
    ends: list[int]  # where the stop token of each assistant turn is, in the order of the turns


class _Segment(NamedTuple):  # a stretch that is tokenised by itself
    text: str
    parsed: bool  # whether the text of a special token becomes that token
    follows: bool = False  # begins with the stop token before it, which may swallow white space, but is not counted
    stop: str = ""  # where the assistant speaks: the token that ends the turn


def load_chat_template(name_or_path: str) -> str:
    """The text of a template shipped with the package, or of a `.jinja` file."""
    path = TEMPLATES.get(name_or_path, Path(name_or_path))
    if path.suffix != ".jinja" or not path.is_file():
        raise UserError(f"chat template {name_or_path!r}: expected {', '.join(TEMPLATES)}, or an existing .jinja file")
    return path.read_text(encoding="utf-8")


class ChatRenderer:
    """Renders chats with a tokenizer's chat template, and refuses a template that it cannot mask exactly.

    `system_prompt` goes before rows without a system message. `end_of_response` is what ends the last assistant turn:
    "template", what the chat template writes there, or "eos", the `eos_token` behind the generation prompt and the
    answer just as it is given (the recipe of "On the Generalization of SFT", arXiv:2508.05629). `template_kwargs` are
    variables for the template, for instance `enable_thinking`. `advise`: refusals name options that were found to work.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system_prompt: str | None = None,
        end_of_response: Literal["template", "eos"] = "template",
        template_kwargs: Mapping[str, Any] | None = None,
        advise: bool = True,
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError(f"the tokenizer has no chat template: set one ({', '.join(TEMPLATES)}, or a .jinja file)")
        if end_of_response == "eos" and tokenizer.eos_token is None:
            raise UserError('end_of_response "eos": the tokenizer has no eos_token; set one, or use "template"')
        self.tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._options: dict[str, Any] = {"system_prompt": system_prompt, "end_of_response": end_of_response}
        self._options["template_kwargs"] = template_kwargs
        self._advise, self._proved, self._thoughts = advise, False, ""
        self._advice: dict[str, str] = {}  # by case
        self._eos = str(tokenizer.eos_token) if end_of_response == "eos" else None
        self._template = CLOCK.sub(lambda call: repr(FIXED_DATE.strftime(call[2])), tokenizer.get_chat_template())
        self._template_kwargs = {"date_string": FIXED_DATE.strftime("%d %b %Y"), **(template_kwargs or {})}
        special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        lone, *spelt = self._encode(["a", *special], parsed=False)
        # Left out are special tokens that the tokenizer reads in any text: no text could be told from them.
        self._ids = {token: own for (token, own), ids in zip(special.items(), spelt, strict=True) if own not in ids}
        self._special = re.compile("|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))) or r"(?!)")
        # Those that are looked for in the normalised text have other spellings, as "＜eos＞" for "<eos>".
        normalizes = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None) is not None
        added = tokenizer.added_tokens_decoder.values()
        self._respelt = normalizes and any(token.special and token.normalized for token in added)
        self._scaffolds: dict[tuple[str, ...], tuple[list[str], list[int]]] = {}
        # SentencePiece puts a space before every text. There, a text that goes on after another one is tokenised
        # behind a line break, which is a token of its own, and which is taken away again.
        self._anchor = "" if self._decode(lone + lone) == "aa" else "\n"
        self._lead = ""  # white space between the generation prompt and the answer, which the model has to write
        self._prove()
        self._proved = True

    def render(self, messages: Sequence[Message]) -> Rendered:
        """One conversation. Raises `UnusableRow`."""
        rendered = self.render_batch([messages])[0]
        if isinstance(rendered, UnusableRow):
            raise rendered
        return rendered

    def render_batch(self, conversations: Sequence[Sequence[Message]]) -> list[Rendered | UnusableRow]:
        """Many conversations in two calls of the tokenizer. An unusable row gives its reason in its place."""
        plans: list[list[_Segment] | UnusableRow] = []
        for messages in conversations:
            try:
                plans.append(self._plan(messages))
            except UnusableRow as unusable:
                plans.append(unusable)
        ids = self._tokenize([segment for plan in plans if isinstance(plan, list) for segment in plan])
        return [self._join(plan, ids) if isinstance(plan, list) else plan for plan in plans]

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text up to where the assistant begins to write; an answer that ends `messages` is left out.

        Tokenised with `add_special_tokens=False` it gives the ids of training, except where a message spells out a
        special token: training keeps that as text, which a prompt in text cannot say.
        """
        chat = checked(messages, self._system_prompt)
        asking = chat[:-1] if chat and chat[-1]["role"] == "assistant" else chat
        return "".join(segment.text for segment in self._segments(self._lay_out(asking, "x"))[:-1])

    @property
    def identity(self) -> dict[str, Any]:
        """All that the ids depend on besides the rows, as JSON."""
        # Truncation and padding, which stand before the added tokens, are left there by whoever called it last.
        backend = getattr(self.tokenizer, "backend_tokenizer", None)  # not there where the tokenizer is slow
        content = backend.to_str().partition('"added_tokens"')[2] if backend else self.tokenizer.get_vocab()
        whole = repr([content, self.tokenizer.special_tokens_map, self._template])
        options = {"system_prompt": self._system_prompt, "eos": self._eos, "template_kwargs": self._template_kwargs}
        options |= {"thoughts": self._thoughts} if self._thoughts and self._eos else {}  # other identities stay
        return {"rendering": RENDERING_VERSION, "tokenizer": hashlib.sha256(whole.encode()).hexdigest(), **options}

    def _plan(self, messages: Sequence[Message]) -> list[_Segment]:
        chat = checked(messages, self._system_prompt)
        while chat and chat[-1]["role"] != "assistant":  # nothing to learn there
            chat.pop()
        if not chat:
            raise UnusableRow("no assistant turn")
        if not all(message["content"].strip() for message in chat if message["role"] == "assistant"):
            raise UnusableRow("empty assistant turn")
        try:
            return self._segments(self._lay_out(chat[:-1], chat[-1]["content"]))
        except UnusableRow as unusable:
            if unusable.reason != REWRITES or not self._proved:
                raise
            raise UnusableRow(REWRITES, f"{unusable.detail}; {self._advised(unusable.detail, messages)}") from unusable

    def _lay_out(self, asking: Chat, answer: str) -> Parts:
        if self._eos is None:
            return self._cut([*asking, {"role": "assistant", "content": answer}])
        asked = self._cut(asking)
        return [*asked, ("assistant", behind(asked[-1][1], answer)), ("", self._eos)]

    def _cut(self, chat: Chat) -> Parts:
        literals, order = self._scaffold(tuple(message["role"] for message in chat))
        contents = [(chat[index]["role"], chat[index]["content"]) for index in order]
        return fitted(self._apply(chat, generation=self._eos is not None), literals, contents)

    def _scaffold(self, roles: tuple[str, ...]) -> tuple[list[str], list[int]]:
        """The literals around the contents, and which message each content is; found once a sequence of roles."""
        if roles not in self._scaffolds:
            marked = [{"role": role, "content": f"dftmark{index}z"} for index, role in enumerate(roles)]
            parts = re.split(r"dftmark(\d+)z", self._apply(marked, generation=self._eos is not None))
            order = [int(index) for index in parts[1::2]]
            if sorted(order) != list(range(len(roles))):
                raise UnusableRow("the chat template drops or repeats a message", ", ".join(roles))
            if (answers := [index for index in order if roles[index] == "assistant"]) != sorted(answers):
                raise UnusableRow("the chat template changes the order of the answers", ", ".join(roles))
            self._scaffolds[roles] = parts[::2], order
        return self._scaffolds[roles]

    def _apply(self, chat: Chat, *, generation: bool) -> str:
        options: dict[str, Any] = {"chat_template": self._template, "tokenize": False, **self._template_kwargs}
        try:
            return str(self.tokenizer.apply_chat_template(chat, add_generation_prompt=generation, **options))
        except (TemplateError, ValueError) as error:
            raise UnusableRow(REFUSED, str(error)) from error

    def _segments(self, parts: Parts) -> list[_Segment]:
        segments: list[_Segment] = []
        context: list[tuple[str, bool]] = []
        for (role, text), (_, following) in pairwise(parts):
            if role != "assistant":
                context.append((text, not role or not self._spells_special(text)))
                continue
            if not (stop := self._special.match(following)):
                raise UnusableRow(NO_STOP, f"no special token begins {following[:20]!r}")
            lead = self._lead if context[-1][0].endswith(self._lead) else ""
            context[-1] = (context[-1][0].removesuffix(lead), True)
            for parsed, group in groupby(context, key=lambda piece: piece[1]):
                follows = bool(segments and segments[-1].stop)
                segments.append(_Segment("".join(piece for piece, _ in group), parsed, follows))
            segments.append(_Segment(lead + text, False, stop=stop[0]))
            context = []
        return segments

    def _spells_special(self, text: str) -> bool:
        if self._respelt and not set(self._ids.values()).isdisjoint(self._encode([text], parsed=True)[0]):
            return True
        return self._special.search(text) is not None

    def _tokenize(self, segments: Sequence[_Segment]) -> Iterator[list[int]]:
        """The ids of every segment without its stop token, in two calls."""
        ids: list[list[int]] = [[]] * len(segments)
        for parsed in (False, True):  # in this order: it leaves the backend parsing, as others expect it
            anchor = "" if parsed else self._anchor
            which = [index for index, segment in enumerate(segments) if segment.parsed is parsed]
            encoded = self._encode([anchor, *(anchor + segments[index].text for index in which)], parsed)
            for index, tokens in zip(which, encoded[1:], strict=True):
                if tokens[: len(encoded[0])] != encoded[0]:  # our probes would have found it: a merge with a line break
                    raise UnusableRow("the tokenizer cannot tell a text from what stands before it")
                ids[index] = tokens[len(encoded[0]) + segments[index].follows :]
        return iter(ids)

    def _join(self, segments: Sequence[_Segment], ids: Iterator[list[int]]) -> Rendered:
        rendered = Rendered([], [], [])
        for segment in segments:
            tokens = next(ids) + ([self._ids[segment.stop]] if segment.stop else [])
            rendered.input_ids.extend(tokens)
            rendered.supervised.extend([bool(segment.stop)] * len(tokens))
            rendered.ends.extend([len(rendered.input_ids) - 1] if segment.stop else [])
        return rendered

    def _encode(self, texts: list[str], parsed: bool) -> list[list[int]]:
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        options |= {"add_special_tokens": False, "split_special_tokens": not parsed}
        return list(self.tokenizer(texts, **options)["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _prove(self) -> None:
        """Refuses a template or a tokenizer unless every cut is where it is taken to be, hard seams included."""
        try:
            self._prove_probes()
            asked = self._apply(checked(turns("x")[:1], self._system_prompt), generation=True)
            self._thoughts = thoughts_in(asked)
            before = self.prompt(turns("x"))
            if not before.startswith(asked):
                raise UnusableRow("its generation prompt is not what it writes before an answer", repr(asked[-40:]))
            self._lead = "" if before.removeprefix(asked).strip() else before.removeprefix(asked)
            self._prove_probes()
        except UnusableRow as unusable:
            advice = self._advised("", turns("x"))
            raise UserError(f"the chat template cannot be masked exactly: {unusable}; {advice}") from unusable

    def _advised(self, case: str, messages: Sequence[Message]) -> str:
        """What helps in such a case: tried with the first one."""
        from dft_lightning.data.alternatives import alternatives

        if self._advise and case not in self._advice:
            templates = {name: load_chat_template(name) for name in TEMPLATES}
            self._advice[case] = alternatives(type(self), self.tokenizer, self._options, templates, messages)
        return self._advice.get(case, "choose another template")

    def _prove_probes(self) -> None:
        for texts in [(text,) for text in PROBES] + [(text, text) for text in PROBES]:
            try:
                self._prove_cuts(self._plan(turns(*texts)))
            except UnusableRow as unusable:  # from a template for single turns: longer rows are refused one by one
                if len(texts) == 1 or unusable.reason not in (REFUSED, NO_STOP if self._eos else REFUSED):
                    raise

    def _prove_cuts(self, segments: list[_Segment]) -> None:
        stop: list[int] = []
        for (before, text), (left, right) in zip(pairwise(segments), pairwise(self._tokenize(segments)), strict=True):
            if text.stop:
                whole = self._encode([before.text + text.text], parsed=True)[0]
                if self._decode(stop + left + right) != self._decode(whole):
                    raise UnusableRow("its pieces do not add up to the whole in tokens", repr(text.text))
                stop = [self._ids[text.stop]]
