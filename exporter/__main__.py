"""`python -m exporter` is the `headpool` command."""

from exporter.cli import main

main()
