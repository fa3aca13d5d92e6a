"""Tests against a running ComfyUI, over its API only."""
