"""The `vgs` command: its flags, and what each subcommand does."""
