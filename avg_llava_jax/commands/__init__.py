"""The commands of `avg-llava`, one module each; `main` finds the module, `cli` holds what they share."""
