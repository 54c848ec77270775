"""Read single definitions of an example without running it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"


def definitions(example: str, *names: str) -> list[Any]:
    """Return the functions and constants with these names, defined at the top level of an example."""
    path = EXAMPLES / example
    body = ast.parse(path.read_text(encoding="utf-8")).body
    kept = [node for node in body if bound(node) & set(names)]
    used = {node.id for part in kept for node in ast.walk(part) if isinstance(node, ast.Name)}
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom) and bound(node) & used]
    module = ast.Module([*imports, *kept], [])
    found: dict[str, Any] = {}
    exec(compile(module, str(path), "exec"), found)  # inherits the future import above
    return [found[name] for name in names]


def bound(node: ast.stmt) -> set[str]:
    """Return the names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
