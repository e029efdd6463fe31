"""What `avg-llava COMMAND` runs, one module for each command; `main` finds them, `cli` is what they share."""
