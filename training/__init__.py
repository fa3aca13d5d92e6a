"""Training programs of Diff-Restorer; clients of the `diff_restorer` core."""
