"""The `lamina` command, one file per subcommand."""
