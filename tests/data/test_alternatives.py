"""Refusals of a chat template: their advice is followed, and works; no thought is opened twice."""

import re

import pytest
from test_rendering import CHATML, chat, context, learned, tiny

from dft_lightning.chats import UnusableRow
from dft_lightning.data.rendering import ChatRenderer, load_chat_template
from dft_lightning.errors import UserError

THOUGHTS = "<think>\nc\n</think>\n\nb"
PROMPT = "'<|im_start|>assistant\\n'"
# As DeepSeek-R1's: the generation prompt opens the thoughts, and those of an answer are dropped.
DROPS = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
OPENS = DROPS.replace(PROMPT, "'<|im_start|>assistant\\n<think>\\n'")
# As Qwen3's for thinking: the last answer always has a block of thoughts, and earlier ones none.
BLOCK = """
{%- for m in messages %}
    {%- set parts = m.content.split('</think>') %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.last %}
        {{- '<think>\\n' + (parts[0].split('<think>')[-1].strip() if parts|length > 1 else '') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- parts[-1].lstrip('\\n') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{% endif %}
"""


def followed(error, template):
    """A renderer for each option that the message advises."""
    found = re.findall(r"--data\.end_of_response (\w+)|--model\.chat_template (\w+)", str(error))
    assert found, error
    for end, name in found:
        chosen = load_chat_template(name) if name else template
        yield end, ChatRenderer(tokenizer := tiny(chosen), end_of_response=end or "template"), tokenizer


@pytest.mark.parametrize(
    ("template", "row", "eos"),
    [
        (DROPS, chat("a", THOUGHTS), True),
        (DROPS, chat("a", THOUGHTS, "a", THOUGHTS), False),
        (DROPS, chat("a", THOUGHTS, "a", "b"), False),
        (BLOCK, chat("a", THOUGHTS), True),
        (BLOCK, chat("a", "b", "a", THOUGHTS), True),
        (BLOCK, chat("a", THOUGHTS, "a", "b"), False),
        (CHATML.replace("message['content']", "message['content'] | replace('u', 'v')"), chat("u", "b"), False),
    ],
)
def test_advice_for_a_rewritten_message_works_when_followed(template, row, eos):
    tokenizer = tiny(template)
    with pytest.raises(UnusableRow, match="rewrites a message") as error:
        ChatRenderer(tokenizer).render(row)
    assert tokenizer.chat_template == template
    advised = list(followed(error.value, template))
    assert bool(eos) == any(end == "eos" for end, _, _ in advised)
    for _, renderer, own in advised:
        text = own.decode(renderer.render(row).input_ids)
        assert text.count("<think>") == sum("<think>" in message["content"] for message in row)


@pytest.mark.parametrize(
    ("row", "place"),
    [
        (chat("a", THOUGHTS), "the last one, of the assistant"),
        (chat("a", THOUGHTS, "a", "b"), "an earlier one, of the assistant"),
        (chat("<think></think>a", "b"), "an earlier one, of the user"),
    ],
)
@pytest.mark.parametrize("template", [DROPS, BLOCK], ids=["drops", "block"])
def test_the_rewritten_message_is_named(row, place, template):
    with pytest.raises(UnusableRow) as error:
        ChatRenderer(tiny(template)).render(row)
    assert place in error.value.detail


def test_advice_for_a_prompt_that_opens_thoughts_works_when_followed():
    with pytest.raises(UserError, match="generation prompt is not what it writes") as error:
        ChatRenderer(tiny(OPENS))
    advised = list(followed(error.value, OPENS))
    assert next(end for end, _, _ in advised) == "eos"
    for _, renderer, tokenizer in advised:
        rendered = renderer.render(chat("a", THOUGHTS))
        assert tokenizer.decode(rendered.input_ids).count("<think>") == 1
        assert learned(tokenizer, rendered)[0].rstrip("<eos>|im_nd").endswith("c\n</think>\n\nb")


@pytest.mark.parametrize(
    ("opened", "answer", "kept"),
    [
        ("<think>\\n", THOUGHTS, "c\n</think>\n\nb"),
        ("<think>\\n", "\n<think>c</think>b", "c</think>b"),
        ("<think>\\n", "<think>\n\nc</think>b", "\nc</think>b"),
        ("<think>", "<think>\nc</think>b", "\nc</think>b"),
        ("<think>\\n", "c\n</think>\n\nb", "c\n</think>\n\nb"),
        ("<think>\\n", "b", "b"),
        ("<think>\\n", "<think> is a tag", "<think> is a tag"),
        ("<reason>\\n", "<reason>c</reason>b", "c</reason>b"),
        ("<reason>\\n", THOUGHTS, THOUGHTS),
        ("", THOUGHTS, THOUGHTS),
    ],
)
def test_an_answer_begins_behind_what_the_prompt_opens(opened, answer, kept):
    tokenizer = tiny(CHATML.replace(PROMPT, f"'<|im_start|>assistant\\n{opened}'"))
    rendered = ChatRenderer(tokenizer, end_of_response="eos").render(chat("a", answer))
    assert learned(tokenizer, rendered) == [kept + "<eos>"]
    before = tokenizer.decode(context(rendered))
    assert before.endswith(f"assistant\n{opened}".replace("\\n", "\n"))


def test_thoughts_behind_a_prompt_that_says_there_are_none_are_unusable():
    none = "<think>\\n\\n</think>\\n\\n"
    template = CHATML.replace(PROMPT, f"'<|im_start|>assistant\\n' + ('{none}' if thinking is false else '')")
    renderer = ChatRenderer(tiny(template), end_of_response="eos", template_kwargs={"thinking": False})
    with pytest.raises(UnusableRow, match=r"says that there are none.*template_kwargs"):
        renderer.render(chat("a", THOUGHTS))
    assert learned(tiny(), renderer.render(chat("a", "b"))) == ["b<eos>"]
    followed = ChatRenderer(tiny(template), end_of_response="eos", template_kwargs={"thinking": True})
    assert learned(tiny(), followed.render(chat("a", THOUGHTS))) == [THOUGHTS + "<eos>"]


def test_no_advice_where_nothing_works(monkeypatch):
    monkeypatch.setattr("dft_lightning.data.rendering.TEMPLATES", {})
    with pytest.raises(UserError, match="none of the shipped templates helps"):
        ChatRenderer(tiny("{{ raise_exception('no') }}"))


def test_prompts_that_open_thoughts_have_an_identity_of_their_own():
    opens = ChatRenderer(tiny(OPENS), end_of_response="eos").identity
    assert opens["thoughts"] == "<think>\n"  # rows of earlier versions have the tag twice
    assert "thoughts" not in ChatRenderer(tiny(), end_of_response="eos").identity
