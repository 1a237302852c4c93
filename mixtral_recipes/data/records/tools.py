"""Tools and tool calls, from OpenAI's and sharegpt's spellings to one: OpenAI's, as chat templates expect it.

What mistral-common does to them before it encodes is done here: a tool has a name, a description and parameters; the
arguments of a call and the results of tools are JSON where they can be read as such.
"""

import json
import re
from typing import Any

from mixtral_recipes.errors import DataError

_ID = re.compile(r"[a-zA-Z0-9]{9}")


def tools_of(value: Any, name: str, where: object) -> list[dict[str, Any]]:
    """The tools of a record.

    Args:
        value: A list of tools, JSON text of one, or nothing.
        name: Its column, for errors.
        where: The record, for errors.

    Raises:
        DataError: no list of tools with names.
    """
    value = _json(value)
    if not value:
        return []
    found: list[dict[str, Any]] = []
    for number, tool in enumerate(value if isinstance(value, list) else [value]):
        tool = _json(tool)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}: {name}[{number}] is not a tool: it needs a 'name' (OpenAI's form: function.name)."
            )
        parameters = _json(function.get("parameters") or {})
        if not isinstance(parameters, dict):
            raise DataError(f"{where}: {name}[{number}].parameters is {type(parameters).__name__}, not an object.")
        described = {
            "name": function["name"],
            "description": function.get("description") or "",
            "parameters": without_absent(parameters),
        }
        found.append({"type": "function", "function": described})
    return found


def calls_of(value: Any, at: str, where: object) -> list[dict[str, Any]]:
    """The calls of an assistant's turn.

    Args:
        value: OpenAI's ``tool_calls`` or ``function_call``, or JSON text of a call or of several.
        at: The turn, for errors.
        where: The record, for errors.

    Returns:
        ``type``, ``id`` (empty where there is none) and ``function`` with ``name`` and ``arguments`` of each.

    Raises:
        DataError: not readable as calls.
    """
    value = _json(value)
    found: list[dict[str, Any]] = []
    for call in value if isinstance(value, list) else [value]:
        call = _json(call)
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: {at} is not a tool call: it needs a 'name' and 'arguments'.")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = _json(arguments) if arguments not in (None, "") else {}
        identifier = call.get("id")
        found.append(
            {
                "type": "function",
                "id": identifier if isinstance(identifier, str) and identifier != "null" else "",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    if not found:
        raise DataError(f"{where}: {at} has no tool calls.")
    return found


def result_of(text: str) -> Any:
    """A tool's result as it is encoded: JSON where it is, the text otherwise."""
    return _json(text) if text else {}


def identify(messages: list[dict[str, Any]], where: object) -> None:
    """Give each call an identifier of Mistral's form (nine letters and digits), and each result that of its call.

    Results without an identifier belong to the calls before them in order.

    Raises:
        DataError: a result belongs to no call.
    """
    open_calls: list[str] = []
    number = 0
    for message in messages:
        if message["role"] == "tool":
            given = message.get("tool_call_id")
            identifier = _nine(given) if given else next(iter(open_calls), None)
            if identifier not in open_calls:
                raise DataError(
                    f"{where}: this tool result belongs to no earlier call. If the assistant's text spells out its "
                    "calls (Hermes, ToolACE), give such results the role 'user'."
                )
            open_calls.remove(identifier)
            message["tool_call_id"] = identifier
            continue
        open_calls = []
        for call in message.get("tool_calls", ()):
            call["id"] = _nine(call["id"]) if call["id"] else f"call{number:05d}"
            open_calls.append(call["id"])
            number += 1


def _nine(identifier: str) -> str:
    """As vLLM shortens other identifiers for Mistral's models: the last nine letters and digits."""
    if _ID.fullmatch(identifier):
        return identifier
    return re.sub(r"[^a-zA-Z0-9]", "", identifier)[-9:].rjust(9, "0")


def _json(value: Any) -> Any:
    """Text that is JSON, read; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def without_absent(value: Any) -> Any:
    """A value without the empty entries that the structs of tables give to every row."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if v is not None or k in ("default", "const")}
        return {k: without_absent(v) for k, v in kept.items()}
    return [without_absent(element) for element in value] if isinstance(value, list) else value
