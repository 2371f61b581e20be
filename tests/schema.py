"""A small validator for the part of JSON Schema that docs/*.schema.json use: type, enum, required, properties, items, additionalProperties."""

from __future__ import annotations

from typing import Any

_TYPES: dict[str, Any] = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None)}


def problems(value: Any, schema: dict[str, Any], at: str = "$") -> list[str]:
    """What is wrong with a value, each with its place."""
    wanted = schema.get("type")
    kinds = [wanted] if isinstance(wanted, str) else wanted or []
    if kinds and not any(isinstance(value, _TYPES[kind]) and not (isinstance(value, bool) and kind in ("integer", "number")) for kind in kinds):
        return [f"{at}: {type(value).__name__} is no {' or '.join(kinds)}"]
    found = [f"{at}: {value!r} is none of {schema['enum']}"] if "enum" in schema and value not in schema["enum"] else []
    if isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [f"{at}: {name} is missing" for name in schema.get("required", ()) if name not in value]
        for name, each in value.items():
            if name in known:
                found += problems(each, known[name], f"{at}.{name}")
            elif more is False:
                found.append(f"{at}: {name} is unknown")
            elif isinstance(more, dict):
                found += problems(each, more, f"{at}.{name}")
    if isinstance(value, list) and "items" in schema:
        found += [problem for i, each in enumerate(value) for problem in problems(each, schema["items"], f"{at}[{i}]")]
    return found
