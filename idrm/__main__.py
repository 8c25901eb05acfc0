"""`python -m idrm`, where the console script is not on the PATH."""

from idrm.cli import main

main()
