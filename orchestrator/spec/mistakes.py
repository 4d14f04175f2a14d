"""Complaints of the schema, turned into sentences that say where, what is allowed, what is near."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from orchestrator.errors import Mistake

# What pydantic says of plain values, in the words of a sweep file.
PLAIN = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le:,}",
    "int_type": "a whole number belongs here",
    "int_parsing": "a whole number belongs here",
    "int_from_float": "a whole number belongs here",
    "float_type": "a number belongs here",
    "float_parsing": "a number belongs here",
    "finite_number": "a finite number belongs here",
    "string_type": "a text belongs here; what YAML takes for something else needs quotes",
    "string_pattern_mismatch": "allowed are up to 64 letters (A to Z, a to z), digits, `.`, `_` "
    "and `-`, the first a letter or a digit",  # of the one key with a pattern: the sweep's name
    "bool_type": "allowed are true and false",
    "bool_parsing": "allowed are true and false",
    "list_type": "a list belongs here",
    "too_short": "at least {min_length} item belongs here",
    "too_long": "at most {max_length} items belong here",
    "string_too_short": "at least {min_length} character belongs here",
    "string_too_long": "at most {max_length} characters belong here",
    "model_type": "a mapping (key: value) belongs here",
    "dict_type": "a mapping (key: value) belongs here",
    "model_attributes_type": "a mapping (key: value) belongs here",
}
EXPONENTS = ", in digits: 20000 or 20_000, not '20k' or 2e4"


def nearest(value: Any, names: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'activation'?``, or nothing."""
    if not isinstance(value, str):
        return ""
    close = difflib.get_close_matches(value[:100], list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def mistakes_of(
    error: ValidationError, model: type[BaseModel], data: Any, prefix: str
) -> list[Mistake]:
    """One `Mistake` for each complaint of a validation.

    Args:
        error: what pydantic raised.
        model: the model that was validated.
        data: the plain data it was given.
        prefix: where the data stands in the file, e.g. ``metadata.sweep``.
    """
    found = []
    for complaint in error.errors(include_url=False):
        location = complaint["loc"]
        path = path_of(location, data, prefix)
        kind, value = complaint["type"], complaint.get("input")
        message = complaint["msg"]
        if kind == "extra_forbidden":
            allowed = _keys_at(model, location[:-1])
            message = f"unknown key; allowed are {', '.join(allowed)}" + nearest(
                location[-1], allowed
            )
            value = None
        elif kind == "password":
            value = None
        elif kind == "missing":
            message, value = "this key is required", None
        elif kind == "literal_error":
            names = [n.strip().strip("'") for n in _expected(complaint).split(",")]
            message = f"allowed are {', '.join(names)}{nearest(value, names)}"
        elif kind in PLAIN:
            message = PLAIN[kind].format(**complaint.get("ctx", {}))
            if kind.startswith("int_") and isinstance(value, str):
                message += EXPONENTS
        found.append(Mistake(path, shown(value), message))
    return found


def _expected(complaint: Any) -> str:
    return str(complaint["ctx"]["expected"]).replace(" or ", ", ")


def shown(value: Any) -> Any:
    """The value, or the beginning of it where it is long."""
    try:
        text = repr(value)
    except ValueError:  # whole numbers of more digits than Python writes out
        return "a very long number"
    if len(text) <= 80:
        return value
    return (value if isinstance(value, str) else text)[:77] + "..."


def path_of(location: Sequence[int | str], data: Any, prefix: str) -> str:
    """The place as a person would write it; a lone value wrapped into a list shows no index."""
    path = prefix
    for part in location:
        if isinstance(part, int):
            if isinstance(data, list):
                path += f"[{part}]"
                data = data[part] if part < len(data) else None
            continue
        path = f"{path}.{part}" if path else str(part)
        data = data.get(part) if isinstance(data, dict) else None
    return path or "(top)"


def _keys_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        while get_origin(annotation) is not None:
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return [field.alias or name for name, field in model.model_fields.items()]
