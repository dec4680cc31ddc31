"""`python -m zeroinf`, and what DeepSpeed's launcher starts with `--module zeroinf`."""

from zeroinf.cli.main import main

main()
