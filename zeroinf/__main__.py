"""`python -m zeroinf`, which is also what launchers start for each rank."""

from zeroinf.cli.main import main

main()
