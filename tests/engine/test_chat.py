"""Chats as people store them, over templates in the manner of well-known models."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.errors import ModelError
from batchrun.prompts.builder import PromptBuilder, prompt_builder
from batchrun.prompts.chat_source import check_template_args, variables
from batchrun.prompts.messages import PromptError
from tests.engine.chat_templates import CHATML, QWEN3, TEMPLATES, byte_tokenizer


@cache
def tokenizer_of(name: str) -> Any:
    return byte_tokenizer(TEMPLATES[name])


@cache
def builder_of(name: str, **options: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer_of(name), column="messages", **options)


def prompt(name: str, messages: Any, *, columnar: bool = False, **fields: Any) -> str:
    ids = builder_of(name, columnar=columnar)({"messages": messages, **fields})
    text: str = tokenizer_of(name).decode(ids)
    return text


def refused(name: str, messages: Any, **fields: Any) -> str:
    with pytest.raises(PromptError) as caught:
        builder_of(name)({"messages": messages, **fields})
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 400
    return said


def theirs(name: str, messages: Any, **options: Any) -> str:
    """What transformers itself makes of it."""
    tokenizer = tokenizer_of(name)
    ids = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, **{"add_generation_prompt": True, **options}
    )
    text: str = tokenizer.decode(ids)
    return text


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def call(name: str, arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": "abcdefgh1", "type": "function", "function": function}


RESULT = {"role": "tool", "tool_call_id": "abcdefgh1", "name": "weather", "content": '"20 °C"'}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
WITH_TOOLS = ("llama", "qwen2.5", "qwen3", "mistral")
WITH_CALLS = (*WITH_TOOLS, "deepseek")
OF_TEXT = sorted(TEMPLATES.keys() - {"vision"})


# --- what transformers does, it does -------------------------------------------------------------


@pytest.mark.parametrize("name", OF_TEXT)
@pytest.mark.parametrize(
    "messages",
    [
        [user("Hi")],
        [user(" Hi \n"), assistant(" Hello! "), user("é 日本 👋")],
        [system("Be brief."), user("Hi")],
        [system("Be brief."), user("Hi"), assistant("x"), user("y")],
    ],
)
def test_plain_chats_are_those_of_transformers(name: str, messages: Any) -> None:
    before = copy.deepcopy(messages)
    if name == "gemma" and messages[0]["role"] == "system":
        said = "the chat template refused the chat: System role not supported"
        assert refused(name, messages) == said
    elif name == "mistral" and len(messages) == 4:
        assert prompt(name, messages) == theirs(name, messages)
    else:
        tokenizer = tokenizer_of(name)
        ids = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert list(builder_of(name)({"messages": messages})) == ids
    assert messages == before


@pytest.mark.parametrize("name", [*WITH_CALLS])
def test_tool_calls_are_those_of_transformers(name: str) -> None:
    arguments: Any = {"city": 'Nürn"berg', "days": [1, 2.5], "now": True, "unit": None}
    text = json.dumps(arguments, ensure_ascii=False)
    written = text if name == "deepseek" else arguments
    chat = [user("?"), {"role": "assistant", "tool_calls": [call("weather", written)]}, RESULT]
    tools = [WEATHER] if name in WITH_TOOLS else None
    want = theirs(name, chat, tools=tools)
    for given_ in (arguments, text):
        chat[1] = {"role": "assistant", "content": None, "tool_calls": [call("weather", given_)]}
        assert prompt(name, chat, tools=tools) == want
        chat[1]["tool_calls"] = json.dumps(chat[1]["tool_calls"], ensure_ascii=False)
        assert prompt(name, chat, tools=json.dumps(tools)) == want
    function = {"name": "weather", "arguments": arguments}
    chat[1] = {"role": "assistant", "tool_calls": [{"id": "abcdefgh1", **function}]}
    assert prompt(name, chat, tools=tools) == want
    if name != "mistral":  # which wants an id
        chat[1] = {"role": "assistant", "content": None, "function_call": function}
        assert prompt(name, chat, tools=tools) == want
    assert "'city'" not in want


@pytest.mark.parametrize("arguments", ["", None, {}, " "])
def test_calls_without_arguments(arguments: Any) -> None:
    chat = [user("?"), {"role": "assistant", "tool_calls": [call("now", arguments)]}]
    assert '"arguments": {}}' in prompt("qwen2.5", chat)
    assert "```json\n{}\n```" in prompt("deepseek", chat)


@pytest.mark.parametrize("name", OF_TEXT)
@pytest.mark.parametrize("text", ["The colour is", "The colour is ", "x\n", " y"])
def test_begun_answers_are_continued_as_transformers_does(name: str, text: str) -> None:
    chat = [user("Name a colour."), assistant(text)]
    want = theirs(name, chat, continue_final_message=True, add_generation_prompt=False)
    got = prompt(name, chat)
    assert got == want
    assert got.rstrip().endswith(text.strip())


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("content", ["", None, [], " \n", [""]])
def test_an_empty_answer_is_the_one_that_is_wanted(name: str, content: Any) -> None:
    assert prompt(name, [user("Hi"), assistant(content)]) == prompt(name, [user("Hi")])


# --- parts ---------------------------------------------------------------------------------------


PARTS = [
    [{"type": "text", "text": "Hi there"}],
    [{"type": "input_text", "text": "Hi there", "image_url": None}],
    [{"text": "Hi there"}],
    [{"type": None, "text": "Hi there", "image_url": {"url": None}, "audio": None}],
    ["Hi there"],
    [[["type", "text"], ["text", "Hi there"]]],  # Arrow's map
]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("parts", PARTS)
def test_parts_of_text_are_text(name: str, parts: Any) -> None:
    assert prompt(name, [user(parts)], columnar=True) == prompt(name, [user("Hi there")])
    chat = [user("a"), assistant(parts), user("b")]
    assert prompt(name, chat) == prompt(name, [user("a"), assistant("Hi there"), user("b")])


def test_a_template_of_parts_gets_parts() -> None:
    want = "<|im_start|>User: Hi<end_of_utterance>\nAssistant:"
    assert prompt("vision", [user("Hi")]) == want
    parts = [{"type": "text", "text": t} for t in ("H", "i")]
    assert prompt("vision", [user(parts)]) == want == theirs("vision", [user(parts)])
    assert prompt("vision", [user("Hi"), assistant("Well")]).endswith("Assistant: Well")


@pytest.mark.parametrize(
    ("name", "between"), [("both", " "), ("chatml", "\n"), ("guarded", "\n"), ("gemma", "\n")]
)
def test_parts_are_joined_as_the_template_would(name: str, between: str) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert prompt(name, [user(parts)]) == prompt(name, [user(f"one{between}two")])
    if name == "both":
        assert prompt(name, [user(parts)]) == theirs(name, [user(parts)])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "u"}}],
            "image",
        ),
        ([{"type": "image"}], "message 0 has an image, but batchrun gives models text only"),
        ([{"type": None, "text": None, "image_url": {"url": "u"}}], "an image"),
        ([{"type": "input_audio", "input_audio": {}}], "has audio"),
        ([{"type": "video"}], "a video"),
        ([{"type": "file"}], "a file"),
        ([{"type": "tool_use"}], "a part of type 'tool_use'"),
        ([{"type": "text", "text": None}], "whose text is null"),
        ([{"type": "text", "text": 3}], "whose text is a number"),
        ([{"type": ["x"]}], "a part"),
        ([7], "a part that is a number"),
        (7, "content that is a number"),
        (True, "content that is true or false"),
        ({"type": "text", "text": "x"}, "content that is an object"),
        (None, "message 0 has no content"),
        ([], "message 0 has no content"),
    ],
)
def test_what_is_no_text_is_the_rows_error(content: Any, said: str) -> None:
    assert said in refused("chatml", [user(content)])


# --- ShareGPT ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatml", "qwen3", "vision", "mistral"])
def test_sharegpt_is_a_chat(name: str) -> None:
    builder = PromptBuilder(tokenizer_of(name), column="conversations")
    said = [("System", "s"), ("human", "Hi"), ("gpt", "Hello"), ("Human ", "Bye"), ("gpt", "")]
    shared = [{"from": who, "value": text, "weight": None} for who, text in said]
    usual = [system("s"), user("Hi"), assistant("Hello"), user("Bye")]
    want = builder_of(name)({"messages": usual})
    assert builder({"conversations": shared}) == want
    assert builder({"conversations": json.dumps(shared)}) == want
    assert builder({"conversations": usual}) == want
    assert builder_of(name)({"messages": shared}) == want
    shouted = [{**message, "role": message["role"].upper()} for message in usual]
    assert builder({"conversations": shouted}) == want


def test_sharegpt_with_functions() -> None:
    shared = [
        {"from": "human", "value": "?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "20"},
    ]
    usual = [
        user("?"),
        {"role": "assistant", "tool_calls": [call("weather", {"city": "Oslo"})]},
        {"role": "tool", "content": "20"},
    ]
    assert prompt("qwen3", shared) == prompt("qwen3", usual)
    shared[1]["value"] = "<functioncall> weather"
    usual[1] = assistant("<functioncall> weather")
    assert prompt("qwen3", shared) == prompt("qwen3", usual)


def test_a_speaker_nobody_knows_is_named() -> None:
    assert "message 1 is from 'narrator'" in refused(
        "chatml", [{"from": "human", "value": "x"}, {"from": "narrator", "value": "y"}]
    )


# --- other shapes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        user("Hi"),
        json.dumps(user("Hi")),
        json.dumps([user("Hi")]),
        [[["role", "user"], ["content", "Hi"]]],
        [["role", "user"], ["content", "Hi"]],
        {"role": ["user"], "content": ["Hi"]},
        {"from": ["human"], "value": ["Hi"]},
        [{"role": "user", "content": "Hi", "name": None, "tool_calls": None}],
    ],
)
def test_one_message_and_other_shapes(value: Any) -> None:
    assert prompt("chatml", value) == theirs("chatml", [user("Hi")])


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ("", "empty_prompt", "empty"),
        ("[]", "empty_prompt", "empty"),
        ("null", "null_prompt", "null"),
        (None, "null_prompt", "null"),
        ("3", "wrong_type", "a number, not a list"),
        ('"hi"', "wrong_type", "text, not a list"),
        ("[" * 100_000, "wrong_type", "nested too deeply"),
        ("not json", "wrong_type", "not JSON"),
        (7, "wrong_type", "a number"),
        ([["user", "Hi", "x"]], "wrong_type", "message 0 is not an object with a role"),
        (["Hi"], "wrong_type", "message 0 is not an object with a role"),
        ({"role": ["user"], "content": ["a", "b"]}, "wrong_type", "different lengths"),
        ([{"role": 3, "content": "x"}], "wrong_type", "message 0 is not an object with a role"),
        ([assistant("")], "empty_prompt", "empty"),
        ([{"content": "x"}], "wrong_type", "role"),
        ([user("x"), {"role": "assistant"}, user("y")], "wrong_type", "message 1 has no content"),
    ],
)
def test_what_is_no_chat(value: Any, kind: str, said: str) -> None:
    with pytest.raises(PromptError, match=said) as caught:
        builder_of("chatml")({"messages": value})
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ([call("f", "not json")], "the arguments of tool call 0 of message 1 are not JSON"),
        ([call("f", "[1]")], "are a list, not an object"),
        ([call("f", 3)], "are a number, not an object"),
        ([{"id": "x"}], "tool call 0 of message 1 is not a function with a name"),
        ([{"type": "function", "function": {"name": None}}], "is not a function with a name"),
        ([3], "is not a function with a name"),
        ("nonsense", "the tool calls of message 1 are not JSON"),
        (True, "the tool calls of message 1 are true or false, not a list"),
    ],
)
def test_calls_of_wrong_shapes(calls: Any, said: str) -> None:
    chat = [user("?"), {"role": "assistant", "tool_calls": calls}]
    assert said in refused("qwen3", chat)


# --- nulls ---------------------------------------------------------------------------------------


def test_nulls_of_a_column_are_absent_and_those_of_a_row_are_data() -> None:
    def chat(arguments: Any) -> Any:
        return [user("?"), {"role": "assistant", "tool_calls": [call("f", arguments)]}]

    spread = {"city": "Oslo", "expression": None, "near": {"x": 1, "y": None}}
    packed = {"city": "Oslo", "near": {"x": 1}}
    assert prompt("qwen3", chat(spread), columnar=True) == prompt("qwen3", chat(packed))
    assert '"expression": null' in prompt("qwen3", chat(spread))
    text = json.dumps(spread)
    assert '"expression": null' in prompt("qwen3", chat(text), columnar=True)
    pairs = [["city", "Oslo"], ["near", [["x", 1]]]]
    assert '"city": "Oslo"' in prompt("qwen3", chat(pairs), columnar=True)
    tool = copy.deepcopy(WEATHER)
    tool["function"]["parameters"]["properties"]["days"] = None
    tool["function"]["strict"] = None
    want = prompt("qwen3", [user("x")], tools=[WEATHER])
    assert prompt("qwen3", [user("x")], tools=[tool], columnar=True) == want
    assert '"strict": null' in prompt("qwen3", [user("x")], tools=[tool])


# --- tools and what templates are told -----------------------------------------------------------


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_come_in_every_form(name: str) -> None:
    want = theirs(name, [user("Hi")], tools=[WEATHER])
    bare = WEATHER["function"]
    forms: list[Any] = [[WEATHER], [bare], WEATHER, bare, [{"function": bare}]]
    forms += [json.dumps(form) for form in forms] + [[json.dumps(WEATHER)]]
    for tools in forms:
        assert prompt(name, [user("Hi")], tools=tools) == want
    for none in (None, "", [], "[]", "null", {}):
        assert prompt(name, [user("Hi")], tools=none) == theirs(name, [user("Hi")])


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        (3, "tools is a number, not a list"),
        ("hammer", "tools is text but not JSON"),
        (["hammer"], "tool 0 is not JSON"),
        ([3], "tool 0 is not a function with a name"),
        ([{"type": "web_search"}], "tool 0 is of type 'web_search'"),
        ([WEATHER, {"name": ""}], "tool 1 is not a function with a name"),
    ],
)
def test_tools_of_wrong_shapes(tools: Any, said: str) -> None:
    error = refused("qwen3", [user("x")], tools=tools)
    assert said in error
    assert "--ignore-param-columns" in error or "JSON" in error
    builder = PromptBuilder(tokenizer_of("qwen3"), column="messages", arguments_are_data=True)
    assert builder({"messages": [user("x")], "tools": tools}) == builder({"messages": [user("x")]})


def test_of_several_templates_the_one_for_tools_is_taken() -> None:
    tokenizer = byte_tokenizer({"default": CHATML, "tool_use": TEMPLATES["qwen3"]})
    builder = PromptBuilder(tokenizer, column="messages")
    text = tokenizer.decode(builder({"messages": [user("Hi")], "tools": [WEATHER]}))
    assert "# Tools" in text
    assert "# Tools" not in tokenizer.decode(builder({"messages": [user("Hi")]}))


def test_what_a_template_is_told() -> None:
    chat, off = [user("Hi")], "<think>\n\n</think>\n\n"
    assert off not in prompt("qwen3", chat)
    for told in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        assert prompt("qwen3", chat, chat_template_kwargs=told).endswith(off)
    job = PromptBuilder(
        tokenizer_of("qwen3"), column="messages", template_args={"enable_thinking": False}
    )
    decode = tokenizer_of("qwen3").decode
    assert decode(job({"messages": chat})).endswith(off)
    row = {"messages": chat, "chat_template_kwargs": {"enable_thinking": True}}
    assert not decode(job(row)).endswith(off)
    assert "Today Date: now" in prompt("llama", chat, chat_template_kwargs={"date_string": "now"})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"messages": []}, "'messages', which batchrun sets itself"),
        ({"add_generation_prompt": False}, "'add_generation_prompt', which batchrun"),
        ({"tokenize": True}, "'tokenize', which batchrun"),
        ({"enable_thinkin": False}, "'enable_thinkin', which the chat template does not read"),
        ("x", "not JSON"),
        ([1], "a list, not an object"),
        (3, "a number, not an object"),
    ],
)
def test_what_a_template_can_not_be_told(value: Any, said: str) -> None:
    assert said in refused("qwen3", [user("x")], chat_template_kwargs=value)


def test_variables_of_a_template() -> None:
    read = variables(QWEN3) or set()
    assert {"messages", "tools", "add_generation_prompt", "enable_thinking"} <= read
    assert not {"namespace", "raise_exception", "message", "ns", "thinking"} & read
    assert {"date_string", "tools_in_user_message"} <= (variables(TEMPLATES["llama"]) or set())
    assert variables("{% for x in %}") is None
    body = "{% generation %}{{ x }}{% endgeneration %}{% break %}"
    assert variables(f"{{% for m in y %}}{body}{{% endfor %}}") == {"x", "y"}
    check_template_args({"enable_thinking": 1}, [QWEN3, CHATML], "m")
    with pytest.raises(ModelError, match="m does not read --template-arg thinking") as caught:
        check_template_args({"thinking": 1}, [QWEN3, CHATML], "m")
    assert "enable_thinking" in (caught.value.hint or "")


def test_a_job_that_tells_what_is_not_read_ends_at_load() -> None:
    with pytest.raises(ModelError, match="does not read --template-arg x"):
        prompt_builder(
            tokenizer_of("chatml"),
            {"column": "messages", "template_args": {"x": 1}},
            max_model_len=100,
            model="m",
        )


# --- what a template leaves out ------------------------------------------------------------------


def test_what_a_template_leaves_out_is_the_rows_error() -> None:
    chat = [user("Hi"), {"role": "tool", "content": "i"}]
    assert refused("phi3", chat) == ("the chat template leaves out message 1, whose role is 'tool'")
    assert "message 0, whose role is 'developer'" in refused(
        "phi3", [{"role": "developer", "content": "H"}, user("Hi")]
    )
    for name in ("chatml", "vision", "gemma"):
        assert "no place for them" in refused(name, [user("Hi")], tools=[WEATHER])
    calls = [user("Hi"), {"role": "assistant", "content": "", "tool_calls": [call("f", {})]}]
    assert "message 1 has tool calls" in refused("chatml", calls)
    assert "message 1 has tool calls" in refused("vision", calls)
    assert refused("deepseek", [system("first"), system("second"), user("Hi")]) == (
        "the chat template leaves out message 0, whose role is 'system'"
    )
    deaf = byte_tokenizer(
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(PromptError, match="leaves out the message of --system"):
        PromptBuilder(deaf, system="Be brief.")({"prompt": "Hi"})


@pytest.mark.parametrize("name", [*WITH_CALLS])
def test_nothing_is_missed_that_has_another_form(name: str) -> None:
    """Thoughts that are cut off, text that is trimmed, results as JSON, a system's moved text."""
    for _ in range(2):
        messages = [
            system("\n s \n"),
            user(' "quoted" '),
            assistant("<think>\nhm\n</think>\n\nWell"),
            user("tab\t"),
            {"role": "assistant", "tool_calls": [call("weather", {"a": '"'})]},
            {**RESULT, "content": 'a "b"\nc'},
        ]
        if name == "mistral":
            messages = messages[:4]
        assert prompt(name, messages)


def test_templates_say_what_they_refuse() -> None:
    assert refused("gemma", [user("a"), user("b")]) == (
        "the chat template refused the chat: "
        "Conversation roles must alternate user/assistant/user/assistant/..."
    )
    calls = [user("x"), {"role": "assistant", "tool_calls": [call("f", {}), call("g", {})]}]
    assert "single tool-calls at once" in refused("llama", calls)


@pytest.mark.parametrize(
    "body",
    [
        "{{ messages[0].content + 1 }}",
        "{{ nothing.at.all }}",
        "{{ messages | tojson | int / 0 }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ raise_exception('a\nb' * 1000) }}",
        "{{ messages.append(1) }}",
        "{% for x in %}",
        "{{ ''.__class__.__mro__ }}{{ messages[0].content.nothing.more }}",
    ],
)
def test_whatever_a_template_raises_is_one_short_line(body: str) -> None:
    builder = PromptBuilder(byte_tokenizer(body), column="messages")
    with pytest.raises(PromptError, match="the chat template refused the chat: ") as caught:
        builder({"messages": [user("Hi")]})
    assert caught.value.kind == "chat_template"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 260


# --- begun answers -------------------------------------------------------------------------------


def test_a_begun_answer_that_a_template_rewrites() -> None:
    chat = [user("x"), assistant("<think>hm</think>The colour")]
    assert prompt("qwen3", chat).endswith("<think>\nhm\n</think>\n\nThe colour")
    assert refused("deepseek", chat) == (
        "the chat template can't continue message 1: the prompt does not contain its text unchanged"
    )
    deaf = byte_tokenizer("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(PromptError, match="can't continue message 1"):
        PromptBuilder(deaf, column="messages")({"messages": [user("x"), assistant("y")]})
    thought = [user("x"), {**assistant(""), "reasoning_content": "hm"}]
    assert "reasoning but no content" in refused("qwen3", thought)


def test_an_answer_of_calls_is_not_continued() -> None:
    chat = [user("x"), {"role": "assistant", "content": "Well", "tool_calls": [call("f", {})]}]
    assert prompt("qwen3", chat) == theirs("qwen3", chat)


def test_users_are_told_once() -> None:
    lines: list[str] = []
    builder = PromptBuilder(tokenizer_of("qwen3"), column="messages", log=lines.append)
    for _ in range(3):
        builder({"messages": [user("x"), assistant("y")], "tools": [WEATHER]})
    assert len(lines) == 2
    assert "tools" in lines[0]
    assert "continued" in lines[1]


# --- the beginning of text -----------------------------------------------------------------------


def test_a_text_that_has_its_beginning_gets_no_other() -> None:
    tokenizer = tokenizer_of("gemma")
    bos = tokenizer.bos_token_id
    builder = PromptBuilder(tokenizer)
    assert builder({"prompt": "x"})[:2] == (bos, ord("x") - 33)
    for text in ("<s>x", "<s><s>x"):
        ids = builder({"prompt": text})
        assert list(ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    template = PromptBuilder(tokenizer, template="<s>{a}")
    assert template({"a": "x"}).count(bos) == 1
    assert PromptBuilder(tokenizer, template="{a}")({"a": "<s>x"})[:2] != (bos, bos)
    assert builder_of("gemma")({"messages": [user("x")]}).count(bos) == 1


# --- anything at all -----------------------------------------------------------------------------


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["", "x", "user", "[]", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "from",
                    "value",
                    "content",
                    "type",
                    "text",
                    "tool_calls",
                    "function",
                    "name",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("name", ["qwen3", "vision", "llama", "deepseek"])
@given(messages=JSON, tools=JSON, told=JSON)
@settings(max_examples=60, deadline=None)
def test_any_row_is_a_prompt_or_an_error(name: str, messages: Any, tools: Any, told: Any) -> None:
    fields = {"messages": messages, "tools": tools, "chat_template_kwargs": told}
    before, said = copy.deepcopy(fields), ""
    try:
        assert builder_of(name)(fields)
    except PromptError as error:
        said = str(error)
    assert "\n" not in said
    assert fields == before
