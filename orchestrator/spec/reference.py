"""The sweep file for readers and editors: a reference page and a JSON Schema, from the schema.

pydantic's own JSON Schema knows a list where a sweep file may also give a lone value, and YAML 1.2,
which editors read, takes ``40_000`` for a text; both are added here. A Ray cluster file that holds
the sweep under ``metadata.sweep`` is allowed beside the plain form.
"""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator.spec.schema import Listed, SweepFile, listed_schedules

JsonSchema = dict[str, Any]
GROUPED_DIGITS = r"^[0-9]{1,3}(_[0-9]{3})+$"
REFERENCE_HEAD = """\
# The sweep file

Made by `prunefield schema --markdown` from the schema that reads sweep files; do not edit.

A sweep file is one YAML mapping, or a Ray cluster file that holds it under `metadata.sweep`.
Where a *list* is allowed, a lone value may stand for a list of one, and every combination of lists
is run. Unknown keys are mistakes; `prunefield validate FILE` names all of them at once. Sizes are
whole numbers of bytes or texts such as `500kB`, `1.2MB` (powers of ten), `2.5MiB` (of two).

Editors complete and check sweep files with [sweep.schema.json](sweep.schema.json); the first line
of a file tells the YAML language server of VS Code, Neovim, Emacs and JetBrains where it is:

```yaml
# yaml-language-server: $schema=docs/sweep.schema.json
```
"""


# --- JSON Schema -----------------------------------------------------------------------------


def json_schema() -> JsonSchema:
    """The JSON Schema of both forms of a sweep file (draft 2020-12)."""
    made = SweepFile.model_json_schema()
    sections: dict[str, JsonSchema] = made.pop("$defs")
    sections["SweepFile"] = made
    for model in models(SweepFile):
        properties = sections[model.__name__]["properties"]
        for field_name, field in model.model_fields.items():
            name = key_of(field_name, field)
            if _is_listed(field):
                properties[name] = _or_lone_value(properties[name])
            if field.description:
                properties[name]["description"] = field.description
    cluster = {
        "title": "Ray cluster file with a sweep",
        "type": "object",
        "required": ["metadata"],
        "properties": {
            "metadata": {
                "type": "object",
                "required": ["sweep"],
                "properties": {"sweep": {"$ref": "#/$defs/SweepFile"}},
            }
        },
    }
    schema: JsonSchema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "prunefield sweep file",
        "if": {"type": "object", "required": ["metadata"]},
        "then": cluster,
        "else": {"$ref": "#/$defs/SweepFile"},
        "$defs": sections,
    }
    return _with_grouped_digits(schema)


def key_of(name: str, field: FieldInfo) -> str:
    """The key that a sweep file has for a field: its alias where its name is a word of Python."""
    return field.alias or name


def models(root: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A section and the sections within it, each once, in the order of the file."""
    seen: dict[type[BaseModel], None] = {}

    def visit(model: type[BaseModel]) -> None:
        if model not in seen:
            seen[model] = None
            for field in model.model_fields.values():
                for inner in _sections_in(field.annotation):
                    visit(inner)

    visit(root)
    yield from seen


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def _is_listed(field: FieldInfo) -> bool:
    """Whether a lone value may stand for a list of one."""
    return any(
        marker is Listed or getattr(marker, "func", None) is listed_schedules
        for marker in field.metadata
    )


def _or_lone_value(array: JsonSchema) -> JsonSchema:
    kept: JsonSchema = {n: array.pop(n) for n in ("title", "default") if n in array}
    return kept | {"anyOf": [array["items"], array]}


def _with_grouped_digits(schema: Any) -> Any:
    """Whole numbers also as YAML 1.2 reads ``40_000``: a text of groups of digits."""
    if isinstance(schema, list):
        return [_with_grouped_digits(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: _with_grouped_digits(part) for name, part in schema.items()}
    if schema.get("type") == "integer":
        schema |= {"type": ["integer", "string"], "pattern": GROUPED_DIGITS}
    return schema


# --- the page --------------------------------------------------------------------------------


def reference() -> str:
    """The reference of the sweep file as Markdown: one table a section."""
    parts = [REFERENCE_HEAD]
    schema = json_schema()["$defs"]
    paths = _paths(SweepFile, "")
    for model in models(SweepFile):
        where = paths[model]
        title = " and ".join(f"`{path}`" for path in where) if where != [""] else "The file itself"
        parts.append(f"## {title}\n\n{_summary(model)}\n")
        rows = [
            _row(name, field, schema[model.__name__]["properties"][name], schema)
            for name, field in (
                (key_of(name, field), field) for name, field in model.model_fields.items()
            )
        ]
        parts.append(
            "\n".join(["| key | is | default | what |", "|---|---|---|---|", *rows]) + "\n"
        )
    return "\n".join(parts)


def _paths(model: type[BaseModel], prefix: str) -> dict[type[BaseModel], list[str]]:
    """Where in a file each section stands."""
    found: dict[type[BaseModel], list[str]] = {model: [prefix]}
    for name, field in model.model_fields.items():
        for inner in _sections_in(field.annotation):
            path = f"{prefix}.{name}" if prefix else name
            for section, paths in _paths(inner, path).items():
                found.setdefault(section, []).extend(paths)
    return found


def _summary(model: type[BaseModel]) -> str:
    text = (model.__doc__ or "").strip()
    return "\n".join(line.strip() for line in text.splitlines())


def _row(name: str, field: FieldInfo, schema: JsonSchema, sections: Mapping[str, Any]) -> str:
    cells = (
        f"`{name}`",
        _kind(schema, sections),
        _default(field),
        field.description or "",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _kind(schema: JsonSchema, sections: Mapping[str, Any]) -> str:
    """What values are allowed, in words."""
    if "$ref" in schema:
        return "a mapping"
    if "enum" in schema:
        return " / ".join(f"`{name}`" for name in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    options = [part for part in schema.get("anyOf", ()) if part.get("type") != "null"]
    if (
        len(options) == 2
        and options[1].get("type") == "array"
        and options[1]["items"] == options[0]
    ):
        return f"list: {_kind(options[0], sections)}"
    if options:
        return " or ".join(dict.fromkeys(_kind(part, sections) for part in options))
    return _plain_kind(schema, sections)


def _plain_kind(schema: JsonSchema, sections: Mapping[str, Any]) -> str:
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "array":
        return f"list of {_kind(schema['items'], sections)}"
    if kind == "string" and "pattern" in schema and "maxLength" not in schema:
        return "text" if schema.get("title") else "such as `500kB`"
    words = {"integer": "whole number", "number": "number", "boolean": "`true` / `false`"}
    return words.get(str(kind), "text") + _range(schema)


def _range(schema: JsonSchema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None and high < 10**6:
        return f" from {low:g} to {high:g}"
    if low is not None and below is not None:
        return f" from {low:g}, below {below:g}"
    if low is not None:
        return f" from {low:g}"
    return "" if above is None else f" above {above:g}"


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.is_required():
        return "**required**"
    if isinstance(value, BaseModel) or value is None or value in ([], ""):
        return ""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return "`all`" if _is_listed(field) else ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:_}`" if isinstance(value, int) else f"`{value}`"
