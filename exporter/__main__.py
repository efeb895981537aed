"""The command `headpool`, and `python -m exporter`: Ctrl-C is caught before anything is imported that takes its time."""

import os
import signal


def _at_once(*_: object) -> None:
    os.write(2, b"headpool: interrupted; nothing half-written was left\n")
    os._exit(130)


def main() -> None:
    signal.signal(signal.SIGINT, _at_once)
    from exporter.cli import main as run

    run()


if __name__ == "__main__":
    main()
