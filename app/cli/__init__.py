"""The `hone` command. Importing it is cheap: a command imports what it needs when it runs."""
