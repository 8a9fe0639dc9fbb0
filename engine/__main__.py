"""`python -m engine` (and `torchrun ... -m engine`) is the `engine` command."""

import signal

from engine.util.signals import STOP_SIGNALS


def main() -> None:
    """The command. Not at the import, which multiprocessing repeats in workers: they have to end on SIGTERM."""
    # Until somebody answers them (engine.util.signals; or cli/main.py lets them through): imports take 0.1 s.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    from engine.cli.main import main

    main()


if __name__ == "__main__":
    main()
