"""Every node has a help page and a Chinese name for all that the user sees of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tools.environment import ROOT

pytestmark = pytest.mark.comfy


def test_help_in_both_languages(schemas: dict[str, Any]) -> None:
    folder = ROOT / "web" / "docs"
    assert sorted(path.name for path in folder.iterdir()) == sorted(schemas)
    for node_id, schema in schemas.items():
        english = (folder / node_id / "en.md").read_text()
        assert english.startswith(f"# {schema.display_name}\n")
        for entry in schema.inputs:
            assert entry.id in english, (node_id, entry.id)
        assert (folder / node_id / "zh.md").read_text().startswith("# ")


def test_chinese_names_and_tooltips(schemas: dict[str, Any]) -> None:
    translated = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text())
    assert list(translated) == list(schemas)
    for node_id, schema in schemas.items():
        entry = translated[node_id]
        assert entry["display_name"]
        assert entry["description"]
        assert list(entry.get("inputs", {})) == [each.id for each in schema.inputs], node_id
        assert list(entry["outputs"]) == [str(i) for i in range(len(schema.outputs))], node_id
        for each in (*entry.get("inputs", {}).values(), *entry["outputs"].values()):
            assert each["name"]
            assert each["tooltip"]
