"""The page at `/docs`: the OpenAPI document as plain HTML, without anything from outside."""

import json
from html import escape
from typing import Any

CONTENT_SECURITY_POLICY = "default-src 'none'; base-uri 'none'; frame-ancestors 'none'"


def docs_page(document: dict[str, Any]) -> str:
    """HTML that lists the routes, with the fields of what they take and give."""
    title = escape(document["info"]["title"])
    schemas = document["components"]["schemas"]
    routes = "".join(
        _route(method, path, route)
        for path, methods in document["paths"].items()
        for method, route in methods.items()
    )
    tables = "".join(_schema(name, schema) for name, schema in sorted(schemas.items()))
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title></head>"
        f"<body><h1>{title} {escape(document['info']['version'])}</h1>"
        f"<p>{escape(document['info']['description'])} "
        "<a href='openapi.json'>The same as an OpenAPI document</a>.</p>"
        f"<h2>Routes</h2><dl>{routes}</dl><h2>Objects</h2>{tables}</body></html>"
    )


def _route(method: str, path: str, route: dict[str, Any]) -> str:
    taken = route.get("requestBody", {}).get("content", {}).get("application/json", {})
    given = route["responses"].get("200", {}).get("content", {}).get("application/json", {})
    return (
        f"<dt><code>{method.upper()} {escape(path)}</code></dt>"
        f"<dd>{escape(route.get('description', ''))}{_said('takes', taken)}{_said('gives', given)}"
        "</dd>"
    )


def _said(verb: str, content: dict[str, Any]) -> str:
    return f" It {verb} {_type(content['schema'])}." if content.get("schema") else ""


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code></td><td>{_type(of)}</td>"
        f"<td>{'required' if field in required else ''}</td></tr>"
        for field, of in schema.get("properties", {}).items()
    )
    text = escape(schema.get("description", ""))
    return f"<h3 id='{escape(name)}'>{escape(name)}</h3><p>{text}</p><table>{rows}</table>"


def _type(schema: dict[str, Any]) -> str:
    """A type in words; a link for one that has a name."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f"<a href='#{name}'>{name}</a>"
    if options := schema.get("anyOf"):
        return " or ".join(_type(option) for option in options)
    if "enum" in schema:
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    bounds = [f"{sign} {schema[key]}" for key, sign in _BOUNDS.items() if key in schema]
    return escape(" ".join([str(schema.get("const", schema.get("type", "anything"))), *bounds]))


_BOUNDS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "to",
    "exclusiveMaximum": "below",
    "minLength": "of at least",
    "maxLength": "of at most",
}
