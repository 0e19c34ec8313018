"""``python -m pl_patchcore``."""

from pl_patchcore.cli import main

if __name__ == "__main__":
    main()
