"""The command line: one file per subcommand, one error handler."""
