"""Programs around the pack: environment and host, API client, demo."""
