"""What OpenAPI says of the server's bodies, derived from an edit's fields, and a page that shows it."""

from __future__ import annotations

import math
from html import escape
from typing import Annotated, Any, Literal, get_args, get_origin

from pbe.batch.job import NUMBERS, PARTS
from pbe.editing.settings import setting_docs
from pbe.io.fields import Range, describe
from pbe.serve.forms import FIXED, SEVERAL, TEXTS, UPLOADS
from pbe.serve.jobs import Status

Schema = dict[str, Any]
DOCS = setting_docs() | {
    "image": "The photo.",
    "mask": "A picture of the photo's size, white where it is repainted; or give box, polygon or select.",
    "exemplar": "The object to paint; of several their mean.",
    "exemplar_mask": "Where the object is in each exemplar, white = object.",
    "negative": "What guidance leads away from.",
    "num_images": "How many results: the first has the seed `seed`, the next have the next seeds.",
}
DOCS |= {f"{name}_{n}": f"As {name}, of region {n}." for n in NUMBERS for name in PARTS}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def record(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


TEXT, NUMBER, OPTIONAL = {"type": "string"}, {"type": "number"}, {"type": ["string", "null"]}
PROBLEM = record(message=TEXT, type=TEXT, param=OPTIONAL, code=OPTIONAL)
ERROR = record(error=PROBLEM)
RESULTS = record(created=NUMBER, data=array(record(seed=NUMBER, b64_json=TEXT)))
JOB = record(
    **dict.fromkeys(("created", "step", "steps"), NUMBER),
    id=TEXT,
    status={"enum": list(get_args(Status))},
    results=array(record(seed=NUMBER, url=TEXT)),
    error={"anyOf": [PROBLEM, {"type": "null"}]},
)
HEALTH = record(status=TEXT, version=TEXT, checkpoint=TEXT)


def one_of(kind: Any) -> Schema:
    """The JSON schema of a setting's values in a form, where lists are texts."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = one_of(arguments[0])
        for bounds in (extra for extra in arguments[1:] if isinstance(extra, Range) and found["type"] != "string"):
            found["exclusiveMinimum" if bounds.above else "minimum"] = bounds.low
            if bounds.high < math.inf:
                found["exclusiveMaximum" if bounds.below else "maximum"] = bounds.high
            if bounds.step > 1:
                found["multipleOf"] = bounds.step
        return found
    if origin is Literal:
        return {"type": "string", "enum": list(arguments)}
    options = [argument for argument in arguments if argument is not type(None)]
    if origin is not None and origin is not tuple and len(options) == 1:
        return one_of(options[0])  # or None, which is not given
    return {"type": {int: "integer", float: "number", bool: "boolean"}.get(kind, "string")}


def form_schema(openai: bool = False) -> Schema:
    """What OpenAPI says of a request's body: all files and texts of an edit, and OpenAI's."""
    picture = {"type": "string", "format": "binary"}
    properties = {name: array(picture) if name in SEVERAL else dict(picture) for name in UPLOADS}
    properties |= {name: one_of(kind) for name, kind in TEXTS.items()}
    for name, found in properties.items():
        kind = describe(TEXTS[name]) if name in TEXTS and found == {"type": "string"} else ""
        found["description"] = " ".join(filter(None, [DOCS.get(name, ""), kind and f"It is {kind}."]))
    if openai:
        properties |= {"image[]": {**array(picture), "minItems": 2}, "n": properties["num_images"]}
        properties |= {name: {"type": "string"} | ({"enum": [value]} if value else {}) for name, value in FIXED.items()}
    fields = record(**properties) | {"additionalProperties": False}
    fields["required"] = ["image[]"] if openai else ["image", "exemplar"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": fields}}}}


def body(kind: str, schema: Schema, **others: Schema) -> Schema:
    """A response of a kind of content, or of others."""
    return {"description": "as described", "content": {kind: {"schema": schema}, **others}}


def json_body(schema: Schema) -> Schema:
    return body("application/json", schema)


def page(openapi: Schema) -> str:
    """A page that shows an API, without scripts, which would come from elsewhere."""
    title = openapi["info"]["title"]
    parts = [f"<!doctype html><meta charset=utf-8><title>{title}</title><h1>{title}</h1>"]
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            parts += [f"<h2>{method.upper()} {path}</h2><p>{escape(operation['description'])}</p><table>"]
            content = operation.get("requestBody", {}).get("content", {})
            for name, found in content.get("multipart/form-data", {}).get("schema", {}).get("properties", {}).items():
                if name.rpartition("_")[2] in map(str, NUMBERS[1:]):
                    continue  # as those of region 2
                kind = "|".join(found.get("enum", [])) or found.get("format") or found["type"]
                parts += [f"<tr><th>{name}<td>{kind}<td>{escape(found.get('description', ''))}"]
            parts += ["</table>"]
    return "".join(parts)
