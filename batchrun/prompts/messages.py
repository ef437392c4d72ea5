"""A row's chat as people store it: in OpenAI's form or ShareGPT's, as objects or JSON text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

CHAT_COLUMNS = ("messages", "conversations", "conversation")
ARGUMENT_COLUMNS = ("tools", "chat_template_kwargs")

# Arguments of `apply_chat_template` that batchrun sets itself.
RESERVED = frozenset(
    {
        *("conversation", "messages", "tools", "chat_template"),
        *("add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("tokenizer_kwargs", "return_assistant_tokens_mask", "sanitize_control_tokens"),
    }
)
ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function", "ipython"))
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(
        ("tool", "tool_response", "observation", "function", "function_response"), "tool"
    ),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
_CALLERS = ("function_call", "tool_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA = {
    **dict.fromkeys(("image", "image_url", "input_image", "images"), "an image"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("video", "video_url", "input_video"), "a video"),
    **dict.fromkeys(("file", "file_url", "input_file", "document"), "a file"),
}
_AS_DATA = "--ignore-param-columns treats the column as data"


class PromptError(Exception):
    """A row can't be turned into a prompt.

    Args:
        kind: A short name that failures are counted under.
        message: What is wrong with the row.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def wrong_type(message: str) -> PromptError:
    """The error for a row whose prompt, or a part of it, is of the wrong type."""
    return PromptError("wrong_type", message)


def arguments_taken(names: Sequence[str]) -> str:
    """The line that tells users which columns go to the chat template."""
    return (
        f"passed to the chat template from columns: {', '.join(names)}; to take them as data: "
        "--ignore-param-columns"
    )


def is_chat(value: Any) -> bool:
    """Whether a value that is not text is meant as a chat, well-formed or not."""
    return isinstance(value, list) or (
        isinstance(value, dict) and bool({"role", "from"} & {*value})
    )


def read_messages(value: Any, *, columnar: bool) -> list[dict[str, Any]]:
    """A row's messages in one form.

    Args:
        value: A list of messages, one message, or JSON text of either.
        columnar: Objects have all keys of their column, so null means that a key is absent.

    Returns:
        New messages, at least one, without null keys. `role` is text. `content`, if there is any,
        is text or a list of texts. Each item of `tool_calls`, if there are any, has a `function`
        with a `name` and `arguments`: their `value`, an object, and `text`, its JSON if the row
        has it as text.

    Raises:
        PromptError: It is not a chat, or not all of it is text.
    """
    if isinstance(value, str):
        value, columnar = parse_json(value, "messages is text but"), False
    value = _object(value)
    if value is None:
        raise PromptError("null_prompt", "messages is null")
    if isinstance(value, dict):
        by_key = isinstance(value.get("role", value.get("from")), list)
        value = _by_message(value) if by_key else [value]
    if not isinstance(value, list):
        raise wrong_type(f"messages is {kind_of(value)}, not a list of messages")
    if not value:
        raise PromptError("empty_prompt", "messages is an empty list")
    messages = [_message(i, message, columnar) for i, message in enumerate(value)]
    for i, message in enumerate(messages):
        if "content" in message or "tool_calls" in message:
            continue
        if i < len(messages) - 1 or message["role"] != "assistant":
            raise wrong_type(f"message {i} has no content")
        message["content"] = ""  # the answer to generate
    return messages


def read_tools(value: Any, *, columnar: bool) -> list[dict[str, Any]] | None:
    """A row's tools, each as `{"type": "function", "function": {...}}`; None if it has none.

    Args:
        value: What the column holds: a list of tools, one tool, JSON text of either, or null.
        columnar: See `read_messages`.

    Raises:
        PromptError: They are not tools.
    """
    columnar = columnar and not isinstance(value, str)
    value = _opened(value, "tools is text but", _AS_DATA)
    if not value and not isinstance(value, bool | int | float):
        return None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise wrong_type(f"tools is {kind_of(value)}, not a list ({_AS_DATA})")
    return [_tool(n, tool, columnar) for n, tool in enumerate(value)]


def read_arguments(value: Any, *, columnar: bool) -> dict[str, Any]:
    """A row's arguments for its chat template, by name.

    Args:
        value: An object, JSON text of one, or null.
        columnar: See `read_messages`.

    Raises:
        PromptError: It is not an object, or has a name that batchrun sets itself.
    """
    column = ARGUMENT_COLUMNS[1]
    columnar = columnar and not isinstance(value, str)
    value = _opened(value, f"{column} is text but", _AS_DATA)
    if value is None or value == []:
        return {}
    if not isinstance(value, dict):
        raise wrong_type(f"{column} is {kind_of(value)}, not an object ({_AS_DATA})")
    found: dict[str, Any] = fresh(value, columnar)
    if taken := sorted(RESERVED & found.keys()):
        raise PromptError("bad_parameter", f"{column} has {taken[0]!r}, which batchrun sets itself")
    return found


def parse_json(text: str, what: str, advice: str = "") -> Any:
    """The value of a JSON text. NaN and infinities become null.

    Raises:
        PromptError: It is not JSON; the message begins with `what`.
    """
    try:
        return json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        cause = "nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"
        raise wrong_type(f"{what} {cause}" + (f" ({advice})" if advice else "")) from None


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def kind_of(value: Any) -> str:
    """The type of a value, in JSON's terms."""
    if isinstance(value, int | float):
        return "true or false" if isinstance(value, bool) else "a number"
    known = {type(None): "null", dict: "an object", list: "a list", str: "text"}
    return known.get(type(value), f"a {type(value).__name__}")


def fresh(value: Any, columnar: bool) -> Any:
    """A copy; if `columnar`, objects lose their null keys, which are the column's."""
    if isinstance(value, dict):
        kept = value.items() if not columnar else [p for p in value.items() if p[1] is not None]
        return {key: fresh(item, columnar) for key, item in kept}
    return [fresh(item, columnar) for item in value] if isinstance(value, list) else value


def _opened(text: Any, what: str, advice: str = "") -> Any:
    """The value of JSON text, None if it is blank; other values are returned as they are."""
    if isinstance(text, str):
        text = parse_json(text, what, advice) if text.strip() else None
    return _object(text)


def _object(value: Any) -> Any:
    """An object for a list of key-value pairs, which is how sources return Arrow's maps."""
    pairs = isinstance(value, list) and all(isinstance(p, list) and len(p) == 2 for p in value)
    return dict(value) if pairs and value and all(isinstance(p[0], str) for p in value) else value


def _by_message(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages from an object that has one list per key, as `datasets` writes them."""
    there = {key: values for key, values in columns.items() if values is not None}
    lengths = {len(values) if isinstance(values, list) else -1 for values in there.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise wrong_type("messages is an object of lists of different lengths")
    return [dict(zip(there, values, strict=True)) for values in zip(*there.values(), strict=True)]


def _message(i: int, raw: Any, columnar: bool) -> dict[str, Any]:
    raw = _object(raw)
    if not isinstance(raw, dict):
        raise wrong_type(f"message {i} is not an object with a role")
    # A template must not see absent keys as null, as Parquet and OpenAI write them.
    message = {key: fresh(item, columnar) for key, item in raw.items() if item is not None}
    if "role" not in message and isinstance(message.get("from"), str):
        message = _of_speaker(i, message)
    role = message.get("role")
    if not isinstance(role, str):
        raise wrong_type(f"message {i} is not an object with a role")
    usual = role.strip().lower()
    message["role"] = usual if usual in ROLES else role
    content = _content(i, message.pop("content", None))
    called = [message.pop("tool_calls", None), message.pop("function_call", None)]
    calls = [call for value in called for call in _tool_calls(i, value)]
    if content is not None:
        message["content"] = content
    if calls:
        message["tool_calls"] = calls
    return message


def _of_speaker(i: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message in ShareGPT's form, converted to the usual one."""
    speaker = message.pop("from")
    content = message.pop("value", message.get("content"))
    name = speaker.strip().lower()
    if name not in _SPEAKERS:
        raise wrong_type(f"message {i} is from {speaker!r}, a speaker that batchrun does not know")
    if name in _CALLERS and isinstance(content, str):
        try:
            calls = parse_json(content, "")
            if _tool_calls(i, calls):
                return {**message, "role": "assistant", "tool_calls": calls}
        except PromptError:
            pass  # a call in the model's own form stays text
    return {**message, "role": _SPEAKERS[name], "content": content}


def _content(i: int, content: Any) -> str | list[str] | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong_type(f"message {i} has content that is {kind_of(content)}, not text")
    return [_part(i, part) for part in content] or None


def _part(i: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    part = _object(part)
    if not isinstance(part, dict):
        raise wrong_type(f"message {i} has a part that is {kind_of(part)}, not text")
    kind = part.get("type")
    if kind is None:  # null and empty siblings come from Parquet
        kind = next((key for key in _MEDIA if fresh(part.get(key), True)), "text")
    if kind in _TEXT_PARTS:
        text = part.get("text")
        if not isinstance(text, str):
            raise wrong_type(f"message {i} has a text part whose text is {kind_of(text)}")
        return text
    what = _MEDIA.get(kind, f"a part of type {kind!r}") if isinstance(kind, str) else "a part"
    raise PromptError("not_text", f"message {i} has {what}, but batchrun gives models text only")


def _tool_calls(i: int, value: Any) -> list[dict[str, Any]]:
    """Tool calls, wrapped or bare, one or several, as objects or JSON text."""
    value = _opened(value, f"the tool calls of message {i} are")
    if not value:
        return []
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list):
        raise wrong_type(f"the tool calls of message {i} are {kind_of(value)}, not a list")
    found = []
    for n, call in enumerate(calls):
        where = f"tool call {n} of message {i}"
        wrapped = _wrapped(_opened(call, f"{where} is"), where)
        function = wrapped["function"]
        arguments = _arguments(where, function.get("arguments"))
        found.append({**wrapped, "function": {**function, "arguments": arguments}})
    return found


def _arguments(where: str, value: Any) -> dict[str, Any]:
    text = value if isinstance(value, str) and value.strip() else None
    value = _opened(value, f"the arguments of {where} are")
    if value in (None, [], ""):
        value = {}
    if not isinstance(value, dict):
        raise wrong_type(f"the arguments of {where} are {kind_of(value)}, not an object")
    return {"value": value, "text": text}


def _tool(n: int, tool: Any, columnar: bool) -> dict[str, Any]:
    where, advice = f"tool {n}", f" ({_AS_DATA})"
    columnar = columnar and not isinstance(tool, str)
    tool = _opened(tool, f"{where} is")
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind not in (None, "function"):
        raise wrong_type(f"{where} is of type {kind!r}, but models get functions only{advice}")
    return _wrapped(fresh(tool, columnar), where, advice)


def _wrapped(value: Any, where: str, advice: str = "") -> dict[str, Any]:
    """A called or callable function, as `{"type": "function", "function": {...}}`."""
    given = value if isinstance(value, dict) else {}
    if isinstance(given.get("function"), dict):
        kind = given.get("type") or "function"
        wrapped = {"type": kind, **given} | {"type": kind}  # keys stay in the row's order
    else:
        bare = {key: item for key, item in given.items() if key not in ("type", "id")}
        call_id = {"id": given["id"]} if "id" in given else {}
        wrapped = {**call_id, "type": "function", "function": bare}
    name = wrapped["function"].get("name")
    if not isinstance(name, str) or not name:
        raise wrong_type(f"{where} is not a function with a name{advice}")
    return wrapped
