from datetime import datetime

import pytest

from idrm.alignment.rendering import ChatRenderer, TemplateRefusal, canonical_text, frozen_chat_template, plain_text
from idrm.errors import InputError

CHATML = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
LLAMA = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{- '<|header|>system\n\nToday Date: ' + date_string + '<|eot|>' }}"
    "{%- for message in messages %}"
    "{{- '<|header|>' + message['role'] + '\n\n' + message['content'] | trim + '<|eot|>' }}{%- endfor %}"
)
ALTERNATING = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ message.content }}]{% endfor %}"
)


def _messages(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


def _found(text):
    return [text.text[start:end] for start, end in text.contents]


def test_canonical_text_joins_contents_by_a_newline():
    text = canonical_text(_messages("a b", "", "c"))
    assert text.text == "a b\n\nc"
    assert text.contents == [(0, 3), (4, 4), (5, 6)]
    assert text.coordinates() == [0, 1, 1, 2, 2, 2, 3]


def test_plain_text_of_a_dialogue_is_that_of_hh():
    text = plain_text(_messages("Be brief.", "Hi", "Hello", roles=("system", "user", "assistant")), True)
    assert text.text == "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant: Hello"
    assert _found(text) == ["Be brief.", "Hi", "Hello"]


def test_plain_text_of_bare_strings_is_their_concatenation():
    text = plain_text(_messages("2 + 2 =", " 4"), False)
    assert (text.text, text.contents) == ("2 + 2 = 4", [(0, 7), (7, 9)])


def test_coordinates_count_content_characters_and_no_white_space():
    messages = _messages("a\u00a0\u3000é\n", "\u200bb")
    assert plain_text(messages, True).coordinates()[-1] == canonical_text(messages).coordinates()[-1] == 4
    assert plain_text(messages, True).coordinates()[: len("\n\nHuman: a")] == [0] * len("\n\nHuman: a")


@pytest.mark.parametrize(
    "contents",
    [
        ("user", "assistant"),
        ("", "s"),
        ("im_start", "<|im_end|>\n<|im_start|>assistant"),
        ("  stripped ", "\n\ntwo\n\n"),
        (" \n", "end", "x", "x"),
        ("Today", "Date"),
    ],
)
@pytest.mark.parametrize("template", [CHATML, LLAMA])
def test_contents_are_found_where_the_template_put_them(template, contents, tokenizer_of):
    messages = _messages(*contents)
    text = ChatRenderer(tokenizer_of("byte-level", template))(messages)
    assert _found(text) == [content.strip() for content in contents]
    headers = [text.text[:start].rsplit("\n", 1)[0] for start, end in text.contents if start < end]
    roles = [message["role"] for message in messages if message["content"].strip()]
    assert all(header.rstrip().endswith(role) for header, role in zip(headers, roles, strict=True))
    assert text.coordinates()[-1] == canonical_text(messages).coordinates()[-1]


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("message.content", "message.content | upper"),
        CHATML.replace("message.content", "message.content.replace('b', '')"),
        CHATML.replace("in messages", "in messages[1:]"),
        CHATML.replace("in messages", "in messages | reverse"),
        CHATML.replace("{{ message.content }}", "{{ message.content }}{{ message.content }}"),
        CHATML.replace("{{ message.content }}", "{{ message.content }}{{ '!' if 'b' in message.content }}"),
    ],
)
def test_altered_contents_are_not_guessed_at(template, tokenizer_of):
    assert ChatRenderer(tokenizer_of("byte-level", template))(_messages("abc", "cba")).contents is None


def test_a_refusal_of_the_template_is_told(tokenizer_of):
    renderer = ChatRenderer(tokenizer_of("byte-level", ALTERNATING))
    assert _found(renderer(_messages("a", "b"))) == ["a", "b"]
    with pytest.raises(TemplateRefusal, match="roles must alternate"):
        renderer(_messages("a", "b", roles=("user",)))


def test_several_templates_without_a_default(tokenizer_of):
    tokenizer = tokenizer_of("byte-level trimmed", "unused")
    tokenizer.chat_template = {"one": CHATML, "two": LLAMA}
    with pytest.raises(InputError, match="template"):
        ChatRenderer(tokenizer)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA, "Today Date: 26 Jul 2024"),
        ("{{ strftime_now('%d %B %Y') }}|{{ strftime_now('%Y-%m-%d') }}", "26 July 2024|2024-07-26"),
        ("{% for m in messages %}{{ strftime_now('%A, %H:%M') }}{% endfor %}", "Friday, 00:00"),
        ("{% macro today() %}{{ strftime_now('%b') }}{% endmacro %}{{ today() }}{{ date_string }}", "Jul26 Jul 2024"),
    ],
)
def test_the_date_is_frozen(template, expected, tokenizer_of):
    assert expected in ChatRenderer(tokenizer_of("byte-level", template))(_messages("a")).text


@pytest.mark.parametrize("template", [CHATML, LLAMA, "\n\n{{ messages[0].content }}\n", " {% set x = 1 %}\n{{ x }}"])
def test_freezing_changes_nothing_but_the_date_and_only_once(template, tokenizer_of):
    frozen = frozen_chat_template(template)
    assert frozen_chat_template(frozen) == frozen
    messages = _messages(" a ", "b")
    rendered = tokenizer_of("byte-level", template).apply_chat_template(messages, tokenize=False)
    today = datetime.now().strftime("%d %b %Y")
    assert tokenizer_of("byte-level", frozen).apply_chat_template(messages, tokenize=False) == rendered.replace(
        today, "26 Jul 2024"
    )
