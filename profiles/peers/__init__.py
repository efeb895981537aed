"""The same weights in other runtimes, measured in turns with headpool: `scripts/peers OUT`, `python -m profiles.peers --help`.

A runtime lives in an environment of its own and is spoken to through pipes (worker.py there, process.py here). Only `with_*.py`
import runtimes, and only where they run; everything of this folder but them needs headpool's own dependencies alone.
"""
