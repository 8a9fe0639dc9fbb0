"""The verbs of the `engine` command, each a function from its arguments to an exit code. Heavy imports wait inside."""
