"""Tool schemas, calls and results as prompt text in DSML, the markup these models were taught.

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="F">
    <｜DSML｜parameter name="K" string="true">text as it is</｜DSML｜parameter>
    <｜DSML｜parameter name="N" string="false">JSON</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

`｜DSML｜` is a control token here; names, values, schemas and results are plain text whatever they contain.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from dsv4.chat.control import DSML, Control, Piece
from dsv4.chat.dialect import Dialect
from dsv4.chat.messages import Block, Call, Message, Tool
from dsv4.chat.templates import SCHEMA, TOOL_SCHEMAS, fill
from dsv4.errors import PromptError

MARK = Control(DSML)


def to_json(value: Any) -> str:
    """JSON as in training: key order kept, ", " and ": ", no ASCII escapes."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise PromptError("a schema or argument is not JSON", got=str(e)) from None


def render_tools(tools: Iterable[Tool], dialect: Dialect) -> list[Piece]:
    """The tool instructions with one schema a line."""
    return fill(dialect.tools_template(), {TOOL_SCHEMAS: "\n".join(to_json(tool) for tool in tools)})


def render_instructions(message: Message, dialect: Dialect) -> list[Piece]:
    """What follows the text of a system or developer message: tools, then the response format."""
    out: list[Piece] = []
    if message.tools:
        out += ["\n\n", *render_tools(message.tools, dialect)]
    if message.response_format:
        out += ["\n\n", *fill(dialect.response_format_template(), {SCHEMA: to_json(message.response_format)})]
    return out


def render_calls(calls: Iterable[Call]) -> list[Piece]:
    """The call block with the empty line before it; nothing for no calls."""
    blocks = [_render_call(call) for call in calls]
    if not blocks:
        return []
    inner = [piece for block in blocks for piece in (*block, "\n")]
    return ["\n\n<", MARK, "tool_calls>\n", *inner, "</", MARK, "tool_calls>"]


def _render_call(call: Call) -> list[Piece]:
    parameters = [_render_parameter(key, value) for key, value in _arguments(call).items()]
    lines = [piece for parameter in parameters for piece in (*parameter, "\n")] or ["\n"]
    return ["<", MARK, f'invoke name="{call.name}">\n', *lines, "</", MARK, "invoke>"]


def _render_parameter(key: str, value: Any) -> list[Piece]:
    is_text = isinstance(value, str)
    shown = value if is_text else to_json(value)
    return ["<", MARK, f'parameter name="{key}" string="{str(is_text).lower()}">{shown}</', MARK, "parameter>"]


def _arguments(call: Call) -> dict[str, Any]:
    """Arguments by name. What is no JSON object travels as one text parameter called "arguments"."""
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = None
    return arguments if isinstance(arguments, dict) else {"arguments": call.arguments}


def render_blocks(blocks: Iterable[Block]) -> str:
    """A user turn's texts and tool results, an empty line between each."""
    return "\n\n".join(b.text if b.call_id is None else f"<tool_result>{b.text}</tool_result>" for b in blocks)
