"""Many devices: meshes and shardings, hosts, chips to plan for, and the costs of a program."""
