"""One module for each command of the command line; `arguments` has what they share."""
