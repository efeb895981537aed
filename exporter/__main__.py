"""The command `headpool`, and `python -m exporter`: Ctrl-C is caught before anything is imported that takes its time."""

import gc
import os
import signal


def _at_once(*_: object) -> None:
    os.write(2, b"headpool: interrupted; nothing half-written was left\n")
    os._exit(130)


def main() -> None:
    signal.signal(signal.SIGINT, _at_once)
    gc.set_threshold(50_000, 20, 100)  # of the objects that imports make by the million none is garbage
    from exporter.cli import main as run

    run()


if __name__ == "__main__":
    main()
