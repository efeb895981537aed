"""What headpool promises in numbers, measured: `python -m profiles.benchmarks.NAME OUT.json`. Needs the `test` extra."""
