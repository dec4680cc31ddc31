"""Finds misspelt keywords in JSON schemas: validators ignore keywords that they do not know, and answers would not be
what was asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords with names that the user gives, and a schema at each."""
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SCHEMA = (
    *("items", "additionalItems", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else"),
    *("unevaluatedItems", "unevaluatedProperties", "contentSchema"),
)
_OTHERS = (
    *("$schema", "$id", "id", "$ref", "$anchor", "$dynamicRef", "$dynamicAnchor", "$vocabulary", "$comment"),
    *("type", "enum", "const", "multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum"),
    *("maxLength", "minLength", "pattern", "format", "maxItems", "minItems", "uniqueItems", "maxContains"),
    *("minContains", "maxProperties", "minProperties", "required", "dependentRequired", "dependencies"),
    *("title", "description", "default", "deprecated", "readOnly", "writeOnly", "examples", "example"),
    *("contentEncoding", "contentMediaType", "discriminator"),
)
_KNOWN = frozenset((*_SCHEMAS, *_LISTS, *_SCHEMA, *_OTHERS))
_ALIKE = 0.8


def misspelt_keyword(schema: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first keyword in `schema`, at any depth, that is nearly one that JSON Schema has, and that one."""
    for keyword in _keywords(schema):
        near = difflib.get_close_matches(keyword, _KNOWN, n=1, cutoff=_ALIKE) if keyword not in _KNOWN else ()
        if near:
            return keyword, near[0]
    return None


def _keywords(schema: object) -> Iterator[str]:
    """Every keyword of `schema` and of the schemas in it; names of properties and values are none."""
    if not isinstance(schema, Mapping):
        return
    yield from schema
    for keyword, value in schema.items():
        below: list[object] = []
        if keyword in _SCHEMAS and isinstance(value, Mapping):
            below = list(value.values())
        elif (keyword in _LISTS or keyword in _SCHEMA) and isinstance(value, list):
            below = value
        elif keyword in _SCHEMA:
            below = [value]
        for each in below:
            yield from _keywords(each)
