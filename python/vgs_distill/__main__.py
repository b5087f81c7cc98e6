"""`python -m vgs_distill` is the `vgs` command, for launchers that take modules: `accelerate launch -m vgs_distill`."""

from vgs_distill.commands.cli import main

main()
