"""The OpenAPI document: what FastAPI makes of the routes, made true. Knows no route."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

SLOT = re.compile(r"\{(\w+)\}")


def operation_id(route: APIRoute) -> str:
    """The function's name: short, unique here, and the same from one release to the next."""
    return route.name


def document(app: FastAPI) -> dict[str, Any]:
    """The document, made once. FastAPI announces a 422 that no route here answers with: it leaves as 400."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        for methods in made["paths"].values():
            for operation in methods.values():
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
        for unused in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(unused, None)
        app.openapi_schema = made
    return app.openapi_schema


def allowed_methods(app: FastAPI, path: str) -> list[str]:
    """Every method that some route takes at ``path``; Starlette names those of the first route alone."""
    found: set[str] = set()
    for template, methods in document(app)["paths"].items():
        pattern = "".join(
            "[^/]+" if i % 2 else re.escape(part) for i, part in enumerate(SLOT.split(template))
        )
        if re.fullmatch(pattern, path):
            found |= {method.upper() for method in methods}
    return sorted(found)
