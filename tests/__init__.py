"""Tests; `tests/nodes` and `tests/e2e` run against the real ComfyUI."""
