"""What kind of token an id of the vocabulary is: a function word, a digit, an operator, a LaTeX command, …

A class follows from a token's own text alone, whatever stands before it. So a name that only LaTeX has ("frac",
"sqrt") counts as a command also where the tokenizer has cut off its backslash, and one that is an English word ("text",
"left") counts as a word there; a backslash, with or without a name behind it, always is of LaTeX. A part of a
longer word ("the" of "theory") counts as what it would be alone, and so does a lone letter: a word, save "a" and "I".
"""

import re
import unicodedata
from functools import cache
from typing import Any

import torch
from torch import Tensor

#: The classes, by the number that `class_of` gives them.
CLASSES = (
    "function word",
    "other word",
    "digit",
    "operator",
    "LaTeX command",
    "punctuation",
    "white space",
    "stop",
    "other",
)

#: The words that hold a sentence, or a proof, together; and what a contraction leaves of one.
_FUNCTION = """
    a an the this that these those some any each every all both either neither no not none such same other another
    i you he she it we they me him her us them my your his its our their who whom whose which what there here
    and or but nor so yet if then else than as because since while when where whether although though unless until
    of in on at by for from with without to into onto over under between among through during before after above below
    about against along upon within per via up down out off
    is are was were be been being am do does did done have has had having can could will would shall should may might
    must let thus hence therefore also only just very too more most less how why now again however otherwise
    's 't 're 've 'm 'll 'd ’s ’t ’re ’ve ’m ’ll ’d"""
_FUNCTION_WORDS = frozenset(_FUNCTION.split())
#: Names of LaTeX commands and environments that are no English words.
_LATEX = """
    frac dfrac tfrac sqrt cdot cdots ldots dots mathbb mathbf mathrm mathcal mathit boldsymbol boxed fbox leq geq neq
    leqslant geqslant rightarrow leftarrow Rightarrow Leftarrow iff infty cong equiv approx sim pmod bmod binom
    dbinom tbinom overline underline widehat overrightarrow qquad textbf textit mbox bigl bigr Bigl Bigr lfloor rfloor
    lceil rceil langle rangle subseteq subset supset setminus notin emptyset varnothing forall pmatrix bmatrix vmatrix
    tikz tikzpicture alignat aligned asy oplus otimes circ nabla prod triangleq mapsto quad vdots ddots hline"""
_LATEX_NAMES = frozenset(_LATEX.split())
_OPERATORS = frozenset("+-*/=<>^_|~·×÷±°√∑∏∫∂∞→⇒")
_DIGITS = re.compile(r"\d(?:[\d.,]*\d)?")
_CONTRACTION = re.compile(r"['’][^\W\d_]+")


def class_of_text(text: str) -> str:
    """The class of a token that is no special one, by its text; white space around it does not count.

    A token of several signs is an operator if one of them is: "^{", ")=". Letters together with signs or digits ("x2",
    "(x"), emojis and parts of a character are "other".
    """
    bare = text.strip()
    if not bare:
        return "white space" if text else "other"
    if "\\" in bare or text in _LATEX_NAMES:
        return "LaTeX command"
    if _DIGITS.fullmatch(bare):
        return "digit"
    if bare.lower() in _FUNCTION_WORDS:
        return "function word"
    if _is_word(bare) or _CONTRACTION.fullmatch(bare):
        return "other word"
    signs = "".join(bare.split())
    kinds = {unicodedata.category(sign) for sign in signs}
    if any(kind[0] not in "PS" for kind in kinds):
        return "other"
    if "Sm" in kinds or _OPERATORS & set(signs):
        return "operator"
    return "other" if "So" in kinds else "punctuation"


def class_of(tokenizer: Any, size: int | None = None) -> Tensor:
    """The number in `CLASSES` of each id of the vocabulary, (V,) uint8.

    Args:
        tokenizer: of transformers; byte-level BPE or SentencePiece.
        size: V, where the model's head has more rows than the tokenizer has tokens: those are "other".
    """
    number = {name: index for index, name in enumerate(CLASSES)}
    texts = token_texts(tokenizer)
    size = len(texts) if size is None else size
    classes = [number[class_of_text(text)] for text in texts[:size]]
    classes += [number["other"]] * (size - len(classes))
    for special in _special_ids(tokenizer):
        if special < size:
            classes[special] = number["stop"]
    return torch.tensor(classes, dtype=torch.uint8)


def token_texts(tokenizer: Any) -> list[str]:
    """The text of each id, the space before a word included; "" for an id that has none.

    Not by `decode` of each id: a SentencePiece tokenizer takes the space at the start of a text away.
    """
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    size = max([len(tokenizer), *(index + 1 for index in added)])
    pieces = [piece or "" for piece in tokenizer.convert_ids_to_tokens(list(range(size)))]
    read = _of_bytes if _is_byte_level(pieces) else _of_sentencepiece
    return [added[index] if index in added else read(piece) for index, piece in enumerate(pieces)]


def _special_ids(tokenizer: Any) -> set[int]:
    """Tokens that stand for no text: ends and starts of turns, padding, and what else is declared as special."""
    declared = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return declared | set(tokenizer.all_special_ids)


def _is_word(text: str) -> bool:
    """Letters, and the marks that some scripts put between them."""
    return text.isalpha() or (
        text[0].isalpha() and all(sign.isalpha() or unicodedata.category(sign)[0] == "M" for sign in text)
    )


def _is_byte_level(pieces: list[str]) -> bool:
    """Byte-level BPE writes a space as "Ġ", SentencePiece as "▁"."""
    return sum(piece.startswith("Ġ") for piece in pieces) > sum(piece.startswith("▁") for piece in pieces)


def _of_bytes(piece: str) -> str:
    """The text of a byte-level piece; a part of a character becomes "\\ufffd"."""
    table = _byte_of_sign()
    try:
        return bytes(table[sign] for sign in piece).decode(errors="replace")
    except KeyError:  # a piece that was added as it is
        return piece


def _of_sentencepiece(piece: str) -> str:
    """The text of a SentencePiece piece; a single byte is written <0x0A> there."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)]).decode(errors="replace")
    return piece.replace("▁", " ")


@cache
def _byte_of_sign() -> dict[str, int]:
    """The byte behind each sign of byte-level BPE: printable ones of Latin-1 are themselves, others come after 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
