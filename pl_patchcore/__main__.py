"""The command ``pl-patchcore``, also ``python -m pl_patchcore``."""

import sys

from pl_patchcore.commands import answered


def main() -> None:
    """Run it; Ctrl-C ends it without a traceback, while it is still being imported too."""
    try:
        if not answered(sys.argv[1:]):  # before torch is imported
            from pl_patchcore.cli import main

            main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # what a shell says of a program ended by Ctrl-C


if __name__ == "__main__":
    main()
