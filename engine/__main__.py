"""`python -m engine` (and `torchrun ... -m engine`) is the `engine` command."""

import signal

from engine.util.signals import STOP_SIGNALS


def main() -> None:
    """Run the command. Not at import, which multiprocessing repeats in its workers, and these must end on SIGTERM."""
    # Blocked until a handler exists (engine.util.signals) or cli/main.py unblocks them: imports take 0.1 s.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    from engine.cli.main import main

    main()


if __name__ == "__main__":
    main()
