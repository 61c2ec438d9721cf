"""Conversations with their tools, in the form in which chat templates expect them.

Files write the same thing in different ways. Here a field that is null is absent, and the arguments
of a call are an object. (A null inside the arguments of a call stays, as the model learns to write
it. A columnar file has none, see `RL2.datasets.rows.without_nested_nulls`.)
"""

from __future__ import annotations

from typing import Any

from RL2.datasets.prompts import from_json, require_text
from RL2.datasets.rows import BadRow, type_name

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def messages_of(row: dict[str, Any], column: str = "messages") -> list[dict[str, Any]]:
    """`row[column]`, checked: a non-empty list of {"role": str, "content": str, ...}.

    An assistant's turn with `weight` 0 is not learned.
    """
    messages = from_json(row[column], column)
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if isinstance(messages, list) else type_name(messages)
        raise BadRow(
            f'{column} is {found}; it must be a list of {{"role": "user", "content": "..."}}',
        )
    checked = []
    for number, message in enumerate(messages):
        name = f"{column}[{number}]"
        if not isinstance(message, dict):
            raise BadRow(f"{name} is {type_name(message)}; it must be an object")
        for field in ("role", "content"):
            if field not in message and not (field == "content" and message.get("tool_calls")):
                raise BadRow(
                    f"{name} without {field}: it has the keys "
                    f"{', '.join(sorted(map(str, message))) or 'none'}",
                )
        role = require_text(message["role"], f"{name}.role")
        if role not in ROLES:
            raise BadRow(
                f"{name}.role is {role!r:.40}, which chat templates ignore; use one of "
                f"{', '.join(ROLES)}",
            )
        calls = _tool_calls(message.get("tool_calls"), f"{name}.tool_calls")
        if not calls:
            require_text(message.get("content"), f"{name}.content")
        _check_weight(message, name)
        # Some templates treat a null or an empty list of calls as a call.
        message = {k: v for k, v in message.items() if v is not None and k != "tool_calls"}
        checked.append(message | ({"tool_calls": calls} if calls else {}))
    return checked


def learned_turns(messages: list[dict[str, Any]]) -> list[int]:
    """Indices of the assistant's turns, except those with `weight: 0`."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [i for i in turns if messages[i].get("weight", 1)]
    if not learned:
        problem = "messages without an assistant turn"
        if turns:
            problem = "messages whose assistant turns all have weight 0"
        raise BadRow(f"{problem}: nothing to learn")
    return learned


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """`row["tools"]`, a list of JSON schemas; None if there are none."""
    tools = from_json(row.get("tools") or None, "tools")
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadRow(f"tools is {type_name(tools)}; it must be a list of objects")
    tools = [from_json(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise BadRow(f"tools[{i}] is {type_name(tool)}; it must be an object")
    return tools


def _check_weight(message: dict[str, Any], name: str) -> None:
    """`weight` of a turn: 0 for one that is not learned."""
    weight = message.get("weight")
    if weight is None:
        return
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadRow(
            f"{name}.weight is {weight!r:.40}; use 0 (the turn is not learned) or 1, or leave it "
            "out",
        )
    if weight == 1 and message["role"] != "assistant":
        raise BadRow(
            f"{name}.weight is 1 in a turn of the {message['role']}; only turns of the assistant "
            "are learned; leave it out",
        )


def _tool_calls(calls: Any, name: str) -> list[Any]:
    """The calls with their arguments as objects: templates encode them, and would encode a JSON
    text twice."""
    calls = from_json(calls or [], name)
    if not isinstance(calls, list):
        raise BadRow(f"{name} is {type_name(calls)}; it must be a list of objects")
    return [_tool_call(call, f"{name}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise BadRow(f"{name} is {type_name(call)}; it must be an object")
    if isinstance(call.get("function"), dict):
        return call | {"function": _tool_call(call["function"], f"{name}.function")}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    # A call without arguments is often written as an empty text.
    parsed = from_json(arguments, f"{name}.arguments") if arguments.strip() else {}
    if not isinstance(parsed, dict):
        raise BadRow(f"{name}.arguments is {type_name(parsed)} as JSON; it must be an object")
    return call | {"arguments": parsed}
