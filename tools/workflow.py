"""Workflows in ComfyUI's API format: node id -> ``{"class_type", "inputs", ...}``."""

from __future__ import annotations

import json
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from tools.errors import WorkflowError

Workflow = dict[str, dict[str, Any]]


def load_workflow(path: Path) -> Workflow:
    """Reads a workflow file in API format; raises `WorkflowError` if it is none."""
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WorkflowError(f"there is no workflow file {path}") from error
    except (ValueError, RecursionError) as error:
        raise WorkflowError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(workflow, dict) or not all(map(_is_node, workflow.values())):
        raise WorkflowError(
            f"{path} is not in API format. Use one of workflows/api/, or export yours in ComfyUI "
            "with Workflow > Export (API)."
        )
    return workflow


def _is_node(node: Any) -> bool:
    return (
        isinstance(node, dict)
        and isinstance(node.get("class_type"), str)
        and isinstance(node.get("inputs"), dict)
        and isinstance(node.get("_meta", {}), dict)
    )


def title_of(node: dict[str, Any]) -> str | None:
    """What users called a node, if they did."""
    return node.get("_meta", {}).get("title")


def find_node(workflow: Workflow, class_type: str, title: str | None = None) -> str:
    """Returns the id of the one node of a class (and title), or raises `WorkflowError`."""
    found = [
        node_id
        for node_id, node in workflow.items()
        if node["class_type"] == class_type and title in (None, title_of(node))
    ]
    if len(found) != 1:
        named = f" titled {title!r}" if title else ""
        raise WorkflowError(
            f"the workflow has {len(found)} {class_type} nodes{named}; exactly one is needed"
        )
    return found[0]


def check_order(workflow: Workflow) -> None:
    """Raises `WorkflowError` if nodes wait for one another.

    ComfyUI 0.3.75 leaves out the outputs behind such nodes, runs the others, and calls that a
    success.
    """
    sources = {
        node_id: {
            value[0]
            for value in node["inputs"].values()
            if isinstance(value, list) and value and isinstance(value[0], str)
        }
        for node_id, node in workflow.items()
    }
    try:
        TopologicalSorter(sources).prepare()
    except CycleError as error:
        # Each of them gives to the next.
        circle = " to ".join(f"{node} ({workflow[node]['class_type']})" for node in error.args[1])
        raise WorkflowError(
            f"the workflow goes in a circle, and no node of it can be the first: {circle}. "
            "Take out one of these wires."
        ) from error
