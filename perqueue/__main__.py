"""``python -m perqueue`` is the command ``perqueue``."""

from perqueue.cli import main

if __name__ == "__main__":
    main(prog_name="perqueue")
